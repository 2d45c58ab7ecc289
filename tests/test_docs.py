"""The documentation says what the code does: tables of registries, and examples that run."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import shiradelta
from shiradelta.backends.choose import FILE_BACKENDS
from shiradelta.cli import main
from shiradelta.errors import ArgumentError
from shiradelta.exports import EXPORTS
from shiradelta.format.codecs import INDEX_CODECS
from shiradelta.util.registry import Registry
from tests import pictures, seq2seq, speech
from tests.conftest import write_lora, write_model
from tests.hub import TOKEN, Hub
from tests.signing.conftest import write_keys

EXTEND = Path(__file__).parent.parent / "docs" / "extend"
#: The examples that no other test executes.
HERE = {"backend": FILE_BACKENDS, "export": EXPORTS, "index-codec": INDEX_CODECS}


def table() -> list[list[str]]:
    """The rows of the table of registries: kind, registry, members, link."""
    lines = [line for line in (EXTEND / "index.md").read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def registry_of(path: str) -> Registry[Any]:
    module, _, name = path.strip("`").rpartition(".")
    found: Registry[Any] = getattr(import_module(module), name)
    return found


@pytest.mark.parametrize(("kind", "path", "members", "link"), table())
def test_the_table_of_registries_has_their_members(kind: str, path: str, members: str, link: str):
    found = registry_of(path)
    assert sorted(members.split(", ")) == sorted(found)  # they are registered as they are imported
    page = re.fullmatch(r"\[how-to\]\((.*)\)|-", link)
    assert page is not None
    assert page[1] is None or (EXTEND / page[1]).exists()


def test_the_table_of_sources_is_that_of_the_registry():
    from shiradelta.converters import SOURCES, kinds

    rows = re.findall(r"^\| (\w+) \| (.*) \|$", (EXTEND.parent / "sources.md").read_text(), re.MULTILINE)
    held = [(kind, SOURCES[kind].help) for kind in kinds()[1:]]
    assert rows[1 : len(held) + 1] == held  # after the head


def test_the_table_of_exports_is_that_of_the_registry():
    rows = re.findall(r"^\| ([\w-]+) \| (.*) \|$", (EXTEND.parent / "export.md").read_text(), re.MULTILINE)
    assert rows[1 : len(EXPORTS) + 1] == [(name, row.help) for name, row in EXPORTS.items()]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_commands_of_the_first_page_run(made: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Line for line, in a folder with the files that they name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    shutil.copytree(made / "bf16", "model")
    lora = write_lora(Path("lora"), {"model.layers.0.mlp.up_proj": (96, 32)}, {"lora_alpha": 8})
    for file in lora.iterdir():
        file.rename({"adapter_model.safetensors": "lora.safetensors"}.get(file.name, file.name))
    for source, name in (("a", "style"), ("b", "task"), ("a", "step")):
        shutil.copy(made / f"{source}.shd", f"{name}.shd")
    write_keys(Path())
    (shell,) = re.findall(r"```sh\n(.*?)```", (EXTEND.parent / "convert.md").read_text(), re.DOTALL)
    for line in shell.splitlines():
        words = shlex.split(line, comments=True)[1:]
        result = CliRunner().invoke(main, words)
        assert result.exit_code == (words[0] == "diff"), f"{line}\n{result.output}"
    assert set(hub.repos) == {"user/lora"}
    files = {"lora.shd", "report.html", "both.shd", "small.shd", "adapter", "lora.shd.sig"}
    assert files <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.filterwarnings("ignore")
def test_the_examples_of_exports_run(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made / "bf16", "model")
    with shiradelta.open_delta(made / "a.shd") as delta:
        shiradelta.save_delta("style.shd", {name: one for name, one in delta.items() if "mlp" in name}, values="int8")
    page = (EXTEND.parent / "export.md").read_text()
    (shell,), (python,) = (re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL) for kind in ("sh", "python"))
    commands = [shlex.split(line, comments=True)[1:] for line in shell.splitlines()]
    assert {words[2] for words in commands} == set(EXPORTS) - {"peft-supertuning"}
    for words in commands:
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 0, result.output
    exec(compile(python, "export.md", "exec"), {})


def test_the_examples_of_lossless_steps_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name, value in {"step_100": 1.0, "step_101": 1.0078125, "model": 1.0}.items():
        write_model(Path(name), {"w": torch.full((40, 30), value).bfloat16()})
    page = (EXTEND.parent / "lossless.md").read_text()
    shell, (python,) = (re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL) for kind in ("sh", "python"))
    for line in "".join(shell).splitlines():
        result = CliRunner().invoke(main, shlex.split(line, comments=True)[1:])
        assert result.exit_code == 0, f"{line}\n{result.output}"
    exec(compile(python, "lossless.md", "exec"), {})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_examples_of_fits_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from tests.fit.test_fit import texts
    from tests.fit.test_gain import EXAMPLES
    from tests.fit.test_new_base import write_bases
    from tests.text.test_tokenised import TEMPLATE

    monkeypatch.chdir(tmp_path)
    write_bases(tmp_path)
    (tmp_path / "base").rename("model")
    Path("model", "chat_template.jinja").write_text(TEMPLATE)
    answers = 3 * EXAMPLES[:40]
    roles = {"user": "prompt", "assistant": "completion"}
    chats = [{"messages": [{"role": role, "content": one[key]} for role, key in roles.items()]} for one in answers]
    for name, rows in {"texts": [{"text": text} for text in texts()], "answers": answers, "chats": chats}.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for folder, name in zip(seq2seq.write_pair("bart", Path("made")), ("bart", "bart-tuned"), strict=True):
        folder.rename(name)
    speech.write_pair(Path("hearing"))[2].rename("heard.jsonl")
    for folder, name in (("base", "whisper"), ("tuned", "whisper-tuned"), ("data/clips", "clips")):
        Path("hearing", folder).rename(name)
    pictures.write_pair("clip", Path("seeing"))[2].rename("seen.jsonl")
    for folder, name in (("base", "clip"), ("tuned", "clip-tuned"), ("data/shots", "shots")):
        Path("seeing", folder).rename(name)
    Path("pairs.jsonl").write_text("".join(json.dumps(one) + "\n" for one in seq2seq.examples()))
    page = (EXTEND.parent / "fit.md").read_text()
    shell, (python,) = (re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL) for kind in ("sh", "python"))
    for line in "".join(shell).splitlines():
        result = CliRunner().invoke(main, shlex.split(line)[1:])
        assert result.exit_code == 0, f"{line}\n{result.output}"
    exec(compile(python, "fit.md", "exec"), {})


def test_the_examples_of_chains_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from safetensors.numpy import save_file

    from shiradelta.chain import Chain
    from tests.chain.models import change, small, write

    monkeypatch.chdir(tmp_path)
    model, rng = small(), np.random.default_rng(0)
    for name in ("model", "step1", "step2"):
        write(Path(name), model)
        model = change(model, rng)
    live = {"w": np.zeros(9, np.float32)}
    save_file(live, "live.safetensors")
    chain = Chain.create("live-chain", "live.safetensors")
    delta = shiradelta.TensorDelta((9,), [1], [1.0], "float32", base_bits=np.zeros(1, "<u4"))
    shiradelta.save_delta("1.shd", {"w": delta})
    chain.publish("1.shd")
    page = (EXTEND.parent / "chains.md").read_text()
    scope: dict[str, Any] = {}
    for kind, block in re.findall(r"```(sh|python)\n(.*?)```", page, re.DOTALL):
        if kind == "python":
            exec(compile(block, "chains.md", "exec"), scope)
            continue
        for line in block.splitlines():
            result = CliRunner().invoke(main, shlex.split(line, comments=True)[1:])
            assert result.exit_code == 0, f"{line}\n{result.output}"


def test_the_kinds_of_examples_are_on_their_page():
    from shiradelta.text.kinds import KINDS

    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+)", (EXTEND.parent / "fit.md").read_text(), re.MULTILINE)
    assert [tuple(re.findall(r"`(\w+)`", row)) for row in rows] == [kind.keys for kind in KINDS.values()]


def test_the_table_of_tricks_has_a_row_for_each():
    from tests.folder.test_outside import TRICKS

    rows = re.findall(r"^\| `(\w+)` \|", (EXTEND.parent / "trust.md").read_text(), re.MULTILINE)
    assert rows == [trick.__name__ for trick in TRICKS]


def test_every_page_is_in_the_navigation():
    """`make docs` says so too, but later.  Documents of the tree that are pages of the site are in docs/site.py."""
    text = (EXTEND.parent.parent / "mkdocs.yml").read_text()
    listed = re.findall(r": ([\w/-]+\.md)$", text, re.MULTILINE)
    assert len(listed) == len(set(listed))
    pages = {path.relative_to(EXTEND.parent).as_posix() for path in EXTEND.parent.rglob("*.md")}
    site = dict(re.findall(r'"([\w/]+\.md)": "([\w-]+\.md)"', (EXTEND.parent / "site.py").read_text()))
    assert pages | set(site.values()) == set(listed)
    assert all((EXTEND.parent.parent / file).exists() for file in site)


def test_the_page_of_errors_has_every_class_and_reason():
    from shiradelta import errors

    page = (EXTEND.parent / "errors.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", page, re.MULTILINE))
    classes = {
        name: kind
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.ShiraDeltaError)
    }
    assert {name: rows[name] for name in errors.REASONS} == errors.REASONS
    assert set(rows) == {*classes, *errors.REASONS}
    for name, kind in classes.items():
        also = {base.__name__ for base in kind.__bases__} - {"ShiraDeltaError", "Exception"}
        assert set(re.findall(r"also an? `(\w+)`", rows[name])) == also, name


def test_the_commands_and_the_recipe_for_many_adapters_run(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for delta, name in (("a.shd", "style.shd"), ("b.shd", "tuned.shd")):
        shutil.copy(made / delta, name)
    page = (EXTEND.parent / "combine.md").read_text()
    (shell,), (recipe,) = (re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL) for kind in ("sh", "yaml"))
    Path("merge.yml").write_text(recipe)
    for line in [*shell.splitlines(), "shiradelta fuse --recipe merge.yml -o both.shd"]:
        result = CliRunner().invoke(main, shlex.split(line)[1:])
        assert result.exit_code == 0, f"{line}\n{result.output}"


#: Pages whose blocks of Python go on from each other, in a folder that holds stranger.shd.
ALONE = ("index", "exactness", "errors", "limits", "engines")


@pytest.mark.parametrize("page", ALONE)
def test_the_examples_of_a_page_run(page: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(made / "a.shd", "stranger.shd")
    scope: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", (EXTEND.parent / f"{page}.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, f"{page}.md", "exec"), scope)


@pytest.mark.parametrize(("kind", "path", "members", "link"), table())
def test_an_unknown_name_is_refused_with_the_members(kind: str, path: str, members: str, link: str):
    with pytest.raises(ArgumentError, match=f"{registry_of(path).kind} 'nothing' is unknown; take .*{members[:3]}"):
        registry_of(path).find("nothing")


def example(page: str) -> str:
    """The page's only block of Python."""
    blocks = re.findall(r"```python\n(.*?)```", (EXTEND / f"{page}.md").read_text(), re.DOTALL)
    assert len(blocks) == 1
    return str(blocks[0])


