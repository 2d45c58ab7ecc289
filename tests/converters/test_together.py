"""Conversions that several processes make together: the file of one process, byte for byte, or none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

import shiradelta as sd
from shiradelta.errors import ArgumentError, ShiraDeltaError
from tests.ranks import run

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("torch has no gloo here", allow_module_level=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """base.safetensors; tuned.safetensors, of five tensors, two of which differ; broken.safetensors has a NaN."""
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(40, 30, generator=generator) for name in "abcde"}
    tuned = {
        name: one + 0.1 * (torch.rand(40, 30, generator=generator) < 0.02) * (name in "bd")
        for name, one in base.items()
    }
    broken = {**tuned, "d": tuned["d"].clone().index_fill_(0, torch.tensor([3]), float("nan"))}
    for name, tensors in (("base", base), ("tuned", tuned), ("broken", broken)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    return tmp_path


def together(rank: int, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    source, base = folder / "tuned.safetensors", folder / "base.safetensors"
    return sd.convert(source, folder / "some.shd", base=base, group=dist.group.WORLD, **options).as_dict()


@pytest.mark.slow  # a group of processes takes seconds to begin
@pytest.mark.parametrize(
    ("count", "options"),
    [(2, {"sparsity": 0.01}), (4, {"sparsity": 0.02, "zstd": True, "scope": "model"}), (2, {"target_size": "1KB"})],
)
def test_the_file_is_that_of_one_process(folder: Path, count: int, options: dict[str, Any]):
    """Of four processes, some have no tensor that differs."""
    one = sd.convert(folder / "tuned.safetensors", folder / "one.shd", base=folder / "base.safetensors", **options)
    for report in run(together, count, folder, folder, options):
        assert {**report, "out": ""} == {**one.as_dict(), "out": ""}
    assert (folder / "some.shd").read_bytes() == (folder / "one.shd").read_bytes()


def refused(rank: int, folder: Path) -> list[str]:
    said = []
    for source, options in (("broken", {}), ("tuned", {"lossless": True}), ("base", {})):
        files = folder / f"{source}.safetensors", folder / "some.shd"
        with pytest.raises(ShiraDeltaError) as caught:
            sd.convert(*files, base=folder / "base.safetensors", group=dist.group.WORLD, **options)
        said.append(str(caught.value))
    return said


@pytest.mark.slow  # as above
def test_where_one_process_refuses_there_is_no_file(folder: Path):
    """Tensor d, with the NaN, is that of the second process."""
    one, two = run(refused, 2, folder, folder)
    assert "'d'" in two[0]
    assert one[0].startswith("rank 1 of 2 could not convert its part: SourceError: ")
    assert two[0] in one[0]
    assert "is for one process" in one[1]
    assert one[1] == two[1]
    assert one[2] == two[2]
    assert not (folder / "some.shd").exists()


@pytest.mark.slow  # as above
def test_the_command_in_the_processes_of_torchrun(folder: Path):
    base, tuned = (str(folder / f"{name}.safetensors") for name in ("base", "tuned"))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "-m",
        "shiradelta",
        "convert",
        tuned,
    ]
    done = subprocess.run(
        [*command, "--base", base, "-o", str(folder / "some.shd")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("tensors converted") == 1
    sd.convert(tuned, folder / "one.shd", base=base)
    assert (folder / "some.shd").read_bytes() == (folder / "one.shd").read_bytes()
    done = subprocess.run([*command, "--base", base, "-o", "-"], capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "-o - is for one process" in done.stderr
    assert done.stdout == ""


def test_what_is_no_group_is_refused(folder: Path):
    with pytest.raises(ArgumentError, match="'all' is no process group"):
        sd.convert(folder / "tuned.safetensors", folder / "some.shd", base=folder / "base.safetensors", group="all")
