"""`shiradelta diff`, and `-` for stdin and stdout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import save_file

import shiradelta
from shiradelta.cli import main

Tensor = shiradelta.TensorDelta


def run(*arguments: str, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(main, arguments, input=stdin, catch_exceptions=False)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    same = Tensor((4, 4), [1, 5], [1.0, 2.0])
    shiradelta.save_delta(
        "a.shd", {"same": same, "w": Tensor((4, 4), [0, 3, 7], [1, 2, 3]), "shape": same}, values="f32"
    )
    other = {"same": same, "w": Tensor((4, 4), [3, 7, 8, 9], [2, 4, 1, 1]), "shape": Tensor((16,), [1], [1])}
    shiradelta.save_delta("b.shd", {**other, "new": same}, values="f32")
    shiradelta.save_delta("z.shd", {"same": same}, values="f16", metadata={"note": "another codec"})
    shiradelta.save_delta("y.shd", {"same": same}, values="f32")
    return tmp_path


def test_differences_are_counted(folder: Path):
    result = run("diff", "a.shd", "b.shd", "--json")
    assert result.exit_code == 1
    found = {each.pop("name"): each for each in json.loads(result.stdout)["tensors"]}
    assert found == {
        "new": {"why": "only in the second", "first": 0, "second": 2, "values": 0},
        "shape": {"why": "shape 4x4 and 16", "first": 2, "second": 1, "values": 0},
        "w": {"why": "", "first": 1, "second": 2, "values": 1},
    }
    assert "a.shd and b.shd differ in 3 of 4 tensors, at 9 elements" in run("diff", "a.shd", "b.shd").stdout


def test_deltas_in_other_codecs_that_change_the_same_do_not_differ(folder: Path):
    result = run("diff", "y.shd", "z.shd")
    assert (result.exit_code, result.stdout) == (0, "y.shd and z.shd change the same: 1 tensor\n")


def test_large_deltas_are_compared_as_plain_arrays_are(folder: Path):
    random = np.random.default_rng(0)
    dense = np.zeros((2, 300_000), np.float32)
    for row, seed in zip(dense, (1, 2), strict=True):
        at = np.random.default_rng(seed).choice(row.size, 150_000, replace=False)
        row[at] = random.integers(1, 3, at.size)
    for name, row in zip("cd", dense, strict=True):
        at = np.flatnonzero(row)
        shiradelta.save_delta(f"{name}.shd", {"w": Tensor((row.size,), at, row[at])}, values="f32")
    (found,) = json.loads(run("diff", "c.shd", "d.shd", "--json").stdout)["tensors"]
    one, other = dense
    assert found["first"] == np.count_nonzero((one != 0) & (other == 0))
    assert found["second"] == np.count_nonzero((one == 0) & (other != 0))
    assert found["values"] == np.count_nonzero((one != other) & (one != 0) & (other != 0))


def test_a_dash_is_stdin_or_stdout(folder: Path):
    assert "stdin: format 1.0" in run("info", "-", stdin=Path("a.shd").read_bytes()).stdout
    fused = run("fuse", "y.shd", "-o", "-")
    assert fused.stderr.startswith("stdout: 1 tensor, 2 nonzeros")
    Path("f.shd").write_bytes(fused.stdout_bytes)
    assert run("diff", "f.shd", "y.shd").exit_code == 0
    page = run("report", "a.shd", "-o", "-")
    assert page.stdout.startswith("<!doctype html>") or page.stdout.lower().startswith("<!doctype")
    assert "tmp" not in page.stderr


def test_a_delta_on_stdin_is_as_good_as_its_file(folder: Path):
    stdin = Path("a.shd").read_bytes()
    (folder / "model").mkdir()
    weights = {name: np.zeros(tensor.shape, np.float32) for name, tensor in shiradelta.open_delta(stdin).items()}
    save_file(weights, "model/model.safetensors")
    base = Path("model/model.safetensors").read_bytes()
    assert "patched" in run("apply", "model", "-", stdin=stdin).stdout
    assert run("verify", "model", "a.shd").stdout.startswith("model: patched: exactly ")
    assert run("verify", "model", "-", stdin=stdin).stdout == run("verify", "model", "a.shd").stdout
    run("revert", "model")
    assert Path("model/model.safetensors").read_bytes() == base
    assert run("diff", "-", "a.shd", stdin=stdin).exit_code == 0
    assert run("export", "-", "dense", "dense.safetensors", stdin=stdin).exit_code == 0
    run("export", "a.shd", "dense", "file.safetensors")
    assert Path("dense.safetensors").read_bytes() == Path("file.safetensors").read_bytes()


def test_bytes_on_stdin_that_are_no_delta_are_refused(folder: Path):
    for command in (["info", "-"], ["apply", ".", "-"], ["diff", "a.shd", "-"], ["export", "-", "dense", "out"]):
        result = run(*command, stdin=b"{}")
        assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
        assert result.stderr.startswith("error: stdin, byte ")
    assert not Path("out").exists()


def test_what_a_file_needs_is_said(folder: Path):
    assert "needs a reader of format 1.0 (shiradelta 0.1.0) or later\n" in run("info", "a.shd").stdout
