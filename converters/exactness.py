"""Counts the weights that a file does not give bit for bit as the fine-tune has them."""

from __future__ import annotations

import numpy as np

from shiradelta.format import arithmetic
from shiradelta.format.arithmetic import Array, Positions
from shiradelta.util.arrays import ranges

from .item import Item


class Inexact:
    """Counts the elements of a tensor that are not the fine-tune's once the delta is on the base, selected or not.

    Elements of one dtype are compared as bits.  Where the fine-tune has another dtype than the base, they are compared
    as float32, which holds both exactly.

    Args:
        item: the tensor.
        base: the base's elements; None if they are not known.

    Attributes:
        count: the number of elements, without those of `see`; None if the source does not say what the fine-tune's
            elements are.
    """

    def __init__(self, item: Item, base: Array | None) -> None:
        self.count: int | None = None if item.tuned is None else 0
        self._tuned: Array | None = None
        if item.tuned is None or item.dense is None:  # what is stored exactly differs nowhere
            return
        assert base is not None
        self._tuned, self._dtypes = item.tuned(), (item.dtype, item.tuned_dtype or item.dtype)
        self.count = sum(self._differing(base[i:j], self._tuned[i:j]) for i, j in ranges(base.size))

    def see(self, positions: Positions, old: Array, new: Array) -> None:
        """Some elements that the delta changes: their positions, their bits in the base and after the delta."""
        if self._tuned is not None and self.count is not None:
            wanted = self._tuned[positions]
            self.count += self._differing(new, wanted) - self._differing(old, wanted)

    def _differing(self, found: Array, wanted: Array) -> int:
        """The number of elements that differ."""
        dtype, wanted_dtype = self._dtypes
        if dtype != wanted_dtype:
            found = arithmetic.to_float32(found, dtype).view(np.uint32)
            wanted = arithmetic.to_float32(wanted, wanted_dtype).view(np.uint32)
        return int(np.count_nonzero(found != wanted))
