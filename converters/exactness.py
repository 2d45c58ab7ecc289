"""Counts the weights that a file does not give bit for bit as the fine-tune has them."""

from __future__ import annotations

import numpy as np

from shiradelta.format import arithmetic
from shiradelta.format.arithmetic import Array
from shiradelta.format.delta import TensorDelta

from .item import Item

#: Elements compared at a time; they stay in a core's cache.
_BLOCK = 1 << 17


def count_inexact(item: Item, stored: TensorDelta) -> int | None:
    """Elements of a tensor that are not the fine-tune's once the delta is on the base, selected or not.

    Elements of one dtype are compared as bits.  Where the fine-tune has another dtype than the base, they are compared
    as float32, which holds both exactly.

    Args:
        item: the tensor.
        stored: what the file holds of it, as a reader sees it.

    Returns:
        The number of elements; None if the source does not say what the fine-tune's weights are.
    """
    if item.tuned is None:
        return None
    if item.dense is None:
        return 0
    assert item.base_bits is not None
    tuned, base = item.tuned(), item.base_bits()
    dtypes = item.dtype, item.tuned_dtype or item.dtype
    inexact = sum(_differing(base[i : i + _BLOCK], tuned[i : i + _BLOCK], *dtypes) for i in range(0, base.size, _BLOCK))
    positions, payload = stored.positions(), stored.bits()
    for i in range(0, positions.size, _BLOCK):
        part = slice(i, i + _BLOCK)
        assert stored.base_bits is not None  # as the item's base is known
        old, wanted = stored.base_bits[part], tuned[positions[part]]
        new = arithmetic.result(stored.operation, payload[part], old, item.dtype, 1.0)
        inexact += _differing(new, wanted, *dtypes) - _differing(old, wanted, *dtypes)
    return inexact


def _differing(found: Array, wanted: Array, dtype: str, wanted_dtype: str) -> int:
    """The number of elements that differ."""
    if dtype != wanted_dtype:
        found = arithmetic.to_float32(found, dtype).view(np.uint32)
        wanted = arithmetic.to_float32(wanted, wanted_dtype).view(np.uint32)
    return int(np.count_nonzero(found != wanted))