def run(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Executes the example in a folder and returns its names."""
    monkeypatch.chdir(folder)
    scope: dict[str, Any] = {"__name__": "example"}
    exec(compile(example(page), f"{page}.md", "exec"), scope)
    return scope


@pytest.fixture
def folder(made: Path, tmp_path: Path):
    """Holds what the examples name; what they add to the registries is taken out again."""
    shutil.copy(made / "a.shd", tmp_path / "style.shd")
    before = {name: set(registry) for name, registry in HERE.items()}
    yield tmp_path
    for name, registry in HERE.items():
        for added in set(registry) - before[name]:
            registry.remove(added)


@pytest.mark.parametrize("page", [path.stem for path in EXTEND.glob("*.md") if "```python" in path.read_text()])
def test_examples_are_short(page: str):
    assert len([line for line in example(page).splitlines() if line.strip()]) <= 40


def test_every_page_is_in_the_table():
    linked = {re.sub(r"\[how-to\]\((.*)\)", r"\1", link) for *_, link in table()} - {"-"}
    assert linked == {path.name for path in EXTEND.glob("*.md")} - {"index.md"}


def test_a_new_export_layout(folder: Path, monkeypatch: pytest.MonkeyPatch):
    run("export", folder, monkeypatch)
    with shiradelta.open_delta("style.shd") as delta, np.load("style.npz") as stored:
        assert set(stored) == {f"{name}.{part}" for name in delta for part in ("positions", "values")}
        for name, tensor in delta.items():
            assert np.array_equal(stored[f"{name}.positions"], tensor.positions())
            assert np.array_equal(stored[f"{name}.values"], tensor.values())


def test_a_new_backend(folder: Path, monkeypatch: pytest.MonkeyPatch):
    decoded = run("backend", folder, monkeypatch)["decoded"]
    with shiradelta.open_delta("style.shd") as delta:
        assert set(decoded) == set(delta)


def test_a_new_index_codec(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """It is taken where it is smallest, works on NumPy, and is refused by name elsewhere."""
    run("index-codec", folder, monkeypatch)
    tensor = shiradelta.TensorDelta((64, 64), np.arange(100, 900), np.ones(800), dtype="float32")
    shiradelta.save_delta("run.shd", {"w": tensor}, values="f32")
    with shiradelta.open_delta("run.shd") as delta:
        assert delta["w"].record.index_codec == INDEX_CODECS["RUN"].id
        assert np.array_equal(delta["w"].positions(), tensor.positions())
        assert delta["w"].rows(1, 3)[0].tolist() == list(range(100, 192))
        delta.verify()
    weights = {name: np.zeros((64, 64), np.float32) for name in ("w",)}
    for backend in ("auto", "numpy"):
        swap = shiradelta.HotSwap(weights, backend=backend)
        swap.load("run", "run.shd")
        swap.switch("run")
        assert np.array_equal(weights["w"], tensor.to_dense())
        swap.revert()
    damaged = bytearray(Path("run.shd").read_bytes())
    INDEX_CODECS.remove("RUN")
    with pytest.raises(shiradelta.FormatError, match="unknown_index_codec"):
        shiradelta.open_delta(bytes(damaged))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="the quickstart is for a POSIX shell")
def test_the_quickstart_works_in_an_empty_folder(tmp_path: Path):
    """Line for line, in a shell that stops at the first error."""
    blocks = re.findall(r"```sh\n(.*?)```", (EXTEND.parent.parent / "README.md").read_text(), re.DOTALL)
    (quickstart,) = (block for block in blocks if "--fit " in block)
    bin = tmp_path / "bin"
    bin.mkdir()
    for name, words in (("python", ""), ("shiradelta", "-m shiradelta.cli ")):
        (bin / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words}"$@"\n')
        (bin / name).chmod(0o755)
    folder = tmp_path / "empty"
    folder.mkdir()
    environment = {**os.environ, "PATH": f"{bin}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["sh", "-ec", quickstart],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    gain = re.search(r"of the fine-tune's gain +0% +([\d.]+)% +([\d.]+)% +100%", done.stdout)
    assert gain is not None, done.stdout
    assert float(gain[1]) < 30  # README has 14
    assert float(gain[2]) > 60  # and 74
    assert "took out tuned.shd, bit for bit" in done.stdout
