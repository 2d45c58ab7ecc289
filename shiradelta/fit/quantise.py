"""The value codecs' rounding in torch, so that values are fitted as they will be read (FORMAT.md, section 8).

Same operations in the same order as `shiradelta.format.codecs.affine`, hence the same bits; a test compares them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from shiradelta.format import registry


class Quantiser:
    """Rounds the values of several tensors that lie one after the other; groups never span two of them."""

    def __init__(self, codec: str, counts: Sequence[int], device: torch.device) -> None:
        self._round = _ROUND[codec]
        group = registry.GROUP
        groups = [-(-count // group) for count in counts]
        rank = torch.arange(sum(counts), device=device)
        padding = torch.tensor([g * group - count for g, count in zip(groups, counts, strict=True)], device=device)
        before = torch.cumsum(padding, 0) - padding
        #: Where each value lies among groups of full size.
        self._slots = rank + before.repeat_interleave(torch.tensor(counts, device=device))
        self._size = sum(groups) * group

    def __call__(self, values: Tensor) -> Tensor:
        """What a reader of the file will see."""
        grouped = torch.full((self._size,), torch.nan, device=values.device)
        grouped[self._slots] = values
        rounded = self._round(grouped.view(-1, registry.GROUP))
        return rounded.view(-1)[self._slots]


def _parameter(values: Tensor) -> Tensor:
    """bf16, as float32 in a column."""
    return values.bfloat16().float().unsqueeze(1)


def _int8(values: Tensor) -> Tensor:
    scale = _parameter(values.abs().nan_to_num(0).amax(1) / 127)
    return scale * torch.where(scale > 0, (values / scale).round().clamp(-127, 127), 0)


def _int4(values: Tensor) -> Tensor:
    magnitude = values.abs()
    least = magnitude.nan_to_num(torch.inf).amin(1)
    lo = _parameter(least)
    step = _parameter(((magnitude.nan_to_num(0).amax(1) - lo[:, 0]) / 7).clamp(min=0))
    code = torch.where(step > 0, ((magnitude - lo) / step).round().clamp(0, 7), 0)
    return torch.copysign(lo + step * code, values)


def _sign(values: Tensor) -> Tensor:
    # Binary64, as the codec sums; the order of so few terms cannot show after rounding to bf16, ties aside.
    return torch.copysign(_parameter(values.abs().double().nanmean(1).float()), values)


_ROUND: dict[str, Callable[[Tensor], Tensor]] = {
    "f32": lambda values: values,
    "f16": lambda values: values.half().float(),
    "bf16": lambda values: values.bfloat16().float(),
    "int8": _int8,
    "int4": _int4,
    "sign": _sign,
}
