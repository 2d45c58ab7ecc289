"""Features of examples: the gradients of a base delta's nonzeros, scaled as Adam scales them, and projected.

ELREA projects with a dense random matrix, which for n nonzeros takes n x dims random numbers and operations.  Here each
nonzero has one random dimension and one random sign (a count sketch).  Inner products stay the same in expectation,
with about the same variance, and a projection takes n operations: 8,192 times fewer.  Dimensions and signs are made
of the seed and the tensor's name, in blocks; the matrix is never held.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shiradelta.experts.gradients import NonzeroGradients
from shiradelta.format.arithmetic import Array, Float32
from shiradelta.train.gradients import Loss
from shiradelta.util.progress import Progress

#: Dimensions of projected gradients, as in the paper.
DIMS = 8192
#: The exponent of a scale that stands for a factor of zero.
ZERO = -128
#: Adam's epsilon, which bounds the scales.
EPSILON = 1e-8
#: Random numbers that are made at a time.
_BLOCK = 1 << 20


class Sketch:
    """Projects scaled gradients of nonzeros.

    Args:
        gradients: where the nonzeros are.
        scales: of each of the file's tensors, as `ExpertFamily.scales`.
        dims: dimensions to project to.
        seed: of the projection.
    """

    def __init__(self, gradients: NonzeroGradients, scales: Mapping[str, Array], dims: int, seed: int) -> None:
        self.gradients, self.dims = gradients, dims
        # Device -> (numbers of its pieces; of their nonzeros, one after the other, dimensions and factors).
        self._on: dict[torch.device, tuple[list[int], Tensor, Tensor]] = {}
        random = {name: _random(name, count, dims, seed) for name, count in gradients.counts.items()}
        parts: dict[torch.device, list[tuple[int, Array, Float32]]] = {}
        for number, piece in enumerate(gradients.pieces):
            order = piece.order.numpy()
            targets, signs = random[piece.tensor]
            exponents = scales[piece.tensor][order]
            powers = np.where(exponents == ZERO, 0, np.ldexp(np.float32(1), exponents.astype(np.int32)))
            part = number, targets[order], (powers * signs[order]).astype(np.float32)
            parts.setdefault(piece.positions.device, []).append(part)
        for device, own in parts.items():
            dimensions, factors = (np.concatenate([part[column] for part in own]) for column in (1, 2))
            self._on[device] = (
                [number for number, *_ in own],
                torch.from_numpy(dimensions).to(device),
                torch.from_numpy(factors).to(device),
            )

    def project(self, gradients: Sequence[Tensor]) -> Float32:
        """float32 [dims], of length 1, or zero."""
        total = torch.zeros(self.dims, dtype=torch.float32)
        for device, (numbers, targets, factors) in self._on.items():
            scaled = torch.cat([gradients[number] for number in numbers]) * factors
            total += torch.zeros(self.dims, dtype=torch.float32, device=device).index_add_(0, targets, scaled).cpu()
        return unit(total.numpy())

    def features(self, examples: Sequence[Any], loss: Loss, progress: Progress, batch: int = 1) -> Float32:
        """Projects the gradient of each example's loss: float32 [examples, dims], of length 1; `batch` run together."""
        found = np.zeros((len(examples), self.dims), np.float32)

        def take(number: int, gradients: list[Tensor]) -> None:
            found[number] = self.project(gradients)

        self.gradients.each(examples, loss, take, progress, "gradients of examples", batch)
        return found


def adam_scales(
    gradients: NonzeroGradients, examples: Sequence[Any], loss: Loss, progress: Progress, batch: int = 1
) -> dict[str, Array]:
    """What Adam would multiply gradients by, 1 / (sqrt(v) + 1e-8), as exponents of two.

    v is the mean of the squared gradients over examples: where weights stay, the second moment that Adam approaches.

    Returns:
        The file's tensors -> int8 [nonzeros]; `ZERO` where no example has a gradient.
    """
    sums = [torch.zeros_like(piece.positions, dtype=torch.float32) for piece in gradients.pieces]

    def take(number: int, found: list[Tensor]) -> None:
        for total, gradient in zip(sums, found, strict=True):
            total.addcmul_(gradient, gradient)

    gradients.each(examples, loss, take, progress, "scales of gradients", batch)
    result = {name: np.full(count, ZERO, np.int8) for name, count in gradients.counts.items()}
    for piece, total in zip(gradients.pieces, sums, strict=True):
        moment = (total / len(examples)).sqrt().cpu()
        exponents = torch.where(moment > 0, -(moment + EPSILON).log2().round(), ZERO)
        result[piece.tensor][piece.order.numpy()] = exponents.clamp(ZERO, 127).to(torch.int8).numpy()
    return result


def unit(vectors: Float32) -> Float32:
    """Vectors in the last dimension, of length 1; zero stays zero."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32)


def _random(name: str, count: int, dims: int, seed: int) -> tuple[Array, Float32]:
    """(dimension of each nonzero of a tensor, int32; its sign, float32), the same on every machine."""
    key = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:16], "little")
    generator = np.random.Philox(key=key)
    targets, signs = np.empty(count, np.int32), np.empty(count, np.float32)
    for start in range(0, count, _BLOCK):
        stop = min(count, start + _BLOCK)
        raw = generator.random_raw(stop - start)
        targets[start:stop] = ((raw >> np.uint64(32)) * np.uint64(dims)) >> np.uint64(32)
        signs[start:stop] = (raw & np.uint64(1)).astype(np.float32) * 2 - 1
    return targets, signs
