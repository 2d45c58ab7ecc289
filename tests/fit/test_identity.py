"""An interrupted run is recognised by what its result depends on; runs of 0.1, too."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace as Fields
from typing import Any

import pytest

from shiradelta.fit.by_training import _identity
from shiradelta.fit.choices import MASKS
from shiradelta.fit.settings import Fit

SETTINGS: dict[str, Any] = {"steps": 40, "batch": 16, "micro": 8, "relative_lr": 0.05, "tokens": 32, "seed": 7}


def digest(old: Path | None = None, **settings: Any) -> str:
    fit = Fit(["one", "two"], **{**SETTINGS, **settings})
    folder = Path("/models")
    job: Any = Fields(
        fit=fit,
        base=folder / "base",
        source=folder / "tuned",
        codec="int4",
        whole_model=False,
        old=None if old is None else Fields(root=old),
    )
    targets = [Fields(name="a.weight", count=12), Fields(name="b.weight", count=3)]
    texts = Fields(train=[5, 2], identity=fit.texts)
    subject: Any = Fields(fitted=Fields(targets=targets, energy=[2.5, 0.125]), micro=fit.per_pass, texts=texts)
    return hashlib.sha256(json.dumps(_identity(job, subject)).encode()).hexdigest()


def test_the_identity_is_that_of_0_1():
    """Recorded with 0.1, where the mask was called "falling"."""
    assert digest(mask="prune") == "250710123d3a3ec3f6683f6cac5760427f7aa654d952f8c2a2fcdc08b74ef5be"


def test_each_mask_is_another_run():
    """And so is that without one, which chooses between two of them."""
    assert len({digest(mask=mask) for mask in (None, *MASKS)}) == len(MASKS) + 1


@pytest.mark.parametrize("setting", SETTINGS)
def test_each_setting_is_another_run(setting: str):
    assert digest(**{setting: 2 * SETTINGS[setting]}) != digest()


def test_generated_texts_and_another_old_base_make_another_run():
    found = [digest(), digest(generate=5), digest(generate=6), digest(Path("/models/a")), digest(Path("/models/b"))]
    assert len(set(found)) == 5
