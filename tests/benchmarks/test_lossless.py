"""`benchmarks.lossless`: every way gives the step back, or the table is not made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.lossless import __main__ as command
from benchmarks.lossless.steps import State, bits, floor
from benchmarks.lossless.ways import ON_BASE, PLAIN, Way, compared


@pytest.fixture
def step() -> tuple[State, State]:
    torch.manual_seed(0)
    base = {"w": (torch.randn(320, 320) * 0.02).bfloat16(), "b": torch.randn(64).bfloat16()}
    tuned = {name: (tensor.float() + 2e-5 * torch.randn(tensor.shape)).bfloat16() for name, tensor in base.items()}
    return base, tuned


def test_the_table_has_every_way(step: tuple[State, State], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "peers", lambda *_: ["peer: is not installed"])
    rows = {row["way"]: row for row in command.compare("a step", *step, 1, all_of_them=True)}
    assert {PLAIN, ON_BASE, "shd, zstd", "zstd-19 of the XOR", "peer: is not installed"} <= set(rows)
    least, changed = floor(*step)
    assert rows[PLAIN]["floor"] == pytest.approx(8 * rows[PLAIN]["bytes"] / least)
    assert rows[PLAIN]["bits"] == pytest.approx(8 * rows[PLAIN]["bytes"] / changed)
    assert rows[ON_BASE]["bytes"] < rows[PLAIN]["bytes"] < rows["zstd-19 of the XOR"]["bytes"]
    assert list(tmp_path.iterdir()) == []
    command.write_csv(tmp_path, list(rows.values()))
    command.write_csv(tmp_path, list(rows.values()))
    assert len((tmp_path / "lossless.csv").read_text().splitlines()) == 1 + 2 * len(rows)


def test_a_way_that_gives_other_weights_is_refused(step: tuple[State, State]):
    _, tuned = step
    off = {name: tensor.clone() for name, tensor in tuned.items()}
    bits(off["b"])[5] ^= 1
    right, wrong = Way("right", lambda: b"", len, lambda _: tuned), Way("wrong", lambda: b"", len, lambda _: off)
    assert [name for name, _ in compared([right], tuned, 2)] == ["right"]
    with pytest.raises(AssertionError, match="wrong: 1 elements differ"):
        list(compared([right, wrong], tuned, 1))
