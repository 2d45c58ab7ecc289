"""SIGTERM ends a command and leaves no temporary file behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.scenes import contents

pytestmark = pytest.mark.slow

#: Ends itself by SIGTERM at the n-th call that makes a file durable.
RUN = """
import os, signal, sys
from shiradelta.cli import main

calls, real = 0, os.fsync

def fsync(descriptor):
    global calls
    calls += 1
    if calls == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGTERM)
    real(descriptor)

os.fsync = fsync
main(sys.argv[2:])
"""
COMMANDS = {
    "convert": ["convert", "tuned", "--base", "model", "-o", "out.shd"],
    "fuse": ["fuse", "a.shd", "b.shd", "-o", "out.shd"],
    "apply --out": ["apply", "model", "a.shd", "--out", "out"],
    "apply": ["apply", "model", "a.shd"],
}


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGTERM to catch")
@pytest.mark.parametrize("command", COMMANDS)
def test_sigterm_leaves_nothing_behind(made: Path, tmp_path: Path, command: str):
    for name, source in (("model", "bf16"), ("tuned", "tuned_a")):
        shutil.copytree(made / source, tmp_path / name)
    for name in ("a.shd", "b.shd"):
        shutil.copy(made / name, tmp_path)
    before = contents(tmp_path)
    arguments = [sys.executable, "-c", RUN, "1", *COMMANDS[command]]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert contents(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.shd", "b.shd", "model", "tuned"]
    own = tmp_path / "model" / ".shiradelta"
    assert [path.name for path in own.rglob("*") if path.is_file() and path.name != "lock"] == []
