"""The benchmark of families, with a model and tasks small enough for a test."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import experts
from benchmarks.quality import small


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_method_has_a_row_and_training_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("sklearn")
    words = {"words": lambda number: f"w{number}", "digits": lambda number: f"{number} {number + 1}"}
    pairs: dict[str, Any] = {
        name: [(word(number), word(number).upper() + "!") for number in range(60)] for name, word in words.items()
    }
    monkeypatch.setattr(experts, "TASKS", dict.fromkeys(pairs))
    monkeypatch.setattr(experts, "load", lambda task, held_out: (pairs[task], [], pairs[task]))
    monkeypatch.setattr(experts, "TIMED", 2)
    monkeypatch.setattr(small, "PRETRAINING_STEPS", 2)
    monkeypatch.setattr(small, "FILES", 20)
    monkeypatch.setattr(small, "HELD_OUT", 8)
    options = ["--examples", "30", "--items", "4", "--steps", "20", "--experts", "2", "--seeds", "1"]
    monkeypatch.setattr(sys, "argv", ["experts", str(tmp_path), "--sparsity", "0.05", *options])
    experts.main()
    with open(tmp_path / "experts.csv", encoding="utf-8", newline="") as stream:
        rows = {row["method"]: row for row in csv.DictReader(stream)}
    assert len(rows) == 7
    for name, row in rows.items():
        if name != "base model":
            assert float(row["words"]) < float(rows["base model"]["words"]), name
