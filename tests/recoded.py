"""A delta that is read with its base only, beside that base."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

import shiradelta as sd


def write_small(place: Path) -> Path:
    """Writes the folder `base` and small.shd, whose one tensor moves the base's small elements; returns the file."""
    torch.manual_seed(0)
    base = (torch.randn(64, 48) * 0.02).bfloat16()
    small = base.abs() < base.abs().median()
    after = torch.where(small, (base.float() * 1.01).bfloat16(), base)
    for name, weight in (("base", base), ("after", after)):
        (place / name).mkdir()
        save_file({"w": weight}, place / name / "model.safetensors")
    sd.convert(place / "after", place / "small.shd", base=place / "base", lossless=True, context="base")
    return place / "small.shd"
