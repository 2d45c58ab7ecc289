"""What a processor makes of examples, kept for the next pass over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

#: Memory for what is kept of all examples, in bytes: 1,585 pictures of 336 x 336.  Others are made in every pass.
MOST_BYTES = 2 << 30

#: What a processor gives by name; of one example, tensors have 1 as their first size, or as many rows as it has pieces.
Made = dict[str, Any]


class KeptExamples:
    """Batches of what a processor makes of each example.

    Some processors make of a batch what cannot be put together from its examples, such as pictures that are padded to
    the largest: they are called for each batch.  The first batch tells, and the first with padding: both are made in
    either way.

    Args:
        make: calls the processor for a batch, by the numbers of its examples.
        pad: the token to pad with.
    """

    def __init__(self, make: Callable[[Sequence[int]], Made], pad: int = 0) -> None:
        self._make, self._pad = make, pad
        self._kept: dict[int, Made] = {}
        self._bytes = 0
        self._is_on = True
        #: Whether there was padding in a batch that was made in both ways.
        self._checked: set[bool] = set()

    def one(self, index: int) -> Made:
        """What the processor makes of one example; not to be written to."""
        if index in self._kept:
            return self._kept[index]
        made = self._make([index])
        nbytes = sum(value.nbytes for value in made.values() if isinstance(value, Tensor))
        if self._is_on and self._bytes + nbytes <= MOST_BYTES:
            self._kept[index] = made
            self._bytes += nbytes
        return made

    def batch(self, indices: Sequence[int]) -> Made:
        """What the processor makes of a batch."""
        if not self._is_on:
            return self._make(indices)
        parts = [self.one(index) for index in indices]
        joined, is_padded = _joined(parts, self._pad), len(_lengths(parts)) > 1
        if joined is not None and (len(parts) == 1 or is_padded in self._checked):
            return joined
        made = self._make(indices)
        if joined is None:
            # Where nothing more is kept, examples would be made twice.
            self._is_on = all(index in self._kept for index in indices)
        else:
            self._is_on = _same(joined, made)
            self._checked.add(is_padded)
        if not self._is_on:
            self._kept.clear()
        return made


def _lengths(parts: Sequence[Made]) -> set[int]:
    """Numbers of tokens; empty for pictures alone."""
    return {part["input_ids"].shape[1] for part in parts if "input_ids" in part}


def _joined(parts: Sequence[Made], pad: int) -> Made | None:
    """A batch of examples, or None if they have anything but tensors of one size or with a value a token."""
    found: Made = {}
    if any(part.keys() != parts[0].keys() for part in parts):
        return None
    for name in parts[0]:
        values = [value for part in parts if isinstance(value := part[name], Tensor) and value.dim()]
        if len(values) < len(parts):
            return None
        width = max(_lengths(parts), default=0)
        if width and all(part[name].shape == part["input_ids"].shape for part in parts):
            blank = pad if name == "input_ids" else 0
            values = [torch.nn.functional.pad(value, (0, width - value.shape[1]), value=blank) for value in values]
        if any(value.shape[1:] != values[0].shape[1:] for value in values):
            return None
        found[name] = torch.cat(values)
    return found


def _same(one: Made, other: Made) -> bool:
    """Whether two batches have the same values, of the same types."""
    return one.keys() == other.keys() and all(
        isinstance(value, Tensor) and value.dtype == one[name].dtype and torch.equal(value, one[name])
        for name, value in other.items()
    )
