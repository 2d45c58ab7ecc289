"""A `.shd` file as the source of another: fewer nonzeros, values in another form, fingerprints of a base."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from shiradelta.errors import BaseMismatchError, SourceError
from shiradelta.folder.comparison import PastBits
from shiradelta.format import registry
from shiradelta.format.arithmetic import Float32
from shiradelta.format.delta import TensorDelta
from shiradelta.io.reader import StoredTensor, open_delta
from shiradelta.io.recognise import starts_with
from shiradelta.models.checkpoint import Checkpoint
from shiradelta.select.topk import Rows, row_shape
from shiradelta.util.text import count

from .base_names import BaseTensors, find_tensors
from .item import CONVERTED, Item, Skipped, SkipReason, Source, not_addable, other_shape
from .sources import SourceFiles, source


@source(
    "shd",
    "A .shd file: with fewer nonzeros, values in another form, or fingerprints of a base that it lacked.",
    lambda files: starts_with(files.path, registry.MAGIC),
    order=11,
)
def open_shd(files: SourceFiles) -> Source:
    """Every tensor: differences are selected from anew, new elements and tensors are taken over as they are."""
    delta, base, result = open_delta(files.path), files.base, Source()
    there = None
    if base is not None:
        wanted = {name: None if tensor.operation.replaces else tensor.shape for name, tensor in delta.items()}
        there = find_tensors(wanted, base, files.may_lack)
    lost = 0
    for name, tensor in delta.items():
        made = _item(files.path, name, tensor, base, there)
        lost += there is None and tensor.base_fingerprint is not None and tensor.operation.adds
        result.add(name, made)
    if lost:
        some = count(lost, "tensor loses its fingerprint", "tensors lose their fingerprints")
        result.warnings.append(f"{some} of the base, which other nonzeros need anew; give --base MODEL to keep them")
    return result


def _item(
    path: Path, name: str, tensor: StoredTensor, base: Checkpoint | None, there: BaseTensors | None
) -> Item | Skipped:
    """One tensor, or why it is skipped."""
    found = name
    if base is not None and there is not None and tensor.operation.in_base:
        if name in there.converted:
            return CONVERTED
        if name not in there.found:
            return there.lacking[name]
        found = there.found[name]
        slot = base[found]
        if not tensor.operation.replaces and (refused := other_shape(tensor.shape, found, slot)) is not None:
            return refused
        if tensor.dtype not in ("unspecified", slot.dtype.name) and not tensor.operation.replaces:
            why = (
                f"it is for {tensor.dtype}, the base's tensor is {slot.dtype.name}; give the base that it was made for"
            )
            return Skipped(SkipReason.DTYPE, why, names=(found,))
    if not tensor.operation.adds or base is None:
        exact = partial(_checked, path, name, tensor, base, found)
        if not tensor.operation.adds:
            return Item(found, tensor.shape, tensor.dtype, exact=exact)
        return Item(found, tensor.shape, tensor.dtype, partial(_rows, exact), draw=tensor.draw)
    slot = base[found]
    if (refused := not_addable(found, slot)) is not None:
        return refused
    dense = partial(_rows, partial(_checked, path, name, tensor, base, found))
    return Item(found, slot.shape, slot.dtype.name, dense, base_bits=partial(base.bits, found), draw=tensor.draw)


def _checked(path: Path, name: str, tensor: StoredTensor, base: Checkpoint | None, found: str) -> TensorDelta:
    """The tensor delta, once it is known to be for the base.

    Raises:
        BaseMismatchError: it was made for another base.
    """
    known = tensor.base_fingerprint if base is not None and found in base else None
    if base is not None and known is not None and known != PastBits(base[found]).fingerprint(tensor):
        raise BaseMismatchError(
            f"{path}: {name!r} was made for other weights than those of {base.root}; give the base that it was made for"
        )
    return tensor


def _rows(opened: Callable[[], TensorDelta]) -> Rows:
    """The differences as a dense matrix, a few rows at a time."""
    tensor = opened()
    positions, values = tensor.positions(), tensor.values()
    columns = row_shape(tensor.shape)[1]

    def rows(start: int, stop: int) -> Float32:
        made = np.zeros((stop - start) * columns, np.float32)
        first, last = np.searchsorted(positions, (start * columns, stop * columns))
        made[positions[first:last] - start * columns] = values[first:last]
        return made.reshape(-1, columns)

    return rows


def refuse_itself(source: Path, target: Path) -> None:
    """Refuses to write a file over the one that it is made from.

    Raises:
        SourceError: they are the same file.
    """
    if target.exists() and target.resolve() == source.resolve():
        raise SourceError(f"{source}: is the file to write, too; give another with -o (out=)")
