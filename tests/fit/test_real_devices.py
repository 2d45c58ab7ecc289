"""A fit and training over real devices: a GPU and the CPU, and two GPUs.

Fits multiply floats as such here.  In TF32, which GPUs have and CPUs have not, they end elsewhere, even on one device:
rounding as it does, on a CPU, halves the distance that least squares leave of the classifier.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from shiradelta.cli import main
from shiradelta.fit import run
from shiradelta.fit.training import FitTrainer
from tests.fit.test_fit import FEW, fit, pair, texts  # noqa: F401

pytestmark = pytest.mark.slow
ONE = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="less than two GPUs")
#: (device, devices) of two fits that are compared.
DEVICES = [
    ("cpu", "cpu,cpu"),
    *(pytest.param("cuda:0", several, marks=ONE) for several in ("cuda:0,cpu", "cpu,cuda:0")),
    *(pytest.param("cuda:0", several, marks=TWO) for several in ("cuda:0,cuda:1", "cuda:1,cuda:0")),
]


@pytest.fixture
def firsts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, list[dict[int, float]]]]:
    """(loss, (position -> gradient) by tensor) of each fit's first step."""
    found: list[tuple[float, list[dict[int, float]]]] = []
    gradient, run_whole = FitTrainer._gradient, run._fit_whole
    begun: list[bool] = []

    def spy(self: Any, batch: list[int]) -> Any:
        loss = gradient(self, batch)
        if begun:
            begun.clear()
            own = self._nonzeros
            pairs = zip(own.by_tensor(own.positions), own.by_tensor(own.grads), strict=True)
            found.append((float(loss), [dict(zip(at.tolist(), g.tolist(), strict=True)) for at, g in pairs]))
        return loss

    def whole(job: Any) -> Any:
        begun.append(True)
        return run_whole(job)

    monkeypatch.setattr(FitTrainer, "_gradient", spy)
    monkeypatch.setattr(run, "_fit_whole", whole)
    monkeypatch.setattr(run, "_tensor_cores", nullcontext)
    return found


@pytest.mark.parametrize(
    ("pair", "settings"),
    [
        ("causal", {"mask": "prune"}),
        ("causal", {"mask": "refit"}),
        ("causal", {"mask": "gradient", "scope": "model"}),
        ("encoder", {"mask": "prune"}),
        ("classifier", {"mask": "refit"}),
    ],
    indirect=["pair"],
    ids=str,
)
@pytest.mark.parametrize(("device", "devices"), DEVICES)
def test_a_model_over_devices_is_fitted_as_on_one(
    pair: tuple[Path, Path],  # noqa: F811
    tmp_path: Path,
    settings: dict[str, Any],
    device: str,
    devices: str,
    firsts: list[tuple[float, list[dict[int, float]]]],
):
    lines: list[str] = []
    one = fit(pair, tmp_path / "one.shd", **FEW, **settings, device=device)
    several = fit(pair, tmp_path / "several.shd", **FEW, **settings, device=devices, log=lines.append)
    homes = devices.split(",")
    spread = ["2 on cpu"] if homes == ["cpu", "cpu"] else [f"1 on {home}" for home in homes]
    assert f"layers of the model: {', '.join(spread)}" in lines
    for state in ("base", "topk"):
        assert getattr(several.fit, state) == pytest.approx(getattr(one.fit, state), rel=1e-4)
    (loss, gradients), (loss_of_several, gradients_of_several) = firsts
    assert loss_of_several == pytest.approx(loss, rel=1e-4)
    for own, others in zip(gradients, gradients_of_several, strict=True):
        common = own.keys() & others.keys()  # which of two equal scores is taken is left to rounding
        assert len(common) >= 0.98 * max(len(own), len(others))
        first, second = (torch.tensor([found[at] for at in sorted(common)]) for found in (own, others))
        assert float((first - second).norm()) <= 1e-3 * float(first.norm())
    # The distance before the first step: of the largest changes, or of what least squares choose by rounded scores.
    within = 1e-4 if settings["mask"] == "prune" else 0.02
    assert several.fit.history[0][1] == pytest.approx(one.fit.history[0][1], rel=within)
    assert several.fit.fitted == pytest.approx(one.fit.fitted, rel=0.05)
    assert several.fit.fitted < several.fit.base
    assert several.nnz == one.nnz


@pytest.mark.parametrize("pair", ["causal"], indirect=True)
@pytest.mark.parametrize(("device", "devices"), DEVICES)
def test_a_model_over_devices_generates(
    pair: tuple[Path, Path],  # noqa: F811
    tmp_path: Path,
    device: str,
    devices: str,
):
    """Each device has samples of its own."""
    examples = [{"prompt": text, "completion": text} for text in texts(32)]
    report = fit(pair, tmp_path / "a.shd", **{**FEW, "texts": examples}, method="refit", generate=8, device=devices)
    assert report.fit.generated == 8
    assert report.fit.fitted < report.fit.base


@pytest.mark.parametrize("pair", ["causal"], indirect=True)
@pytest.mark.parametrize(("device", "devices"), DEVICES)
@pytest.mark.parametrize("mask", ["wm", "grad"])
def test_a_model_over_devices_is_trained_as_on_one(
    pair: tuple[Path, Path],  # noqa: F811
    tmp_path: Path,
    device: str,
    devices: str,
    mask: str,
):
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(60)))
    words = ["train", str(pair[0]), "--texts", str(tmp_path / "texts.jsonl"), "--sparsity", "0.1", "--steps", "20"]
    words += ["--batch", "16", "--mask", mask, "--relative-lr", "0.1", "--json"]
    found = []
    for name, where in (("one", device), ("several", devices)):
        result = CliRunner().invoke(main, [*words, "--device", where, "-o", str(tmp_path / f"{name}.shd")])
        assert result.exit_code == 0, result.output
        found.append(json.loads(result.stdout))
    one, several = found
    assert several["before"] == pytest.approx(one["before"], rel=1e-5)
    for own, others in zip(one["history"][:3], several["history"][:3], strict=True):
        assert others == pytest.approx(own, rel=1e-3)
    assert several["after"] < several["before"]
