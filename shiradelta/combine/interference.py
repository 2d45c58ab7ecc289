"""How much deltas get in each other's way: shared weights, opposite signs, and what their product says.

Everything is computed from the nonzeros, one tensor in memory at a time.  AWOM and AWOR are those of the SHiRA paper
(arXiv:2406.13175): for two adapters' changes A1, A2 [n, m] of a weight, the spectral norm of A1^T A2 and the share of
its m x m entries that are zero.  Adapters whose product is small and empty act on the layer's input independently.
Stacked experts [e, n, m] are e weights, a convolution [n, c, ...] is one of m = c x its kernel.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shiradelta.combine.fuse import (
    Progress,
    Source,
    a_little_ahead,
    check_distinct,
    check_same_base,
    different_bases,
    overlay,
    too_large,
    with_dtype,
)
from shiradelta.errors import DeltaError
from shiradelta.format.arithmetic import Float32, Positions, scaled
from shiradelta.format.delta import TensorDelta, matrix_shape
from shiradelta.io.reader import Delta, open_delta
from shiradelta.util.text import layer_of

if TYPE_CHECKING:
    from scipy.sparse import csr_array

#: Products of more multiplications than this are not counted in full, but in `_SAMPLE` of their columns.
_COUNTED = 1 << 22
_SAMPLE = 512
#: From a share of 1 in so many elements on, matrices are multiplied as arrays.
_FULL = 8
#: The last of three dimensions is a kernel's up to here, beyond it an expert's.
_KERNEL = 32


@dataclass(frozen=True)
class Meeting:
    """How two deltas meet, in one tensor or in several taken together.

    Attributes:
        nnz: positions that each lists.
        shared: positions that both list.
        chance: how many they would share, had each drawn its positions at random within each tensor.
        clashes: of those, the ones that either of them sets; such deltas cannot be fused.
        opposed: of the others, to which both add, the ones that are moved in opposite directions.
        dot: sum of the products of the changes, where both add.
        squares: sums of the squares of each one's changes, but for tensors that either sets.
        awom: the largest spectral norm of A1^T A2; None where no tensor is added to by both.
        product: nonzeros of A1^T A2 from the supports (values that happen to cancel are counted).
        product_size: entries of A1^T A2.
        estimated: whether `product` is extrapolated from a sample of columns.
    """

    nnz: tuple[int, int]
    shared: int = 0
    chance: float = 0.0
    clashes: int = 0
    opposed: int = 0
    dot: float = 0.0
    squares: tuple[float, float] = (0.0, 0.0)
    awom: float | None = None
    product: float = 0.0
    product_size: int = 0
    estimated: bool = False

    @property
    def shares(self) -> tuple[float, float]:
        """The part of each one's positions that the other lists, too."""
        return self.shared / max(self.nnz[0], 1), self.shared / max(self.nnz[1], 1)

    @property
    def jaccard(self) -> float:
        """Shared positions over those that either lists."""
        return self.shared / max(sum(self.nnz) - self.shared, 1)

    @property
    def opposed_share(self) -> float | None:
        """Opposed positions over those to which both add; None where there are none."""
        added = self.shared - self.clashes
        return self.opposed / added if added else None

    @property
    def cosine(self) -> float | None:
        """Of the changes as vectors; None where it is not defined."""
        length = math.sqrt(self.squares[0]) * math.sqrt(self.squares[1])
        return self.dot / length if length else None

    @property
    def awor(self) -> float | None:
        """1 - |A1^T A2|_0 / m^2 over the tensors that both change; None where there are none."""
        return 1 - self.product / self.product_size if self.product_size else None

    def as_dict(self) -> dict[str, Any]:
        """The fields and what follows from them."""
        derived = ("shares", "jaccard", "opposed_share", "cosine", "awor")
        return asdict(self) | {name: getattr(self, name) for name in derived}


