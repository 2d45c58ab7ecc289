"""Commands where a package is missing or this one is not installed: one line, exit code 1, or the work is done."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests import BRIEF
from tests.scenes import contents

ROOT = Path(__file__).parents[2]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
COMMANDS = {
    "version": ["--version"],
    "demo": ["demo"],
    "convert": ["convert", "tuned", "--base", "model", "-o", "out.shd"],
    "zstd": ["convert", "tuned", "--base", "model", "-o", "zstd.shd", "--zstd", "--values", "f32"],
    "plot": ["convert", "tuned", "--base", "model", "-o", "plotted.shd", "--plot", "plot.png"],
    "fit": ["convert", "tuned", "--base", "model", "-o", "fitted.shd", "--fit", "texts.jsonl"],
    "train": ["train", "model", "--texts", "texts.jsonl", "-o", "trained.shd"],
    "train help": ["train", "--help"],
    "apply": ["apply", "model", "a.shd"],
    "verify": ["verify", "model"],
    "list": ["list", "model"],
    "revert": ["revert", "model"],
    "commit": ["commit", "model"],
    "fuse": ["fuse", "a.shd", "b.shd", "-o", "fused.shd"],
    "report": ["report", "a.shd", "b.shd"],
    "page": ["report", "a.shd", "b.shd", "-o", "page.html"],
    "png": ["report", "a.shd", "b.shd", "--png", "heat.png"],
    "export": ["export", "a.shd", "dense", "diff.safetensors"],
    "info": ["info", "a.shd", "--verify"],
    "diff": ["diff", "a.shd", "a.shd"],
    "sign": ["sign", "a.shd", "--key", "private.pem"],
}
if find_spec("cryptography") is None:
    del COMMANDS["sign"]
#: Of RFC 8032, section 7.1.
KEY = "MC4CAQAwBQYDK2VwBCIEIJ1hsZ3v/VpguoRK9JLsLMREScVpezJpGXA7rAMcrn9g"
#: Commands that load torch and transformers.
SLOW = {"fit", "train"}
#: Commands that load matplotlib: on a desk they are run without one other package, in CI without each.
DRAWING = {"plot", "png"}
#: Package -> commands that cannot do without it.
NEEDED: dict[str, set[str]] = {
    "cryptography": {"sign"} & set(COMMANDS),
    "jinja2": {"page"},
    "matplotlib": {"plot", "png"},
    "rich": set(),
    "safetensors": set(),
    "scipy": {"report", "page", "png"},
    "torch": {"fit", "train"},
    "transformers": {"fit", "train"},
    "zstandard": {"zstd"},
}
RUN = """
import importlib.machinery, json, sys

class Without(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == sys.argv[1] else super().find_spec(name, path, target)

sys.meta_path[:] = [Without if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]

from click.testing import CliRunner
from shiradelta.cli import main

results = {}
for name, arguments in json.loads(sys.argv[2]).items():
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    results[name] = result.exit_code, result.stdout, result.stderr
json.dump(results, sys.stdout)
"""


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A working folder with model/, tuned/, a.shd, b.shd and texts."""
    shutil.copytree(made / "bf16", tmp_path / "model")
    shutil.copytree(made / "tuned_a", tmp_path / "tuned")
    shutil.copy(made / "a.shd", tmp_path)
    shutil.copy(made / "b.shd", tmp_path)
    (tmp_path / "private.pem").write_text(f"-----BEGIN PRIVATE KEY-----\n{KEY}\n-----END PRIVATE KEY-----\n")
    (tmp_path / "texts.jsonl").write_text('{"text": "one two three"}\n' * 40)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("package", NEEDED)
def test_a_missing_package_ends_in_one_line(folder: Path, package: str):
    """Everything else works without it."""
    left_out = SLOW | DRAWING if BRIEF and package != "rich" else SLOW
    commands = {name: words for name, words in COMMANDS.items() if name not in left_out - NEEDED[package]}
    arguments = [sys.executable, "-c", RUN, package, json.dumps(commands)]
    done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, (code, stdout, stderr) in json.loads(done.stdout).items():
        if name not in NEEDED[package]:
            assert code == 0, (name, stderr)
            continue
        assert (code, stdout) == (1, ""), name
        assert stderr.count("\n") == 1, (name, stderr)
        assert stderr.startswith("error: "), (name, stderr)
        assert package in stderr, (name, stderr)
        assert "install" in stderr, (name, stderr)


@pytest.mark.slow
def test_a_bare_checkout_works_with_numpy(folder: Path):
    """Neither installed nor built: only the source tree and the packages that it needs are on the path."""
    packages = folder / "packages"
    packages.mkdir()
    for name in ("click", "numpy"):
        spec = find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        place = Path(spec.origin).parent
        (packages / name).symlink_to(place)
        if (libraries := place.with_name(f"{name}.libs")).exists():
            (packages / libraries.name).symlink_to(libraries)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(packages)])}

    def run(*arguments: str) -> str:
        command = [sys.executable, "-S", "-m", "shiradelta", *arguments]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout

    before = contents(folder / "model")
    assert run("--version") == f"shiradelta, version {VERSION}\n"
    run("convert", "tuned", "--base", "model", "-o", "out.shd", "--values", "f32")
    assert f"created_by: shiradelta {VERSION}" in run("info", "out.shd")
    run("apply", "model", "out.shd")
    assert "patched: exactly out.shd at 1" in run("verify", "model")
    run("revert", "model")
    assert contents(folder / "model") == before
