"""The command line as a user meets it: what it prints, its exit codes, and that no traceback ever shows."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.shell_completion import get_completion_class
from click.testing import CliRunner, Result

import shiradelta
from shiradelta.cli import main, options
from shiradelta.cli.options import RegistryChoice, command, renamed_option
from shiradelta.cli.output import skipped_lines
from tests.scenes import contents


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with model/, tuned/ and a.shd, entered."""
    shutil.copytree(made / "bf16", tmp_path / "model")
    shutil.copytree(made / "tuned_a", tmp_path / "tuned")
    shutil.copy(made / "a.shd", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_whole_way(folder: Path):
    before = contents(folder / "model")
    converted = run("convert", "tuned", "--base", "model", "--sparsity", "0.1", "--values", "int8")
    assert converted.exit_code == 0
    assert "6 tensors converted, 0 skipped" in converted.stdout
    assert "energy kept" in converted.stdout
    shown = run("info", "tuned.shd", "--verify")
    assert "RICE" in shown.stdout
    assert "checked in full" in shown.stdout
    assert "shiradelta revert model" in run("apply", "model", "tuned.shd").stdout
    assert "patched: exactly tuned.shd at 1" in run("verify", "model").stdout
    assert "the folder is its base again" in run("revert", "model").stdout
    assert contents(folder / "model") == before
    assert "base: exactly the base of tuned.shd" in run("verify", "model", "tuned.shd").stdout


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        (("convert", "tuned", "--base", "model"), {"nnz", "energy_kept", "tensors", "skipped", "bits_per_nonzero"}),
        (("info", "a.shd"), {"nnz", "digest", "tensors", "metadata", "bytes"}),
        (("apply", "model", "a.shd"), {"tensors", "changed"}),
        (("verify", "model", "a.shd"), {"state", "detail"}),
        (("commit", "model"), {"deltas", "files"}),
        (("list", "model"), {"applied", "pending", "base"}),
    ],
)
def test_json_is_json(folder: Path, arguments: tuple[str, ...], keys: set[str]):
    result = run(*arguments, "--json")
    assert result.exit_code == 0
    assert keys <= set(json.loads(result.stdout))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("info", "nothing.shd"), "nothing.shd: cannot be read"),
        (("info", "model"), "model: is a folder, not a .shd file; give a .shd file (`shiradelta verify model` says"),
        (
            ("info", "model/model.safetensors"),
            "is a safetensors file, not a .shd file) [bad_magic]; `shiradelta convert",
        ),
        (("apply", "a.shd", "model"), "a.shd: is a .shd file, a delta and no model; give the model's folder; where"),
        (("verify", "user/model"), "user/model: no such file or folder here"),
        (("convert", "tuned", "--base", "user/model"), "user/model: no such file or folder here"),
        (("info", "model/config.json"), "it is not a shiradelta file"),
        (("convert", "nothing"), "no such file or folder"),
        (("convert", "tuned"), "--base"),
        (("convert", "a.shd"), "is a .shd file, a delta and no model; give -o FILE (out=) to make another of it"),
        (("apply", "nothing", "a.shd"), "nothing: no such folder"),
        (("apply", "model/model.safetensors", "a.shd"), "give the folder"),
        (("apply", "model", "nothing.shd"), "nothing.shd: cannot be read"),
        (("apply", "model", "a.shd", "--out", "tuned"), "tuned: exists already"),
        (("apply", "model", "a.shd", "--out", "model/inside"), "outside"),
        (("apply", "tuned", "a.shd"), "--no-check"),
        (("revert", "model"), "nothing to revert"),
        (("verify", "nothing"), "no such folder"),
    ],
)
def test_bad_input_is_one_plain_line(folder: Path, arguments: tuple[str, ...], message: str):
    _refused(folder, arguments, message, code=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("convert", "tuned", "--base", "model", "--sparsity", "0"), "sparsity 0.0 is not a share"),
        (("convert", "tuned", "--base", "model", "--sparsity", "1.5"), "sparsity 1.5 is not a share"),
        (("convert", "tuned", "--base", "model", "--alpha", "3"), "and tuned is of kind full; leave it out"),
        (("apply", "model", "a.shd", "--strength", "nan"), "strength nan"),
    ],
)
def test_a_wrong_argument_is_one_plain_line_and_wrong_usage(folder: Path, arguments: tuple[str, ...], message: str):
    _refused(folder, arguments, message, code=2)


