"""A model of one small weight, and adapters that add a number to its first element."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import shiradelta as sd
from tests.swapping import adapter


def adding(number: float) -> bytes:
    """A file that adds a number to the first element."""
    return adapter({"w": sd.TensorDelta((4, 3), [0], [number], "float32")}, "f32")


@pytest.fixture
def session() -> tuple[sd.HotSwap, torch.Tensor]:
    """A session with the adapters add1 and add2, and its weight."""
    weight = torch.zeros(4, 3)
    swap = sd.HotSwap({"w": weight})
    for i in (1, 2):
        swap.load(f"add{i}", adding(i))
    return swap, weight


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the adapters add3, add4 and add5."""
    (tmp_path / "adapters").mkdir()
    for i in (3, 4, 5):
        (tmp_path / "adapters" / f"add{i}.shd").write_bytes(adding(i))
    return tmp_path / "adapters"
