"""Files of sparse new values: `NAME.indices` [nnz], flat, and `NAME.values` [nnz], new elements in the base's dtype.

`shiradelta export` writes them, and says so in the metadata.  Other files with such keys may hold differences, so
`--kind sparse` has to say what they are.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from shiradelta.errors import SourceError
from shiradelta.format.delta import TensorDelta
from shiradelta.models.checkpoint import Checkpoint
from shiradelta.models.names import Shape
from shiradelta.models.sparse import INDICES, VALUES, is_sparse, shapes_in
from shiradelta.util.text import count

from .base_names import find_tensors
from .item import CONVERTED, Item, Skipped, SkipReason, Source, other_shape
from .sources import SourceFiles, source

_WIDTHS = ("int32", "int64", "uint32", "uint64")


def _says_so(files: SourceFiles) -> bool:
    return any(is_sparse(shard.metadata) for shard in files.checkpoint.shards)


@source(
    "sparse",
    "A file of sparse new values: NAME.indices and NAME.values, as `shiradelta export` writes it.",
    _says_so,
    order=19,
)
def open_sparse(files: SourceFiles) -> Source:
    """The new elements of every tensor, set as they are."""
    checkpoint, base = files.checkpoint, files.base
    shapes: dict[str, Shape] = {}
    for shard in checkpoint.shards:
        shapes |= shapes_in(shard.metadata, shard.file)
    result = Source()
    names = sorted({key.removesuffix(end) for key in checkpoint for end in (INDICES, VALUES) if key.endswith(end)})
    for key in checkpoint:
        if not key.endswith((INDICES, VALUES)):
            result.add(key, Skipped(SkipReason.PARTS, f"is neither NAME{INDICES} nor NAME{VALUES}"))
    found, lacking = {name: name for name in names}, dict[str, Skipped]()
    if base is not None:
        wanted = {name: shapes.get(name) for name in names}
        there = find_tensors(wanted, base, lambda name: files.may_lack(name, name + INDICES, name + VALUES))
        found, lacking = there.found, there.lacking | dict.fromkeys(there.converted, CONVERTED)
    for name in names:
        made = _item(checkpoint, name, found[name], base, shapes.get(name)) if name in found else lacking[name]
        result.add(name, made)
    return result


def _item(source: Checkpoint, name: str, found: str, base: Checkpoint | None, shape: Shape | None) -> Item | Skipped:
    """One tensor's new elements, or why they are skipped."""
    lacking = [end for end in (INDICES, VALUES) if name + end not in source]
    if lacking:
        return Skipped(SkipReason.PARTS, f"its {name + lacking[0]!r} is lacking")
    dtype, kind = source[name + VALUES].dtype.name, source[name + INDICES].dtype.name
    if kind not in _WIDTHS:
        return Skipped(SkipReason.PARTS, f"its indices are {kind}")
    if base is None:
        if shape is None:
            return Skipped(SkipReason.NEEDS_BASE, "the file does not tell the tensor's shape; give --base MODEL")
        return Item(found, shape, dtype, exact=partial(_set, source, name, shape, None, found))
    slot = base[found]
    if shape is not None and (refused := other_shape(shape, found, slot)) is not None:
        return refused
    if dtype != slot.dtype.name:
        why = f"its new values are {dtype}, the base's {slot.dtype.name}; give the base that it was made for"
        return Skipped(SkipReason.DTYPE, why, names=(found,))
    return Item(found, slot.shape, dtype, exact=partial(_set, source, name, slot.shape, base, found))


def _set(source: Checkpoint, name: str, shape: Shape, base: Checkpoint | None, found: str) -> TensorDelta:
    where, values = source[name + INDICES], source[name + VALUES]
    indices = source.bits(where.name).view(where.dtype.name).astype(np.int64)
    if indices.size != values.numel:
        raise SourceError(
            f"has {count(indices.size, 'index', 'indices')} for {count(values.numel, 'value')}; get the file again"
        )
    if indices.size and (indices.min() < 0 or indices.max() >= np.prod(shape, dtype=object)):
        raise SourceError(f"has an index outside of shape {list(shape)}; give the right base")
    order = np.argsort(indices, kind="stable")
    positions = indices[order]
    if np.any(positions[1:] == positions[:-1]):
        raise SourceError("lists an index twice; get the file again")
    bits = source.bits(values.name)[order]
    old = None if base is None else base.bits(found)[positions]
    return TensorDelta(shape, positions, bits, values.dtype.name, "set", base_bits=old)