def _refused(folder: Path, arguments: tuple[str, ...], message: str, code: int) -> None:
    before = contents(folder)
    result = run(*arguments)
    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert contents(folder) == before


def test_shares_may_be_percentages(folder: Path):
    sizes = [
        json.loads(run("convert", "tuned", "--base", "model", "--sparsity", share, "--json").stdout)["nnz"]
        for share in ("0.02", "2%")
    ]
    assert sizes[0] == sizes[1]
    wrong = run("convert", "tuned", "--base", "model", "--sparsity", "much")
    assert wrong.exit_code == 2
    assert "'much' is not a share; give a number such as 0.01 or a percentage such as 1%" in wrong.stderr
    assert "2 percent is 0.02" in run("convert", "tuned", "--base", "model", "--sparsity", "2").stderr


@pytest.mark.parametrize(
    "arguments", [("convert",), ("convert", "tuned", "--values", "int3"), ("apply", "model"), ("nothing",)]
)
def test_wrong_usage_is_exit_code_2(folder: Path, arguments: tuple[str, ...]):
    assert run(*arguments).exit_code == 2


def test_verify_of_something_else_is_exit_code_1(folder: Path):
    result = run("verify", "tuned", "a.shd")
    assert result.exit_code == 1
    assert "neither" in result.stdout


def test_all_deltas_are_listed_and_reverted(folder: Path, made: Path):
    before = contents(folder / "model")
    assert "no delta is on it" in run("list", "model").stdout
    run("apply", "model", "a.shd")
    run("apply", "model", str(made / "b.shd"), "--strength", "0.5")
    lines = run("list", "model").stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["b.shd at 0.5", "a.shd at 1"]
    reverted = run("revert", "model", "--all").stdout
    assert "took out b.shd, a.shd" in reverted
    assert "the folder is its base again" in reverted
    assert contents(folder / "model") == before


def test_verify_without_anything_to_compare_with_is_exit_code_1(folder: Path):
    result = run("verify", "model")
    assert result.exit_code == 1
    assert "unknown" in result.stdout
    assert "digests recorded: 1" in run("commit", "model").stdout
    result = run("verify", "model")
    assert result.exit_code == 0
    assert "base: every weight file is the recorded base's" in result.stdout
    assert "nothing is recorded" in run("commit", "model", "--forget").stdout
    assert run("verify", "model").exit_code == 1


def test_names_cannot_act_on_the_terminal(folder: Path):
    tensor = shiradelta.TensorDelta((4,), [1], [1.0])
    shiradelta.save_delta("e.shd", {"a\u009b31m\u202eb": tensor}, metadata={"note": "\x1b]0;owned\x07"})
    result = run("info", "e.shd")
    assert result.exit_code == 0
    assert not set(result.stdout) & set("\x1b\x07\u009b\u202e")


@pytest.mark.skipif(sys.platform == "win32", reason="such names are impossible there")
def test_names_of_files_cannot_act_on_the_terminal_either(folder: Path, made: Path):
    strange = "\x1b[31m\n\u202ex"
    model, delta = f"model{strange}", f"a{strange}.shd"
    (folder / "model").rename(folder / model)
    (folder / "a.shd").rename(folder / delta)
    (folder / f"tuned{strange}").symlink_to(folder / "tuned")
    shutil.copy(made / "b.shd", f"b{strange}.shd")
    done = [
        run("info", delta),
        run("report", delta, f"b{strange}.shd", "-o", f"page{strange}.html"),
        run("fuse", delta, f"b{strange}.shd", "-o", f"both{strange}.shd"),
        run("convert", f"tuned{strange}", "--base", model, "-o", f"c{strange}.shd"),
        run("verify", model, delta),
        run("apply", model, delta),
        run("verify", model),
        run("revert", model),
        run("info", f"gone{strange}.shd"),
    ]
    assert [result.exit_code for result in done] == [0] * 8 + [1]
    for result in done:
        assert r"\x1b[31m\n\u202ex" in result.output
        assert not set(result.output) & set("\x1b\u202e")
        assert "\nx" not in result.output


def test_interrupt_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shiradelta.folder.apply.apply", interrupted)
    result = run("apply", "model", "a.shd")
    assert (result.exit_code, result.stderr) == (
        1,
        "interrupted; every file is whole, as before the command or as after it\n",
    )


