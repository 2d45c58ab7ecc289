"""The benchmark of followers: every part is there, and the weights at its end are the trainer's."""

from __future__ import annotations

from pathlib import Path

from benchmarks.follow import PARTS, measured
from shiradelta.chain.stores import FolderStore


def test_every_part_of_every_step_is_timed(tmp_path: Path):
    clock, nonzeros, size = measured(tmp_path, FolderStore(tmp_path / "chain"), 1, 0.001, 2)
    assert [tuple(row) for row in (*clock.wall, *clock.cpu)] == [PARTS] * 6
    assert all(row[part] > 0 for row in clock.wall for part in PARTS if part != "check")  # that is a difference
    assert 1500 < nonzeros < 2700  # a thousandth of 2^21
    assert nonzeros < size < 4 * nonzeros
