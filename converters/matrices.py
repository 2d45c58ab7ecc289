"""Sparse matrices of differences: SciPy's `.npz` files, named after the tensors, or torch.sparse tensors by name.

Both have the same layouts: coo, csr, csc, bsr (and bsc), dia.  Elements that are listed twice add up, as they do there.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shiradelta.errors import SourceError
from shiradelta.format.arithmetic import Positions
from shiradelta.format.delta import TensorDelta
from shiradelta.format.registry import ADD_DTYPES, MAX_RANK
from shiradelta.models.checkpoint import Checkpoint
from shiradelta.select.topk import NOT_FINITE
from shiradelta.util.regular_file import open_regular
from shiradelta.util.text import brief

from .base_names import find_tensors
from .item import CONVERTED, Item, Skipped, SkipReason, Source, not_addable
from .npz import read_arrays
from .sources import SourceFiles, source

if TYPE_CHECKING:
    import torch

_Numbers = np.ndarray[Any, Any]


@dataclass(frozen=True)
class SparseMatrix:
    """A sparse array as its library stores it.

    Attributes:
        layout: "coo", "csr" and so on.
        shape: its dimensions.
        values: stored elements, or blocks of them.
        one, other: coo: coordinates [dims, nnz]; compressed layouts: pointers and indices; dia: offsets.
    """

    layout: str
    shape: tuple[int, ...]
    values: _Numbers
    one: _Numbers
    other: _Numbers | None = None


def _read_npz(path: Path) -> SparseMatrix:
    """A matrix that scipy.sparse.save_npz wrote.

    Raises:
        SourceError: it is damaged, or unpacks to too much.
    """
    arrays = read_arrays(path)
    try:
        layout = bytes(arrays["format"].item()).decode()
        shape = tuple(int(size) for size in arrays["shape"].reshape(-1))
        if layout == "coo":
            one = arrays["coords"] if "coords" in arrays else np.stack([arrays["row"], arrays["col"]])
            return SparseMatrix(layout, shape, arrays["data"], one)
        if layout == "dia":
            return SparseMatrix(layout, shape, arrays["data"], arrays["offsets"])
        return SparseMatrix(layout, shape, arrays["data"], arrays["indptr"], arrays["indices"])
    except KeyError as error:
        raise SourceError(f"{path}: lacks {error}, so it is no matrix of scipy.sparse.save_npz; get it again") from None
    except (ValueError, TypeError, OverflowError) as error:
        raise SourceError(f"{path}: is damaged ({brief(str(error), 120)}); get it again") from None


def _of_torch(path: Path, name: str, tensor: torch.Tensor) -> SparseMatrix:
    """A tensor of torch.sparse.

    Raises:
        SourceError: it is dense, or a part of its dimensions is, or it has more elements than its file.
    """
    import torch

    layout, shape = str(tensor.layout).removeprefix("torch.").removeprefix("sparse_"), tuple(tensor.shape)
    values = tensor._values() if layout == "coo" else tensor.values() if layout != "strided" else tensor
    if layout == "strided" or (layout == "coo" and values.dim() > 1) or values.is_complex():
        raise SourceError(f"{path}: {brief(repr(name), 120)} is dense or has dense parts; give --kind diff for those")
    by_rows, other = layout in ("csr", "bsr"), None
    if layout == "coo":
        one = tensor._indices()
    else:
        one = tensor.crow_indices() if by_rows else tensor.ccol_indices()
        other = tensor.col_indices() if by_rows else tensor.row_indices()
    size = path.stat().st_size
    if any(part is not None and part.numel() * part.element_size() > size for part in (values, one, other)):
        raise SourceError(f"{path}: {brief(repr(name), 120)} has more elements than its file; get it again")
    plain = values.detach().to(torch.float32 if values.is_floating_point() else values.dtype).numpy()
    return SparseMatrix(layout, shape, plain, one.numpy(), None if other is None else other.numpy())


def elements(matrix: SparseMatrix) -> tuple[Positions, _Numbers]:
    """(flat positions, increasing; values in float32), with those of equal positions added up.

    Raises:
        SourceError: indices are no integers, out of range or too few, or values are NaN or infinite.
    """
    if matrix.layout not in _LAYOUTS:
        raise SourceError(f"is in layout {brief(matrix.layout, 40)!r}, none of {', '.join(_LAYOUTS)}")
    if any(part is not None and part.dtype.kind not in "iu" for part in (matrix.one, matrix.other)):
        raise SourceError("has indices that are no integers; get the file again")
    if matrix.values.dtype.kind not in "fiub" or not 0 < len(matrix.shape) <= MAX_RANK:
        raise SourceError(f"is of {matrix.values.dtype} and shape {list(matrix.shape)}; get the file again")
    try:
        coordinates, values = _LAYOUTS[matrix.layout](matrix)
        flat = np.ravel_multi_index(tuple(coordinates.astype(np.int64)), matrix.shape).astype(np.int64)
        if flat.size != values.size:
            raise ValueError
    except (ValueError, IndexError, TypeError, MemoryError):
        raise SourceError(f"has indices that do not fit its shape {list(matrix.shape)}; get the file again") from None
    order = np.argsort(flat, kind="stable")
    flat, values = flat[order], values.reshape(-1)[order]
    first = np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1]])) if flat.size else np.zeros(0, np.int64)
    with np.errstate(over="ignore", invalid="ignore"):
        total = np.add.reduceat(values, first).astype(np.float32) if flat.size else values.astype(np.float32)
    if not np.isfinite(total).all():
        raise SourceError(NOT_FINITE)
    return flat[first], total


def _coo(matrix: SparseMatrix) -> tuple[_Numbers, _Numbers]:
    if matrix.one.shape != (len(matrix.shape), matrix.values.size):
        raise ValueError
    return matrix.one, matrix.values


def _compressed(matrix: SparseMatrix) -> tuple[_Numbers, _Numbers]:
    """Pointers along one dimension, indices along the other, of elements or of blocks."""
    pointers, indices, values = matrix.one, matrix.other, matrix.values
    by_rows, blocks = matrix.layout in ("csr", "bsr"), matrix.layout in ("bsr", "bsc")
    if indices is None or len(matrix.shape) != 2 or values.ndim != (3 if blocks else 1):
        raise ValueError
    height, width = values.shape[1:] if blocks else (1, 1)
    counts = np.diff(pointers)
    outer = matrix.shape[0] // height if by_rows else matrix.shape[1] // width
    fits = pointers.shape == (outer + 1,) and pointers[0] == 0 and pointers[-1] == indices.size == len(values)
    if not fits or (counts < 0).any() or matrix.shape[0] % height or matrix.shape[1] % width:
        raise ValueError
    along = np.repeat(np.arange(outer), counts)
    rows, columns = (along, indices) if by_rows else (indices, along)
    if not blocks:
        return np.stack([rows, columns]), values
    rows = rows.astype(np.int64)[:, None, None] * height + np.arange(height)[:, None]
    columns = columns.astype(np.int64)[:, None, None] * width + np.arange(width)
    rows, columns = np.broadcast_arrays(rows, columns)
    return np.stack([rows.reshape(-1), columns.reshape(-1)]), values


def _diagonals(matrix: SparseMatrix) -> tuple[_Numbers, _Numbers]:
    """Element j of a row of values stands in column j, its row that many less than the row's offset."""
    if len(matrix.shape) != 2 or matrix.values.ndim != 2 or matrix.one.shape != (len(matrix.values),):
        raise ValueError
    columns = np.broadcast_to(np.arange(matrix.values.shape[1]), matrix.values.shape)
    rows = columns - matrix.one.astype(np.int64)[:, None]
    there = (rows >= 0) & (rows < matrix.shape[0]) & (columns < matrix.shape[1])
    return np.stack([rows[there], columns[there]]), matrix.values[there]


