"""What a fit is known to need decides whether it takes one GPU or all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shiradelta.fit import model as fit_model
from shiradelta.nonzeros.vector import BYTES
from tests.fit.test_fit import FEW, encoder, fit  # noqa: F401


@pytest.mark.parametrize(
    ("settings", "begin"),
    [({"mask": "prune"}, 5), ({}, 5), ({"mask": "refit"}, 2), ({"mask": "magnitude"}, 1), ({"method": "refit"}, 1)],
    ids=str,
)
def test_the_need_is_of_weights_changed_weights_and_nonzeros(
    encoder: tuple[Path, Path],  # noqa: F811
    tmp_path: Path,
    settings: dict[str, Any],
    begin: int,
    monkeypatch: pytest.MonkeyPatch,
):
    jobs: list[Any] = []

    def model_of(job: Any) -> Any:
        jobs.append(job)
        raise InterruptedError

    monkeypatch.setattr("shiradelta.fit.subject.model_of", model_of)
    with pytest.raises(InterruptedError):
        fit(encoder, tmp_path / "a.shd", **FEW, mask="prune")
    numel = sum(weight.numel() for weight in load_file(encoder[0] / "model.safetensors").values())
    job = replace(jobs[0], fit=replace(jobs[0].fit, **{"mask": None, **settings}))
    kept = sum(target.count for target in job.targets)
    assert kept == pytest.approx(0.05 * numel, rel=0.05)
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        assert fit_model._need(job, dtype) == 2 * numel * size + begin * kept * BYTES
