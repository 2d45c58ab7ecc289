"""Exports to sparse values, new or old: a safetensors file with NAME.indices and NAME.values.

Indices are flat and row-major, int32, or int64 in tensors of more than 2^31 elements.  Values are the new elements in
the base's dtype; those of the file that undoes them are the base's own.  The metadata `layout` is "sparse-values";
`shapes` is a JSON object of the tensors' shapes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from shiradelta.errors import DeltaError
from shiradelta.format import arithmetic
from shiradelta.format.arithmetic import Array
from shiradelta.format.delta import TensorDelta
from shiradelta.format.registry import DTYPE_OF_NAME
from shiradelta.models.safetensors import Unwritten, write_tensors
from shiradelta.models.sparse import INDICES, VALUES, metadata_of
from shiradelta.util.files import replacing
from shiradelta.util.progress import Progress

from .base import based
from .layouts import export
from .target import check_file


@export(
    "sparse",
    "Sparse new values: a safetensors file with indices and new elements of each tensor.",
    options=("model", "progress"),
)
def write(
    path: str | os.PathLike[str],
    deltas: Mapping[str, TensorDelta],
    base: str = "",
    *,
    model: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> None:
    """Writes sparse new values, which `convert` reads.

    Args:
        path: the file.
        deltas: name of the weight -> its delta.
        base: ignored.
        model: the base's files, which additions need: their new elements follow from the base's.
        progress: called with (what, done, total).

    Raises:
        BaseMismatchError: the delta was made for another base.
        DeltaError: a delta adds or removes a tensor, or its result follows from a model and none is given.
        TargetError: the file cannot be written.
    """
    _check_elements(deltas)
    for name, delta in deltas.items():
        if not delta.operation.stores_elements and model is None:
            raise DeltaError(
                f"tensor {name!r} is {delta.op}, whose new elements follow from the base's; give --model MODEL (model=)"
            )
    check_file(Path(path), model)
    found: dict[str, tuple[TensorDelta, str, Callable[[], Array]]] = {}
    if model is None:
        for name, delta in deltas.items():
            found[name] = delta, delta.dtype, delta.bits
    else:
        it = based(deltas, model, progress)
        for edit in it.plan.edits:
            new = partial(_new, edit.tensor, partial(it.checkpoint.bits, edit.name), edit.slot.dtype.name)
            found[edit.name] = edit.tensor, edit.slot.dtype.name, new
    _write(path, found, progress)


@export(
    "sparse-undo",
    "Sparse old values: the same file with the base's elements, which undo the layout sparse.",
    options=("model", "progress"),
    needs_model=True,
)
def write_undo(
    path: str | os.PathLike[str],
    deltas: Mapping[str, TensorDelta],
    base: str = "",
    *,
    model: str | os.PathLike[str],
    progress: Progress | None = None,
) -> None:
    """Writes the base's elements at the positions of sparse new values, which `convert` reads, too.

    Args:
        path: the file.
        deltas: name of the weight -> its delta.
        base: ignored.
        model: the base's files.
        progress: called with (what, done, total).

    Raises:
        BaseMismatchError: the delta was made for another base.
        DeltaError: a delta adds or removes a tensor.
        TargetError: the file cannot be written.
    """
    _check_elements(deltas)
    check_file(Path(path), model)
    it = based(deltas, model, progress)
    found: dict[str, tuple[TensorDelta, str, Callable[[], Array]]] = {}
    for edit in it.plan.edits:
        old = partial(_old, edit.tensor, partial(it.checkpoint.bits, edit.name))
        found[edit.name] = edit.tensor, edit.slot.dtype.name, old
    _write(path, found, progress)


def _check_elements(deltas: Mapping[str, TensorDelta]) -> None:
    """Checks that deltas change elements only.  Raises DeltaError."""
    for name, delta in deltas.items():
        if delta.operation.restructures:
            raise DeltaError(f"tensor {name!r} is {delta.op}, and this layout changes elements only; use merged")


def _write(
    path: str | os.PathLike[str],
    found: Mapping[str, tuple[TensorDelta, str, Callable[[], Array]]],
    progress: Progress | None,
) -> None:
    """Writes a file of positions and elements.

    Args:
        path: the file.
        found: name of the weight -> its delta, the elements' dtype, and what gives their bits.
        progress: called with (what, done, total).
    """
    tensors = []
    for name, (delta, dtype, bits) in found.items():
        wide = "int64" if delta.numel > 1 << 31 else "int32"
        where = partial(_positions, delta, wide)
        tensors.append(Unwritten(name + INDICES, (delta.nnz,), DTYPE_OF_NAME[wide], where))
        tensors.append(Unwritten(name + VALUES, (delta.nnz,), DTYPE_OF_NAME[dtype], bits))
    with replacing(Path(path)) as stream:
        shapes = {name: delta.shape for name, (delta, _, _) in found.items()}
        write_tensors(stream, tensors, metadata_of(shapes), progress)


def _positions(delta: TensorDelta, dtype: str) -> Array:
    return delta.positions().astype(dtype)


def _new(delta: TensorDelta, base: Callable[[], Array], dtype: str) -> Array:
    """The new elements, at strength 1."""
    if delta.operation.stores_elements:
        return delta.bits()
    return arithmetic.result(delta.operation, delta.bits(), base()[delta.positions()], dtype, 1.0)


def _old(delta: TensorDelta, base: Callable[[], Array]) -> Array:
    """The base's elements."""
    return base()[delta.positions()]
