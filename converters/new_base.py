"""A delta for a new base: the items of a source that was made for an old one, as changes of the new one.

New base + delta shall behave as old base + old delta.  So an item's dense delta is what leads from the new base to the
old one with the old delta, in the tensors that the old delta changes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from shiradelta.errors import SourceError
from shiradelta.fit.fitted import FitTarget, OldBase
from shiradelta.format import arithmetic
from shiradelta.format.arithmetic import Array, Float32
from shiradelta.format.registry import ADD_DTYPES
from shiradelta.models.checkpoint import Checkpoint, same_bits
from shiradelta.models.safetensors import Slot
from shiradelta.select.topk import Rows, row_shape
from shiradelta.util.text import count

from .item import Item, Source

#: Tensors that a message names.
_NAMED = 3
#: Elements compared at a time.
_BLOCK = 1 << 20
#: Opens a tensor's elements, flat, as bits; and their dtype.
_Bits = tuple[Callable[[], Array], str]


def on_new_base(source: Source, old: Checkpoint, new: Checkpoint) -> tuple[Source, OldBase]:
    """Changes the items of a source into those of a new base.

    Args:
        source: opened with the old base.
        old: the base that the source was made for.
        new: the base to fit a delta for.

    Returns:
        (the items for the new base, what a fit has to know of the old one).

    Raises:
        SourceError: the bases have other tensors or shapes, or something in them or in the source cannot be fitted.
    """
    _check_alike(old, new)
    items = {item.name: item for item in source.items if not _is_base(item, old)}
    for item in items.values():
        _check_item(item, old)
    result = Source([], source.skipped, source.warnings)
    before, tuned, deltas = list[FitTarget](), list[FitTarget](), list[FitTarget]()
    for name, slot in new.items():
        dtypes = old[name].dtype.name, slot.dtype.name
        if not {*dtypes} <= {*ADD_DTYPES}:
            if not same_bits(old, name, new, name):
                raise SourceError(
                    f"{new.root}: {name!r} is {dtypes[1]} and not the old base's, and a fit changes floating-point"
                    f" numbers of {', '.join(sorted(ADD_DTYPES))} only; copy the tensor from {old.root}"
                )
            continue
        was, here = (partial(old.bits, name), dtypes[0]), (partial(new.bits, name), dtypes[1])
        changed = items.get(name)
        wanted = was if changed is None else _tuned(changed, old)
        dense = partial(_difference, wanted, here, slot.shape)

        def target(rows: Callable[[], Rows], name: str = name, slot: Slot = slot) -> FitTarget:
            return FitTarget(name, slot.dtype.name, slot.shape, rows, 0)

        before.append(target(partial(_difference, was, here, slot.shape)))
        tuned.append(target(dense))
        if changed is not None:
            deltas.append(target(changed.dense or partial(_difference, wanted, was, slot.shape)))
            result.items.append(Item(name, slot.shape, dtypes[1], dense, base_bits=here[0]))
    return result, OldBase(old.root, before, tuned, deltas)


def _check_alike(old: Checkpoint, new: Checkpoint) -> None:
    """Raises SourceError if two bases have not the same names and shapes."""
    found = [f"it lacks {name!r}" for name in old if name not in new]
    found += [f"the old base lacks {name!r}" for name in new if name not in old]
    found += [
        f"{name!r} has shape {list(slot.shape)}, the old base's {list(old[name].shape)}"
        for name, slot in new.items()
        if name in old and slot.shape != old[name].shape
    ]
    if found:
        more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        raise SourceError(
            f"{new.root}: {count(found, 'tensor is', 'tensors are')} not as in the old base {old.root}:"
            f" {'; '.join(found[:_NAMED])}{more}; a delta goes over to a base with the same names and shapes only"
        )


def _check_item(item: Item, old: Checkpoint) -> None:
    """Raises SourceError for a change that is not one of floating-point numbers."""
    exact = None if item.dense is not None or item.exact is None else item.exact()
    restructures = exact is not None and exact.operation.restructures
    if restructures or item.replaces or item.dtype not in ADD_DTYPES:
        what = exact.operation.title if exact is not None and restructures else f"a change of {item.dtype}"
        raise SourceError(
            f"{old.root}: {item.name!r} is {what}, which does not go over to a new base; leave it out of the source, or"
            " make the new base's tensor alike and convert without --from-base (from_base=)"
        )


def _is_base(item: Item, old: Checkpoint) -> bool:
    """Whether a fine-tune has a tensor as its base has it."""
    if item.tuned is None or item.name not in old or (item.tuned_dtype or item.dtype) != old[item.name].dtype.name:
        return False
    one, other = item.tuned(), old.bits(item.name)
    return one.size == other.size and all(
        np.array_equal(one[i : i + _BLOCK], other[i : i + _BLOCK]) for i in range(0, one.size, _BLOCK)
    )


def _tuned(item: Item, old: Checkpoint) -> _Bits:
    """The tensor of old base + old delta."""
    if item.tuned is not None:
        return item.tuned, item.tuned_dtype or item.dtype
    return partial(_patched, item, partial(old.bits, item.name)), item.dtype


def _patched(item: Item, base: Callable[[], Array]) -> Array:
    if item.dense is not None:
        return arithmetic.add(base(), item.dtype, item.dense()(0, item.matrix[0]).reshape(-1))
    assert item.exact is not None
    delta = item.exact()
    bits, at = np.array(base()), delta.positions()
    bits[at] = arithmetic.result(delta.operation, delta.bits(), bits[at], item.dtype, 1.0)
    return bits


def _difference(one: _Bits, other: _Bits, shape: tuple[int, ...]) -> Rows:
    """one - other in float32, a few rows at a time."""
    bits, its_bits, columns = one[0](), other[0](), row_shape(shape)[1]

    def rows(start: int, stop: int) -> Float32:
        part = slice(start * columns, stop * columns)
        with np.errstate(invalid="ignore", over="ignore"):
            found = arithmetic.to_float32(bits[part], one[1]) - arithmetic.to_float32(its_bits[part], other[1])
        return found.reshape(-1, columns)

    return rows