def pooled(meetings: Iterable[Meeting]) -> Meeting:
    """Several tensors taken together: counts are added, and AWOM is the largest, as of a block-diagonal matrix."""
    found = list(meetings)

    def pair(values: Sequence[tuple[Any, Any]]) -> tuple[Any, Any]:
        return sum(a for a, _ in values), sum(b for _, b in values)

    return Meeting(
        nnz=pair([m.nnz for m in found]),
        shared=sum(m.shared for m in found),
        chance=sum(m.chance for m in found),
        clashes=sum(m.clashes for m in found),
        opposed=sum(m.opposed for m in found),
        dot=sum(m.dot for m in found),
        squares=pair([m.squares for m in found]),
        awom=max((m.awom for m in found if m.awom is not None), default=None),
        product=sum(m.product for m in found),
        product_size=sum(m.product_size for m in found),
        estimated=any(m.estimated for m in found),
    )


@dataclass(frozen=True)
class Interference:
    """What `measure` found.

    Attributes:
        labels: short names of the deltas, in the order given.
        pairs: (i, j), i < j -> tensor name -> how deltas i and j meet there, in the order of the model.
        warnings: what a reader should know.
    """

    labels: tuple[str, ...]
    pairs: Mapping[tuple[int, int], Mapping[str, Meeting]]
    warnings: tuple[str, ...] = ()

    def title(self, pair: tuple[int, int]) -> str:
        """For people."""
        return " + ".join(self.labels[i] for i in pair)

    def total(self, pair: tuple[int, int]) -> Meeting:
        """All tensors taken together."""
        return pooled(self.pairs[pair].values())

    def layers(self, pair: tuple[int, int]) -> dict[str, Meeting]:
        """Layer -> its tensors taken together, in the order of the model."""
        groups: dict[str, list[Meeting]] = {}
        for name, meeting in self.pairs[pair].items():
            groups.setdefault(layer_of(name), []).append(meeting)
        return {layer: pooled(meetings) for layer, meetings in groups.items()}


def in_model_order(names: Iterable[str]) -> list[str]:
    """Sorted, numbers by value: layer 2 before layer 10."""

    def key(name: str) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"[./]", name)]

    return sorted(names, key=key)


def label_all(files: Sequence[str]) -> tuple[str, ...]:
    """Short names: the files' stems where these differ."""
    stems = [Path(file).name.removesuffix(".shd") for file in files]
    return tuple(stems if len(set(stems)) == len(stems) else files)


def measure(deltas: Mapping[Source, float], progress: Progress | None = None) -> Interference:
    """Compares every two of some `.shd` files.

    Args:
        deltas: file -> strength; strengths scale AWOM, and negative ones turn signs around.
        progress: is told how far it is.

    Raises:
        BaseMismatchError: the files were made against different bases.
        DeltaError: the same delta twice, or a strength that is no finite number.
        FormatError: a file is refused.
    """
    with ExitStack() as stack:
        opened = [(stack.enter_context(open_delta(path)), strength) for path, strength in deltas.items()]
        check_distinct([delta for delta, _ in opened])
        names = in_model_order({name for delta, _ in opened for name in delta})

        def work(name: str) -> dict[tuple[int, int], Meeting]:
            return _in_tensor(name, opened)

        pairs: dict[tuple[int, int], dict[str, Meeting]] = {pair: {} for pair in combinations(range(len(opened)), 2)}
        pool = stack.enter_context(ThreadPoolExecutor(2))
        for number, (name, met) in enumerate(zip(names, a_little_ahead(pool, work, names), strict=True)):
            if progress:
                progress(name, number, len(names))
            for pair, meeting in met.items():
                pairs[pair][name] = meeting
        labels = label_all([delta.file or delta.digest[:12] for delta, _ in opened])
        return Interference(labels, pairs, tuple(_warnings([delta for delta, _ in opened], labels)))


