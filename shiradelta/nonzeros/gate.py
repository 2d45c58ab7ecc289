"""Values behind a learnt gate: the change of a weight is one number times the values, as ReZero does for layers."""

from __future__ import annotations

import torch
from torch import Tensor

from shiradelta.nonzeros.scaling import Scaling

#: The gate before training: so small that random values behind it change next to nothing (RIGSA, arXiv:2511.01794).
GATE = 1e-6


class Gate(Scaling):
    """The gate of one weight; the scales are the gate itself, [1].

    Args:
        device: where the values are.
    """

    name = "gate"

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def start(self) -> Tensor:
        """`GATE`."""
        return torch.full((1,), GATE, dtype=torch.float32, device=self._device)

    @property
    def unit(self) -> float:
        """A tenth, since values are as large as the weights, and a change is rarely larger than a tenth of them."""
        return 0.1

    def changes(self, values: Tensor, scales: Tensor) -> Tensor:
        """Gate times values."""
        return scales * values

    def move(self, weight: Tensor) -> None:
        """Does nothing: the gate is the same for all nonzeros."""

    def scales_at(self, values: Tensor) -> Tensor:
        """An open gate."""
        return torch.ones(1, dtype=torch.float32, device=values.device)
