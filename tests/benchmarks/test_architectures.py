"""The matrix of architectures: its judge finds what is wrong, and its cells end as they have to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.architectures import cells, judge
from benchmarks.architectures.cells import Outcome
from benchmarks.architectures.columns import COLUMNS, Case, NotApplicableError
from benchmarks.architectures.rows import ROWS
from shiradelta import SourceError

pytestmark = pytest.mark.slow


def test_there_are_sixty_architectures_of_transformers():
    assert sum(row.needs == ("transformers",) for row in ROWS.values()) >= 60


@pytest.mark.filterwarnings("ignore")  # of PEFT and transformers about each other
@pytest.mark.parametrize("column", COLUMNS)
def test_a_llama_is_right_in_every_column(column: str, tmp_path: Path):
    case = Case(ROWS["llama"], tmp_path)
    cell = cells.run("llama", column, lambda: COLUMNS[column](case), tmp_path)
    wanted = Outcome.NOT_APPLICABLE if column == "lora-experts" else Outcome.RIGHT
    assert cell.outcome is wanted, cell.text


def test_a_lost_tensor_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    case = Case(ROWS["llama"], tmp_path)
    monkeypatch.setattr(case, "full_delta", case.convert(case.tuned, "half", sparsity=0.5))
    cell = cells.run("llama", "full", lambda: COLUMNS["full"](case), tmp_path)
    assert cell.outcome is Outcome.WRONG
    assert "tensors are not the fine-tune's" in cell.text


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (SourceError("no"), Outcome.REFUSED),
        (NotApplicableError("no"), Outcome.NOT_APPLICABLE),
        (judge.WrongError("no"), Outcome.WRONG),
        (KeyError("no"), Outcome.TRACEBACK),
    ],
)
def test_errors_have_their_outcomes(error: Exception, outcome: Outcome, tmp_path: Path):
    def work() -> None:
        raise error

    cell = cells.run("row", "column", work, tmp_path)
    assert cell.outcome is outcome
    assert (outcome in cells.FORBIDDEN) == (outcome in ("WRONG", "traceback"))
    assert cell.label == outcome
    assert replace(cell, reason="because").label == f"{outcome}*"


def test_the_judge_sees_bits_and_directions():
    base, tuned = {"a": torch.zeros(200)}, {"a": torch.randn(200)}
    judge.check_equal(tuned, {"a": tuned["a"].clone()}, "the fine-tune's")
    judge.check_close({"a": tuned["a"] + 1e-6}, tuned, "the merge")
    judge.check_direction({"a": tuned["a"] * 0.5}, tuned, base, 100)
    with pytest.raises(judge.WrongError, match=r"1 of 1 tensors are not the base's: a"):
        judge.check_equal({"a": -base["a"]}, base, "the base's")
    with pytest.raises(judge.WrongError, match="1 of them still the base's"):
        judge.check_close(base, tuned, "the merge", base)
    with pytest.raises(judge.WrongError, match="1 lost, 0 new"):
        judge.check_equal({}, tuned, "the fine-tune's")
    with pytest.raises(judge.WrongError, match="still the base's"):
        judge.check_direction(base, tuned, base, 100)
    with pytest.raises(judge.WrongError, match="moved elsewhere"):
        judge.check_direction({"a": -tuned["a"]}, tuned, base, 100)
    with pytest.raises(judge.WrongError, match=r"outputs are 1 from the fine-tune's, the base's 0\.25"):
        judge.check_closer([torch.zeros(4)], [torch.full((4,), 2.0)], [torch.ones(4)])