def _warnings(deltas: Sequence[Delta], labels: Sequence[str]) -> Iterable[str]:
    bases = {delta.metadata["base"] for delta in deltas if "base" in delta.metadata}
    if len(bases) > 1:
        yield f"the files name different bases ({', '.join(sorted(bases))}); the figures hold for one base only"
    for (a, one), (b, other) in combinations(zip(labels, deltas, strict=True), 2):
        common = [name for name in one if name in other]
        if not common and one and other:
            yield f"{a} and {b} have no tensor in common; if they should, compare the names that `info` lists"
        clashing = [n for n in common if one[n].op != other[n].op or one[n].op in ("new", "drop")]
        if clashing:
            ops = f"{one[clashing[0]].op} in {a} and {other[clashing[0]].op} in {b}"
            more = f" (and {len(clashing) - 1} more)" if len(clashing) > 1 else ""
            yield f"tensor {clashing[0]!r}{more} is {ops}; they cannot be fused"


@dataclass(frozen=True)
class _Change:
    """One delta's change of one tensor, decoded.

    `values` are what is added, strength included; zeros where elements are set, whose change only the base tells.
    `matrix` is [n, m], explicit zeros kept; block-diagonal where several are stacked.
    """

    tensor: TensorDelta
    positions: Positions
    values: Float32
    matrix: csr_array


def _decoded(delta: Delta, name: str, strength: float) -> _Change:
    from scipy.sparse import csr_array

    tensor = delta[name]
    if tensor.op != "add" and strength != 1:
        raise DeltaError(f"{delta.file}: tensor {name!r} is {tensor.op}, which has strength 1 only")
    positions = tensor.positions()
    values = scaled(tensor.values(), strength) if tensor.op == "add" else np.zeros(positions.size, np.float32)
    if not np.all(np.isfinite(values)):
        raise too_large(name)
    count, rows, columns = _stacked(tensor.shape)
    starts = np.searchsorted(positions, np.arange(count * rows + 1) * columns)
    column = positions % max(columns, 1) + positions // max(rows * columns, 1) * columns
    matrix = csr_array((values, column, starts), shape=(count * rows, count * columns))
    return _Change(tensor, positions, values, matrix)


