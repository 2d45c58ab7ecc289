"""The benchmark of a delta on a new base, on a task small enough for a test."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.quality import new_base
from benchmarks.quality.compare import read
from tests.benchmarks.test_quality import Echo


class Seeded(Echo):
    """An order of its own for each seed, so that two fine-tunes differ."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder.parent / "echo")

    def batches(self, seed: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield self._held_out[torch.randperm(len(self._held_out), generator=generator)[:8]]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_shares_are_of_the_new_bases_own_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(new_base.TASKS, "echo", Seeded)
    (tmp_path / "echo").mkdir()
    options = ["--task", "echo", "--base-task", "echo", "--tuning-steps", "12", "--steps", "12", "--sparsity", "0.05"]
    monkeypatch.setattr(sys, "argv", ["new_base", str(tmp_path), *options])
    new_base.main()
    rows = {row["way"]: row for row in read(tmp_path / "new_base.csv")}
    assert float(rows["the new base"]["kept"]) == 0.0
    assert float(rows["LoRA of the new base, fitted"]["kept"]) == 1.0
    assert rows["moved with --from-base"]["score"] != rows["the old file, as it is"]["score"]
    old, new = ((tmp_path / "new_base" / f"{name}-base" / "model.safetensors").read_bytes() for name in ("old", "new"))
    assert old != new