_LAYOUTS: Mapping[str, Callable[[SparseMatrix], tuple[_Numbers, _Numbers]]] = {
    "coo": _coo,
    **dict.fromkeys(("csr", "csc", "bsr", "bsc"), _compressed),
    "dia": _diagonals,
}


def _files_of(path: Path) -> list[Path]:
    """SciPy's files of a path: itself, or those in a folder; none if they are not SciPy's."""
    found = sorted(path.glob("*.npz")) if path.is_dir() else [path] if path.suffix == ".npz" and path.is_file() else []
    return found if found and all(map(_is_scipys, found)) else []


def _is_scipys(path: Path) -> bool:
    try:
        with open_regular(path) as stream, zipfile.ZipFile(stream) as archive:
            return {"format.npy", "shape.npy", "data.npy"} <= set(archive.namelist())
    except Exception:  # whatever parsers make of damaged bytes
        return False


def _holds_sparse(path: Path) -> bool:
    from shiradelta.io.recognise import is_pickle

    if not path.is_file() or not is_pickle(path):
        return False
    from shiradelta.models.pickles import holds_sparse  # takes a while to import

    return holds_sparse(path)


@source(
    "matrices",
    "Sparse matrices of differences: SciPy's .npz files named after tensors, or torch.sparse tensors in a .pt file.",
    lambda files: bool(_files_of(files.path)) or _holds_sparse(files.path),
    order=13,
)
def open_matrices(files: SourceFiles) -> Source:
    """The difference of every tensor, all of it."""
    paths = _files_of(files.path)
    matrices: dict[str, Callable[[], SparseMatrix]] = {path.stem: partial(_read_npz, path) for path in paths}
    if not paths:
        from shiradelta.models.pickles import read_sparse

        matrices = {name: partial(_of_torch, files.path, name, t) for name, t in read_sparse(files.path).items()}
    base, result = files.base, Source()
    there = None
    if base is not None:
        there = find_tensors(dict.fromkeys(matrices), base, files.may_lack)
    for name, opened in matrices.items():
        if there is not None and name in there.converted:
            result.add(name, CONVERTED)
        elif there is not None and name not in there.found:
            result.add(name, there.lacking[name])
        else:
            result.add(name, _item(there.found[name] if there else name, opened(), base))
    return result


def _item(name: str, matrix: SparseMatrix, base: Checkpoint | None) -> Item | Skipped:
    """One tensor's difference, or why it is skipped."""
    if base is None:
        return Item(name, matrix.shape, "unspecified", exact=partial(_delta, matrix, matrix.shape, "unspecified", None))
    slot = base[name]
    flat = (*slot.shape[:1], math.prod(slot.shape[1:]))
    if matrix.shape not in (slot.shape, flat):
        why = f"its shape is {list(matrix.shape)}, the base's {list(slot.shape)}"
        return Skipped(SkipReason.SHAPE, why, names=(name,))
    if (refused := not_addable(name, slot)) is not None:
        return refused
    assert slot.dtype.name in ADD_DTYPES
    exact = partial(_delta, matrix, slot.shape, slot.dtype.name, partial(base.bits, name))
    return Item(name, slot.shape, slot.dtype.name, exact=exact)


def _delta(
    matrix: SparseMatrix, shape: tuple[int, ...], dtype: str, bits: Callable[[], _Numbers] | None
) -> TensorDelta:
    positions, values = elements(matrix)
    return TensorDelta(shape, positions, values, dtype, base_bits=None if bits is None else bits()[positions])
