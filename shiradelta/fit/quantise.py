"""Rounds values in torch as a codec stores them, so that values are fitted as they will be read (FORMAT.md, 8)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shiradelta.errors import ArgumentError
from shiradelta.format import registry
from shiradelta.format.codecs import VALUE_OPTIONS
from shiradelta.format.codecs.base import TorchRounder


class Quantiser:
    """Rounds the values of several tensors that lie one after the other; groups never span two of them.

    Args:
        codec: what the values will be stored in, as a user names it ("int4").
        counts: values of each tensor.
        device: where the values are.
        order: indices of the values tensor by tensor, as the file has them; None if they lie so.  Others become zero.

    Raises:
        ArgumentError: an unknown codec, or a codec whose rounding torch does not know.
    """

    def __init__(self, codec: str, counts: Sequence[int], device: torch.device, order: Tensor | None = None) -> None:
        self._round = rounder(codec).round_torch
        group = registry.GROUP
        groups = [-(-count // group) for count in counts]
        rank = torch.arange(sum(counts), device=device)
        padding = torch.tensor([g * group - count for g, count in zip(groups, counts, strict=True)], device=device)
        before = torch.cumsum(padding, 0) - padding
        #: The index of each value among groups of full size.
        self._slots = rank + before.repeat_interleave(torch.tensor(counts, device=device))
        self._size, self._order = sum(groups) * group, order

    def __call__(self, values: Tensor) -> Tensor:
        """Rounds the values as a reader of the file will see them."""
        grouped = torch.full((self._size,), torch.nan, device=values.device)
        grouped[self._slots] = values if self._order is None else values[self._order]
        rounded = self._round(grouped.view(-1, registry.GROUP)).view(-1)[self._slots]
        if self._order is None:
            return rounded
        return torch.zeros_like(values).index_copy_(0, self._order, rounded)


def rounder(option: str) -> TorchRounder:
    """The codec of an option, if values can be fitted to it.

    Raises:
        ArgumentError: an unknown codec, or a codec whose rounding torch does not know.
    """
    codec = VALUE_OPTIONS.find(option)
    if not isinstance(codec, TorchRounder):
        known = ", ".join(name for name, other in VALUE_OPTIONS.items() if isinstance(other, TorchRounder))
        raise ArgumentError(f"value codec {codec.name} cannot be fitted, as it has no round_torch; take {known}")
    return codec
