"""The sparsity that keeps a share of the fine-tune's gain."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
from click.testing import CliRunner
from shiradelta.converters.aim_kept import LEAST, MOST, find_kept

import shiradelta
from shiradelta.cli import main
from shiradelta.errors import ArgumentError, SourceError
from shiradelta.fit import Fit
from shiradelta.fit.fitted import Fitted
from shiradelta.fit.gain import Gain, Share


def fitted(kept: float | None) -> Fitted:
    shares = {} if kept is None else {"topk": Share(0, 0.01), "fitted": Share(kept, 0.01)}
    losses = {"base": 3.0, "tuned": 2.0, "topk": 3.0, "fitted": 3.0}
    return Fitted({}, "nats", 1, 1, gain=Gain("nats", True, 20, losses, shares, ()))


@pytest.mark.parametrize("needed", [0.0005, 0.0012, 0.004, 0.0099, 0.01, 0.013, 0.1, 0.37])
def test_the_least_sparsity_is_found_to_a_tenth(needed: float):
    tried: list[float] = []
    told: list[str] = []

    def fit(sparsity: float) -> Fitted:
        tried.append(sparsity)
        return fitted(min(1.0, 0.95 * sparsity / needed))

    sparsity, found = find_kept(0.95, fit, told.append)
    assert max(needed, LEAST) <= sparsity * (1 + 1e-9)
    assert sparsity <= max(1.1 * needed, LEAST)
    assert [trial for trial, *_ in found.trials] == tried
    assert len(tried) == len(told) <= 11
    assert found.gain is not None
    assert found.gain.kept is not None
    assert found.gain.kept.kept >= 0.95
    assert "trial 1: a sparsity of 1% keeps" in told[0]


def test_what_cannot_be_kept_is_an_error():
    with pytest.raises(
        SourceError, match=r"no sparsity up to 50% keeps 95% of the fine-tune's gain, the most was 47.5%"
    ):
        find_kept(0.95, lambda sparsity: fitted(0.95 * sparsity / MOST / 2), lambda line: None)
    with pytest.raises(SourceError, match="can be aimed at, as the fine-tune gains nothing on 20 examples"):
        find_kept(0.95, lambda sparsity: fitted(None), lambda line: None)
    with pytest.raises(SourceError, match="can be aimed at, as the examples tell no loss"):
        find_kept(0.95, lambda sparsity: Fitted({}, "nats", 1, 1), lambda line: None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_kept": 0.9}, "known only of a fit; give --fit"),
        ({"target_kept": 0.9, "sparsity": 0.1, "fit": Fit(["a"] * 20)}, "exclude each other"),
        ({"target_kept": 1.1, "fit": Fit(["a"] * 20)}, "a share of 1.1 of the gain is out of range"),
    ],
)
def test_arguments_that_cannot_be(arguments: dict[str, Any], message: str, made: Path, tmp_path: Path):
    with pytest.raises(ArgumentError, match=message):
        shiradelta.convert(made / "tuned_a", tmp_path / "a.shd", base=made / "bf16", **arguments)


def test_the_command_finds_it(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each trial is a fit with so many weights, and the file has those of the least sparsity."""
    from shiradelta.converters import fitting

    counts: list[int] = []

    def fit(settings: Fit, source: Any, kept: Any, *others: Any) -> Fitted:
        counts.append(sum(kept.values()))
        return fitted(0.9 * sum(kept.values()) / 1_000)

    monkeypatch.setattr(fitting, "run_fit", fit)
    words = ["convert", made / "tuned_a", "--base", made / "bf16", "--fit", "a.jsonl", "--target-kept", "90%"]
    result = CliRunner().invoke(main, [*map(str, words), "-o", str(tmp_path / "a.shd")])
    assert result.exit_code == 0, result.output
    assert "share of the fine-tune's gain" in result.stdout
    least = min(count for count in counts if count >= 1_000)
    with shiradelta.open_delta(tmp_path / "a.shd") as delta:
        assert sum(tensor.nnz for tensor in delta.values()) == pytest.approx(least, abs=cast(int, len(delta)))