def _stacked(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(weights, rows, columns of each) in a tensor."""
    if len(shape) == 3 and shape[2] > _KERNEL:
        return shape[0], shape[1], shape[2]
    return 1, *matrix_shape(shape)


def _in_tensor(name: str, opened: Sequence[tuple[Delta, float]]) -> dict[tuple[int, int], Meeting]:
    """Every pair of deltas of which at least one changes the tensor."""
    having = [i for i, (delta, _) in enumerate(opened) if name in delta]
    known = with_dtype(name, [opened[i][0] for i in having])
    for i in having:
        check_same_base(name, known, opened[i][0])
    changes = {i: _decoded(opened[i][0], name, opened[i][1]) for i in having}
    laid = overlay([(change.positions, change.values) for change in changes.values()])
    at = dict(zip(having, laid.at, strict=True))
    result = {}
    for i, j in combinations(range(len(opened)), 2):
        one, other = changes.get(i), changes.get(j)
        if one and other:
            result[i, j] = _meet(one, other, _common(at[i], at[j], laid.positions.size))
            prints = {one.tensor.base_fingerprint, other.tensor.base_fingerprint} - {None}
            if len(prints) > 1 and result[i, j].jaccard == 1:
                raise different_bases(name, [opened[i][0], opened[j][0]])
        elif one:
            result[i, j] = Meeting((one.tensor.nnz, 0), squares=(_square(one.values), 0.0))
        elif other:
            result[i, j] = Meeting((0, other.tensor.nnz), squares=(0.0, _square(other.values)))
    return result


def _common(a: Positions, b: Positions, size: int) -> tuple[Positions, Positions]:
    """Ranks, in each of two sorted lists of numbers below `size`, of what both hold."""
    rank = np.full(size, -1, np.int64)
    rank[a] = np.arange(a.size)
    in_b = np.flatnonzero(rank[b] >= 0)
    return rank[b[in_b]], in_b


def _square(values: Float32) -> float:
    wide = values.astype(np.float64)
    return float(wide @ wide)


def _meet(one: _Change, other: _Change, where: tuple[Positions, Positions]) -> Meeting:
    """One tensor that both change; `where` has the ranks of the shared positions in each."""
    both_add = one.tensor.op == other.tensor.op == "add"
    products = one.values[where[0]].astype(np.float64) * other.values[where[1]]
    product, estimated = product_nonzeros(one.matrix, other.matrix)
    count, _, columns = _stacked(one.tensor.shape)
    return Meeting(
        nnz=(one.tensor.nnz, other.tensor.nnz),
        shared=products.size,
        chance=one.tensor.nnz * other.tensor.nnz / max(one.tensor.numel, 1),
        clashes=0 if both_add else products.size,
        opposed=int(np.count_nonzero(products < 0)),
        dot=float(products.sum()),
        squares=(_square(one.values), _square(other.values)) if both_add else (0.0, 0.0),
        awom=spectral_norm(one.matrix, other.matrix) if both_add else None,
        product=product,
        product_size=count * columns**2,
        estimated=estimated,
    )


def spectral_norm(left: csr_array, right: csr_array) -> float:
    """||left^T right||, by Lanczos on the operator; the product is never formed.

    In float64, in which the fourth powers of all float32 are.  The bound on the error is 1.5 %; four digits hold on
    real and on random adapters.
    """
    from scipy.sparse.linalg import LinearOperator, svds

    if not _multiplications(left, right):
        return 0.0
    m = left.shape[1]
    if m <= 32:
        a, b = left.astype(np.float64), right.astype(np.float64)
        return float(np.linalg.norm((a.T @ b).toarray(), 2))
    a, b = (_operand(matrix.astype(np.float64)) for matrix in (left, right))
    a_t, b_t = _transposed(a), _transposed(b)
    operator = LinearOperator((m, m), dtype=np.float64, matvec=lambda x: a_t @ (b @ x), rmatvec=lambda x: b_t @ (a @ x))
    start = np.random.default_rng(0).standard_normal(m)
    if not operator.matvec(start).any():  # zeros are listed, too, and Lanczos cannot begin with nothing
        return 0.0
    return float(svds(operator, k=1, ncv=24, tol=0.03, v0=start, return_singular_vectors=False)[0])


def product_nonzeros(left: csr_array, right: csr_array) -> tuple[float, bool]:
    """(entries of left^T right that the supports reach, whether that is an estimate).

    Large products are counted in some columns, drawn with a fixed seed, and scaled up; over independent positions
    the standard error is below 1 %.
    """
    work, m = _multiplications(left, right), left.shape[1]
    if not work:
        return 0.0, False
    # Ones, so that nothing cancels.
    a, b = (type(x)((np.ones(x.nnz, np.float32), x.indices, x.indptr), shape=x.shape) for x in (left, right))
    sample = work > _COUNTED and m > _SAMPLE
    if sample:
        columns = np.random.default_rng(0).choice(m, _SAMPLE, replace=False)
        b = b.tocsc()[:, np.sort(columns)].tocsr()
    product = _transposed(_operand(a)) @ _operand(b)
    count = np.count_nonzero(product) if isinstance(product, np.ndarray) else product.nnz
    return (count * m / _SAMPLE, True) if sample else (float(count), False)


def _operand(matrix: csr_array) -> Any:
    """A matrix as it is, or as an array where so much of it is listed that this is faster."""
    return matrix if matrix.nnz * _FULL < math.prod(matrix.shape) else matrix.toarray()


def _transposed(operand: Any) -> Any:
    """Sparse ones by rows."""
    return operand.T if isinstance(operand, np.ndarray) else operand.T.tocsr()


def _multiplications(left: csr_array, right: csr_array) -> int:
    """That the product takes."""
    return int(np.diff(left.indptr).astype(np.int64) @ np.diff(right.indptr).astype(np.int64))
