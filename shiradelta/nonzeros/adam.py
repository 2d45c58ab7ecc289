"""Adam on nonzeros where torch's own does not fit: its moments are pruned with them, or its step would prune."""

from __future__ import annotations

import torch
from torch import Tensor

BETAS = (0.9, 0.999)


@torch.no_grad()
def adam_(
    values: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    count: int,
    lr: float,
    units: Tensor | float,
    epsilon: float,
) -> None:
    """Does one step of Adam in place (Kingma and Ba, arXiv:1412.6980, algorithm 1).

    Args:
        values: float32 [n], what is optimised.
        grad: its gradient [n].
        mean: running mean [n] of the gradient; zeros at first.
        square: running mean [n] of the gradient's square; zeros at first.
        count: the number of this step, from 1.
        lr: the learning rate, relative to the units.
        units: what a learning rate of 1 is, [n] or one for all.
        epsilon: added to the root of the square.
    """
    first, second = BETAS
    mean.lerp_(grad, 1 - first)
    square.lerp_(grad.square(), 1 - second)
    root = (square / (1 - second**count)).sqrt_().add_(epsilon)
    values.sub_(units * (mean / root) * (lr / (1 - first**count)))
