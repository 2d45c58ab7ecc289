"""Mistakes on the command line, and what is said of each: the table of docs/mistakes.md.

`python -m tests.cli.test_mistakes` writes what is said into the table; the commands in it are written by hand.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import shiradelta
from shiradelta.cli import main
from shiradelta.errors import ArgumentError
from tests.conftest import random_tensors, write_lora, write_model
from tests.scenes import contents

PAGE = Path(__file__).parents[2] / "docs" / "mistakes.md"
ROW = re.compile(r"^\| `shiradelta (.*?)` \| (\d?) ?\| (.*?) ?\|$", re.MULTILINE)


def build(folder: Path) -> None:
    """What the page says of the folder that the commands run in."""
    import torch

    write_model(folder / "model", random_tensors(torch.bfloat16))
    write_model(folder / "tuned", random_tensors(torch.bfloat16, seed=1))
    shutil.copytree(folder / "model", folder / "my model")
    write_lora(folder / "lora", {"model.layers.0.mlp.up_proj": (96, 32)}, {"lora_alpha": 8, "target_modules": ["up"]})
    for name, positions in (("a", [1, 2]), ("b", [2, 3])):
        tensor = shiradelta.TensorDelta((96, 32), positions, [1.0, 2.0], dtype="bfloat16")
        shiradelta.save_delta(folder / f"{name}.shd", {"model.layers.0.mlp.up_proj.weight": tensor}, values="f32")
    shutil.copy(folder / "a.shd", folder / "my a.shd")
    (folder / "texts.jsonl").write_text('{"text": "one two three"}\n' * 40)


def said(command: str) -> tuple[int, str]:
    """(exit code, the last line on stderr) of a command, run here.  Lists of names are left out: others test them."""
    result = CliRunner().invoke(main, shlex.split(command), prog_name="shiradelta", catch_exceptions=False)
    assert result.stdout == ""
    return result.exit_code, re.sub("(one of) .*?; ", r"\1 ...; ", result.stderr.splitlines()[-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    here, place = Path.cwd(), tmp_path_factory.mktemp("mistakes")
    build(place)
    os.chdir(place)
    yield place
    os.chdir(here)


def test_a_mistake_is_said_as_the_page_says(folder: Path):
    """In one line, which says what to do; nothing is written."""
    before = contents(folder)
    for command, code, message in ROW.findall(PAGE.read_text()):
        assert said(command) == (int(code), message.replace(r"\|", "|")), command
        assert re.search("; | Did you mean ", message), command
        assert contents(folder) == before, command


def test_there_are_fifty_and_none_twice():
    commands = [command for command, _, _ in ROW.findall(PAGE.read_text())]
    assert len(commands) == len(set(commands)) >= 50
    assert {command.split()[0] for command in commands} >= set(main.commands)


def write_page() -> None:
    """Writes what is said into the page."""
    text = PAGE.read_text()
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder))
        os.chdir(folder)

        def row(found: re.Match[str]) -> str:
            code, message = said(found[1])
            return f"| `shiradelta {found[1]}` | {code} | {message.replace('|', chr(92) + '|')} |"

        text = ROW.sub(row, text)
        os.chdir("/")
    PAGE.write_text(text)


if __name__ == "__main__":
    write_page()


def every(command: click.Command, path: str = "shiradelta") -> Iterator[tuple[str, click.Command]]:
    """All commands by what is typed."""
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            yield from every(found, f"{path} {name}")
    else:
        yield path, command


def test_an_error_names_the_option_that_was_typed(monkeypatch: pytest.MonkeyPatch):
    """Whatever the option: messages of the library are about arguments, which nobody has typed."""
    tried = 0
    for path, command in every(main):
        for option in command.params:
            if not isinstance(option, click.Option) or option.name is None:
                continue
            typed = next(name for name in option.opts if name.startswith("--"))
            for argument in {option.name, option.name.removeprefix("fit_")} - {"texts"}:
                if argument != option.name and any(other.name == argument for other in command.params):
                    continue  # it is an option of its own

                def fail(argument: str = argument, **given: object) -> None:
                    raise ArgumentError("is 0; give 1 or more", argument=argument)

                monkeypatch.setattr(command, "callback", fail)
                with pytest.raises(ArgumentError) as raised:
                    command.invoke(click.Context(command, info_name=path))
                assert str(raised.value) == f"{typed} is 0; give 1 or more"
                tried += 1
    assert tried > 100


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("train model --texts texts.jsonl -o t.shd --steps 0", "--steps"),
        ("experts train model --texts texts.jsonl -o t --steps 0", "--steps"),
        ("convert tuned --base model -o t.shd --fit texts.jsonl --fit-steps 0", "--fit-steps"),
        ("convert tuned --base model -o t.shd --fit texts.jsonl --fit-generate -1", "--fit-generate"),
    ],
)
def test_numbers_out_of_range_are_called_as_they_were_typed(command: str, option: str, folder: Path):
    code, line = said(command)
    assert code in (1, 2)
    assert option in line
    assert not re.search(r"(?<!-)\b(fit_)?(steps|generate) is", line)
