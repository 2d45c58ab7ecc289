"""What is printed where: on terminals, in pipes that are open or closed, with --quiet and --verbose."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import shlex
import shutil
import struct
import subprocess
import sys
import termios
import threading
from contextlib import contextmanager
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from shiradelta.cli import main, progress
from shiradelta.cli.progress import progress_bar

#: Readline, which pytest imports, puts a size into the environment behind Python's back.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
CONVERT = ("convert", "tuned", "--base", "model", "-o", "c.shd")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, catch_exceptions=False)


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made / "bf16", tmp_path / "model")
    shutil.copytree(made / "tuned_a", tmp_path / "tuned")
    shutil.copy(made / "a.shd", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@contextmanager
def no_reader():
    """The writing end of a pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as stream:
        yield stream


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("apply", "model", "a.shd"), 0),
        (("info", "a.shd"), 0),
        (CONVERT, 0),
        ((*CONVERT, "--json"), 0),
        (("convert", "--list"), 0),
        (("info", "--help"), 0),
        (("--help",), 0),
        (("--version",), 0),
        (("verify", "tuned", "a.shd"), 1),
    ],
)
def test_a_closed_pipe_changes_neither_the_work_nor_its_exit_code(folder: Path, arguments: tuple[str, ...], code: int):
    with no_reader() as stdout:
        command = [sys.executable, "-m", "shiradelta", *arguments]
        done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True)
    assert done.returncode == code
    assert "rror" not in done.stderr
    if arguments[0] == "apply":
        assert "exactly a.shd" in run("verify", "model").stdout


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("info a.shd >&-", 0, ""),
        ("info - < a.shd >&-", 0, ""),
        ("info a.shd >&- 2>&-", 0, ""),
        ("info nothing.shd 2>&-", 1, ""),
        ("info - <&-", 2, "error: -: stdin is closed; name a file, or redirect the input (< FILE)"),
        ("convert lora -o - >&-", 2, "error: -o -: stdout is closed; name a file, or redirect the output (> FILE)"),
        pytest.param(
            "info a.shd >/dev/full",
            1,
            "error: [Errno 28] No space left on device: 'stdout'; make room there",
            marks=pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full"),
        ),
    ],
)
def test_a_stream_that_is_closed_or_full_ends_in_a_line(folder: Path, line: str, code: int, said: str):
    command = ["sh", "-c", f"{shlex.quote(sys.executable)} -m shiradelta {line}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (code, said)


@pytest.mark.parametrize(
    "line", ["apply model a.shd -o -", "train model --texts t.jsonl --out=-", "sign a.shd --key k -o -"]
)
def test_nothing_is_made_that_is_called_dash(folder: Path, line: str):
    outcome = run(*line.split())
    assert outcome.exit_code == 2
    assert "- is stdout, to which this command writes no result; give a path." in outcome.stderr
    assert not Path("-").exists()


def test_the_help_says_which_commands_write_to_stdout():
    takes = set()
    for name, command in main.commands.items():
        for option in (parameter for parameter in command.params if parameter.name == "out"):
            if isinstance(option, click.Option):
                assert command.to_stdout == ("stdout" in str(option.help)), name
            takes |= {name} if command.to_stdout else set()
    assert takes == {"convert", "fuse", "report", "recode"}


def test_quiet_prints_errors_warnings_and_json_only(folder: Path):
    quiet = run(*CONVERT, "--quiet")
    assert quiet.stdout == ""
    assert [line.partition(":")[0] for line in quiet.stderr.splitlines()] == ["warning"]
    assert json.loads(run(*CONVERT, "-q", "--json").stdout)["nnz"]
    assert run("verify", "tuned", "a.shd", "-q").exit_code == 1
    assert run("info", "nothing.shd", "-q").stderr.startswith("error: ")


def test_verbose_prints_the_cost_and_the_traceback_of_an_error(folder: Path):
    assert " of memory at most" in run("info", "a.shd", "--verbose").stderr
    assert "Traceback" in run("info", "nothing.shd", "-v").stderr
    assert "Traceback" not in run("info", "nothing.shd").stderr


def test_without_a_terminal_long_work_prints_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys):
    clock = iter([0.0, 0.0, 5.0, 15.0, 20.0, 50.0, 51.0, 90.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress_bar("converting") as step:
        for done in (0, 100, 200, 250):
            step("a\x1b.weight", done, 400)
        step("b", 0, 8)
        step("b", 2, 8)
    assert capsys.readouterr().err.splitlines() == [
        "converting: 100 of 400 (25%), 10 a second, 30 s left; a\\x1b.weight",
        "converting: 250 of 400 (62%), 5.56 a second, 27 s left; a\\x1b.weight",
        "converting: 2 of 8 (25%), 0.0513 a second, 1 min 57 s left; b",
    ]


@contextmanager
def terminal(columns: int):
    """(the device of a terminal, a function that closes it and returns what was written)."""
    controller, device = pty.openpty()
    fcntl.ioctl(device, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    shown: list[bytes] = []

    def read() -> None:
        while True:
            try:
                shown.append(os.read(controller, 1 << 16))
            except OSError:  # the device is closed
                return

    thread = threading.Thread(target=read)
    thread.start()

    def close() -> str:
        os.close(device)
        thread.join()
        return b"".join(shown).decode()

    yield device, close
    os.close(controller)


@pytest.mark.slow
def test_a_terminal_shows_a_bar_with_rate_and_time_left():
    code = (
        "from shiradelta.cli import progress; import time\n"
        "with progress.progress_bar('converting') as step:\n"
        "    for done in range(12): step('[b]a\x1b.weight', done, 12); time.sleep(0.1)\n"
    )
    with terminal(120) as (device, close):
        subprocess.run([sys.executable, "-c", code], stderr=device, env=ENVIRONMENT, check=True)
        shown = close()
    for expected in ("converting", "%", "/s", "left", "0:0", "[b]a\\x1b.weight"):
        assert expected in shown


@pytest.mark.slow
def test_tables_shrink_to_the_terminal(folder: Path):
    for arguments in (("info", "a.shd"), CONVERT, ("convert", "--list"), ("export", "--list")):
        with terminal(40) as (device, close):
            command = [sys.executable, "-m", "shiradelta", *arguments]
            subprocess.run(command, stdout=device, env=ENVIRONMENT, check=True)
            lines = close().splitlines()
        assert max(map(len, lines[:4])) <= 40, lines