def test_the_examples_of_every_help_can_be_parsed():
    for name, each in main.commands.items():
        assert each.examples, name
        for example in each.examples:
            assert f"  shiradelta {example}\n" in run(name, "--help").stdout
            words = shlex.split(example.partition(" <")[0])
            assert words[0] == name
            each.make_context(name, words[1:])


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_commands_options_choices_and_paths(shell: str):
    kind = get_completion_class(shell)
    completion = kind(main, {}, "shiradelta", "_SHIRADELTA_COMPLETE")
    assert "_SHIRADELTA_COMPLETE" in completion.source()
    for words, incomplete, expected in (
        ([], "app", "apply"),
        (["apply"], "--str", "--strength"),
        (["fuse", "--method"], "ti", "ties"),
    ):
        assert expected in [item.value for item in completion.get_completions(words, incomplete)]
    for words in (["apply"], ["apply", "model"], ["convert", "--base"], ["fuse"], ["convert", "lora", "-o"]):
        assert [item.type for item in completion.get_completions(words, "mo")] == ["file"], words


def test_help_of_every_command_names_its_options():
    for name, each in main.commands.items():
        result = run(name, "--help")
        assert result.exit_code == 0
        assert each.help
        assert all(option.help for option in each.params if isinstance(option, click.Option))


def test_start_imports_neither_torch_nor_scipy(folder: Path):
    code = "import sys, shiradelta.cli; shiradelta.open_delta('a.shd').verify(); print(sorted(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for heavy in ("torch", "scipy", "transformers", "safetensors", "zstandard"):
        assert f"'{heavy}'" not in modules


def test_tensors_that_are_skipped_for_one_reason_share_a_line():
    skipped = {"a": "nothing changes", "b": "nothing changes", "c": "is not a matrix"}
    assert skipped_lines(skipped) == ["skipped a and 1 more: nothing changes", "skipped c: is not a matrix"]


RENAMED = {"half": "f16"}


def test_renamed_options_and_choices_are_taken_with_a_warning_and_hidden():
    codecs = RegistryChoice("shiradelta.format.codecs:VALUE_OPTIONS", "tests.cli.test_cli:RENAMED")

    @command()
    @click.option("--prune-from", type=float, default=5.0)
    @click.option("--values", type=codecs, default="f32")
    @renamed_option("--fall-from", "--prune-from")
    def example(prune_from: float, values: str) -> None:
        click.echo(f"{prune_from} {values} {options.given('prune')}")

    new = CliRunner().invoke(example, ["--prune-from", "2"])
    assert (new.stdout, new.stderr) == ("2.0 f32 --prune-from\n", "")
    for old in (["--fall-from", "2", "--values", "half"], ["--fall-from=2", "--values=half"]):
        result = CliRunner().invoke(example, old)
        assert result.stdout == "2.0 f16 --prune-from\n"
        assert result.stderr == (
            "warning: --fall-from is deprecated; use --prune-from\nwarning: half is deprecated; use f16\n"
        )
    text = CliRunner().invoke(example, ["--help"]).stdout
    assert "fall" not in text
    assert "half" not in text
    assert "[f32|f16|" in text


def test_the_help_of_a_registry_is_the_same_each_time():
    option = next(option for option in main.commands["train"].params if option.name == "mask")
    context = click.Context(main.commands["train"])
    records = [option.get_help_record(context) for _ in range(2)]
    assert records[0] == records[1]
    assert "random" in records[0][1]
    assert option.help == "Which weights change"


def test_help_lists_every_command_and_imports_none():
    code = "import sys; from shiradelta.cli import main; main(['--help'], standalone_mode=False); print(*sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(f"\n  {name} " in said for name in main.commands)
    modules = said.split()
    assert "click" in modules
    assert not {"numpy", "torch", "scipy", *(f"shiradelta.cli.{name}" for name in main.commands)} & set(modules)


def test_convert_lists_the_kinds_in_the_order_in_which_they_are_asked():
    from shiradelta.converters import SOURCES, kinds

    result = run("convert", "--list")
    assert result.exit_code == 0
    assert [line.split(None, 1) for line in result.output.splitlines()[2:]] == [
        [kind, SOURCES[kind].help] for kind in kinds()[1:]
    ]
