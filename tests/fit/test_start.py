"""Training that starts from least squares."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import shiradelta
from shiradelta.errors import DivergedError
from shiradelta.fit import by_training
from shiradelta.fit.fitted import FitJob
from shiradelta.fit.refit.least_squares import refit as least_squares
from shiradelta.fit.refit.whole import solve
from shiradelta.fit.subject import Subject
from shiradelta.fit.training import FitTrainer
from shiradelta.models.loading import load_tokenizer
from shiradelta.nonzeros.vector import Nonzeros
from tests.fit.test_fit import SETTINGS, encoder, fit, stopping  # noqa: F401  (the fixture)


@pytest.mark.slow
def test_training_that_does_not_help_leaves_least_squares(encoder: tuple[Path, Path], tmp_path: Path):  # noqa: F811
    """With so large a rate that every step makes it worse."""
    alone = fit(encoder, tmp_path / "a.shd", method="refit")
    trained = fit(encoder, tmp_path / "b.shd", steps=2, relative_lr=1e4)
    assert trained.fit.steps == 2
    assert trained.fit.metadata["fit_mask"] == "refit"
    assert "fit_mask" not in alone.fit.metadata
    assert trained.fit.fitted == pytest.approx(alone.fit.fitted)
    with shiradelta.open_delta(tmp_path / "a.shd") as one, shiradelta.open_delta(tmp_path / "b.shd") as other:
        for name, tensor in one.items():
            assert tensor.positions().tolist() == other[name].positions().tolist()


@pytest.mark.slow
def test_training_helps(encoder: tuple[Path, Path], tmp_path: Path):  # noqa: F811
    alone = fit(encoder, tmp_path / "a.shd", method="refit")
    trained = fit(encoder, tmp_path / "b.shd", steps=by_training.REFIT_STEPS, relative_lr=None)
    assert trained.fit.fitted < 0.97 * alone.fit.fitted


@pytest.mark.slow
def test_a_slow_processor_is_left_at_least_squares(
    encoder: tuple[Path, Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(by_training, "CPU_MOST", 0.0)
    said: list[str] = []
    report = fit(encoder, tmp_path / "a.shd", steps=None, log=said.append)
    assert report.fit.steps == 0
    assert report.fit.as_dict()["mask"] == ""
    assert any("--fit-steps" in line and "trains them all the same" in line for line in said)
    assert report.fit.fitted < report.fit.topk


@pytest.mark.slow
@pytest.mark.parametrize(
    ("left", "asked", "starts"), [(0.0, None, "prune"), (1.0, None, "refit"), (0.0, "refit", "refit")]
)
def test_where_least_squares_leave_much_it_starts_from_the_largest_changes(
    encoder: tuple[Path, Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    left: float,
    asked: str | None,
    starts: str,
):
    """And an interrupted run goes on with what it started from."""
    monkeypatch.setattr("shiradelta.nonzeros.unfinished.SAVE_EVERY", 0)
    monkeypatch.setattr(by_training, "PRUNE_STEPS", 40)
    monkeypatch.setattr(by_training, "LEFT", left)
    monkeypatch.setattr(by_training, "REFIT_STEPS", 1)
    said: list[str] = []
    settings = {"relative_lr": None, "log": said.append}
    fit(encoder, tmp_path / "wanted.shd", mask=asked, **settings)
    assert any("largest changes" in line for line in said) is (starts != "refit")
    said.clear()
    with monkeypatch.context() as patched:
        patched.setattr(FitTrainer, "_evaluate", stopping(FitTrainer._evaluate, 27))
        with pytest.raises(KeyboardInterrupt):
            fit(encoder, tmp_path / "a.shd", mask=asked, **settings)
    assert any("largest changes" in line for line in said) is (starts != "refit")
    fit(encoder, tmp_path / "a.shd", mask=asked, **settings)
    assert any("going on from step 28" in line for line in said)
    assert (tmp_path / "a.shd").read_bytes() == (tmp_path / "wanted.shd").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("asked", [None, "refit"])
def test_where_least_squares_give_nan_it_starts_from_the_largest_changes(
    encoder: tuple[Path, Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: str | None,
):
    """But not where they are asked for."""

    def spoilt(job: FitJob, subject: Subject, nonzeros: Nonzeros) -> list[int]:
        left = solve(job, subject, nonzeros)
        nonzeros.values[0][3] = torch.nan
        return left

    monkeypatch.setattr(by_training, "PRUNE_STEPS", 40)
    monkeypatch.setattr(by_training, "REFIT_STEPS", 1)
    monkeypatch.setattr(by_training, "solve", spoilt)
    said: list[str] = []
    if asked is not None:
        with pytest.raises(DivergedError):
            fit(encoder, tmp_path / "a.shd", mask=asked, relative_lr=None)
        return
    fit(encoder, tmp_path / "a.shd", relative_lr=None, log=said.append)
    assert said[0] == "least squares give NaN, so training starts from the largest changes"
    asked_for = fit(encoder, tmp_path / "b.shd", relative_lr=None, mask="prune").fit
    assert asked_for.metadata["fit_mask"] == "prune"
    assert (tmp_path / "a.shd").read_bytes() == (tmp_path / "b.shd").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("asked", [None, "prune"])
@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_where_the_largest_changes_end_worse_least_squares_are_the_result(
    encoder: tuple[Path, Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: str | None,
    scope: str,
):
    """But not where the largest changes are asked for."""
    monkeypatch.setattr(by_training, "PRUNE_STEPS", 40)
    monkeypatch.setattr(by_training, "REFIT_STEPS", 1)
    monkeypatch.setattr(by_training, "LEFT", 0.0)
    alone = fit(encoder, tmp_path / "a.shd", method="refit", scope=scope).fit
    found = fit(encoder, tmp_path / "b.shd", mask=asked, relative_lr=3.0, scope=scope).fit
    assert (by_training.WORSE in found.warnings) is (asked is None)
    assert found.mask == (asked or "refit")
    assert (found.fitted == pytest.approx(alone.fitted)) is (asked is None)


class Changed:
    """Within, a layer has other weights."""

    def __init__(self, layer: torch.nn.Linear, change: torch.Tensor) -> None:
        self._layer, self._change = layer, change

    def __enter__(self) -> None:
        self._layer.weight.data += self._change

    def __exit__(self, *error: object) -> None:
        self._layer.weight.data -= self._change


@pytest.mark.parametrize(("weight", "same"), [(0.0, True), (1.0, False)])
def test_statistics_count_by_weight(weight: float, same: bool):
    """A row of weight 0 has no influence, whatever it holds."""
    torch.manual_seed(0)
    layer, change, rows = torch.nn.Linear(6, 4, bias=False).requires_grad_(False), torch.randn(4, 6), torch.randn(8, 6)
    counts = torch.tensor([*[1.0] * 7, weight])
    found = []
    for _ in range(2):
        nonzeros = Nonzeros([layer.weight], [torch.float32], [torch.arange(5)])
        teacher = partial(Changed, layer, change)
        inputs = rows.clone()
        least_squares(
            [layer],
            partial(_apply, layer, inputs),
            teacher,
            nonzeros,
            lambda of: lambda v: v,
            [[0]],
            lambda part, rows: counts,
        )
        found.append(nonzeros.values[0].clone())
        rows[-1] *= 50
    assert torch.allclose(*found, atol=1e-4) is same


def _apply(layer: torch.nn.Linear, inputs: torch.Tensor, part: Any) -> torch.Tensor:
    return layer(inputs)


def test_weights_of_tokens(encoder: tuple[Path, Path]):  # noqa: F811
    """Padding has none."""
    from transformers import BertModel

    from shiradelta.fit.text_behaviour import TextBehaviour
    from shiradelta.text.read import read_list

    model = BertModel.from_pretrained(encoder[0])
    texts = [str(SETTINGS.texts[0]), " ".join(str(text) for text in SETTINGS.texts[:2])]
    behaviour = TextBehaviour(load_tokenizer(encoder[0], encoder[1]), read_list(texts), model, 64)
    short, long = behaviour.lengths
    assert short < long
    weights = behaviour.token_weights([0, 1], 2 * long)
    assert weights is not None
    assert weights.tolist() == [1.0] * short + [0.0] * (long - short) + [1.0] * long
