"""Measures how much deltas interfere: shared weights, opposite signs, and the figures of their product.

Everything is computed from the nonzeros, with a few tensors in memory at a time.  AWOM and AWOR are defined in the
SHiRA paper (arXiv:2406.13175): for two deltas' changes A1, A2 [n, m] of a weight, the spectral norm of A1^T A2 and the
share of its m x m elements that are zero.  If the product is small and mostly zero, the deltas act on the layer's input
independently.  Stacked experts [e, n, m] are e weights; a convolution [n, c, ...] is one with m = c x its kernel size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from shiradelta.combine.checks import check_distinct, check_same_base, different_bases, too_large
from shiradelta.combine.fuse import Source
from shiradelta.combine.overlay import overlay
from shiradelta.combine.products import factors, matrices_in, product_nonzeros, spectral_norm
from shiradelta.format.arithmetic import Float32, Positions, scaled
from shiradelta.format.delta import TensorDelta
from shiradelta.io.reader import Delta, open_delta
from shiradelta.models.compatibility import check_strength
from shiradelta.models.names import in_model_order, layer_of
from shiradelta.util.arrays import sum_of_squares
from shiradelta.util.progress import Progress
from shiradelta.util.threads import ahead


@dataclass(frozen=True)
class Meeting:
    """How much two deltas overlap, in one tensor or in several together.

    Attributes:
        nnz: number of nonzeros of each delta.
        shared: number of positions that both list.
        chance: expected number of shared positions if each delta had drawn its own at random within each tensor.
        clashes: number of shared positions that at least one delta sets; such deltas cannot be fused.
        opposed: number of shared positions that both deltas add to, in opposite directions.
        dot: dot product of the changes, where both add.
        squares: sum of squares of each delta's changes, without tensors that either delta sets.
        awom: the largest spectral norm of A1^T A2; None if there is no tensor that both add to.
        product: number of nonzeros of A1^T A2, from the positions alone (values that cancel are counted).
        product_size: number of elements of A1^T A2.
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
        """For each delta, the share of its positions that the other one lists too."""
        return self.shared / max(self.nnz[0], 1), self.shared / max(self.nnz[1], 1)

    @property
    def jaccard(self) -> float:
        """Shared positions divided by the positions that at least one delta lists."""
        return self.shared / max(sum(self.nnz) - self.shared, 1)

    @property
    def opposed_share(self) -> float | None:
        """Opposed positions divided by the positions that both add to; None if there are none."""
        added = self.shared - self.clashes
        return self.opposed / added if added else None

    @property
    def cosine(self) -> float | None:
        """Cosine of the angle between the changes as vectors; None if one is zero."""
        length = math.sqrt(self.squares[0]) * math.sqrt(self.squares[1])
        return self.dot / length if length else None

    @property
    def awor(self) -> float | None:
        """1 - |A1^T A2|_0 / m^2 over the tensors that both change; None if there are none."""
        return 1 - self.product / self.product_size if self.product_size else None

    def as_dict(self) -> dict[str, Any]:
        """All fields and derived figures as plain values."""
        derived = ("shares", "jaccard", "opposed_share", "cosine", "awor")
        return asdict(self) | {name: getattr(self, name) for name in derived}


def pooled(meetings: Iterable[Meeting]) -> Meeting:
    """Combines tensors: counts are added, and AWOM is the largest, as for a block-diagonal matrix."""
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
    """Report of `measure`.

    Attributes:
        labels: short names of the deltas, in the order given.
        pairs: (i, j), i < j -> tensor name -> overlap of deltas i and j there, in the order of the model.
        warnings: warnings for the user.
    """

    labels: tuple[str, ...]
    pairs: Mapping[tuple[int, int], Mapping[str, Meeting]]
    warnings: tuple[str, ...] = ()

    def title(self, pair: tuple[int, int]) -> str:
        """The labels of a pair, in words."""
        return " + ".join(self.labels[i] for i in pair)

    def total(self, pair: tuple[int, int]) -> Meeting:
        """The overlap of a pair over all tensors."""
        return pooled(self.pairs[pair].values())

    def layers(self, pair: tuple[int, int]) -> dict[str, Meeting]:
        """Layer -> the overlap of a pair over its tensors, in the order of the model."""
        groups: dict[str, list[Meeting]] = {}
        for name, meeting in self.pairs[pair].items():
            groups.setdefault(layer_of(name), []).append(meeting)
        return {layer: pooled(meetings) for layer, meetings in groups.items()}


def label_all(files: Sequence[str]) -> tuple[str, ...]:
    """Short names: the files' stems if these differ, else the paths."""
    stems = [Path(file).name.removesuffix(".shd") for file in files]
    return tuple(stems if len(set(stems)) == len(stems) else files)


def measure(
    deltas: Mapping[Source, float], progress: Progress | None = None, *, limit: int | str | None = None
) -> Interference:
    """Measures how much each pair of `.shd` files overlaps.

    Args:
        deltas: file -> strength; strengths scale AWOM, and negative ones reverse signs.
        progress: called with (tensor, done, total).
        limit: the most memory that decoding one tensor may take; see `open_delta`.

    Raises:
        BaseMismatchError: the files were made against different bases.
        DeltaError: a delta is given twice, or a strength is not allowed.
        FormatError: a file is refused.
        LimitError: a tensor takes more memory than `limit` allows.
    """
    with ExitStack() as stack:
        opened = [(stack.enter_context(open_delta(path, limit=limit)), strength) for path, strength in deltas.items()]
        check_distinct([delta for delta, _ in opened])
        names = in_model_order({name for delta, _ in opened for name in delta})

        def work(name: str) -> dict[tuple[int, int], Meeting]:
            return _in_tensor(name, opened)

        pairs: dict[tuple[int, int], dict[str, Meeting]] = {pair: {} for pair in combinations(range(len(opened)), 2)}
        if not pairs:  # there is nothing to compare
            names = []
        for number, (name, met) in enumerate(zip(names, ahead(work, names), strict=True)):
            if progress:
                progress(name, number, len(names))
            for pair, meeting in met.items():
                pairs[pair][name] = meeting
        labels = label_all([delta.file or delta.digest[:12] for delta, _ in opened])
        return Interference(labels, pairs, tuple(_warnings([delta for delta, _ in opened], labels)))


def _warnings(deltas: Sequence[Delta], labels: Sequence[str]) -> Iterable[str]:
    bases = {delta.metadata["base"] for delta in deltas if "base" in delta.metadata}
    if len({base.rpartition("/")[2] for base in bases}) > 1:  # one may be named as on the Hub, the other by its folder
        yield f"the files name different bases ({', '.join(sorted(bases))}); the figures hold for one base only"
    for (a, one), (b, other) in combinations(zip(labels, deltas, strict=True), 2):
        common = [name for name in one if name in other]
        if not common and one and other:
            yield f"{a} and {b} have no tensor in common; if they should, compare the names that `info` lists"
        clashing = [n for n in common if one[n].op != other[n].op or one[n].operation.restructures]
        if clashing:
            ops = f"{one[clashing[0]].op} in {a} and {other[clashing[0]].op} in {b}"
            more = f" (and {len(clashing) - 1} more)" if len(clashing) > 1 else ""
            yield f"tensor {clashing[0]!r}{more} is {ops}; they cannot be fused"


@dataclass(frozen=True)
class _Change:
    """One delta's change of one tensor, decoded.

    Attributes:
        tensor: the delta.
        positions: the positions of its nonzeros.
        values: the added values, strength included; zeros for elements that are set, whose change depends on
            the base.
    """

    tensor: TensorDelta
    positions: Positions
    values: Float32


def _decoded(delta: Delta, name: str, strength: float) -> _Change:
    tensor = delta[name]
    check_strength(f"{delta.file}: tensor {name!r}", strength, [tensor.operation])
    positions = tensor.positions()
    values = scaled(tensor.values(), strength) if tensor.operation.adds else np.zeros(positions.size, np.float32)
    if not np.all(np.isfinite(values)):
        raise too_large(name)
    return _Change(tensor, positions, values)


def _alone(delta: Delta, name: str, strength: float) -> float:
    """The sum of squares of a change that no other delta meets."""
    tensor = delta[name]
    check_strength(f"{delta.file}: tensor {name!r}", strength, [tensor.operation])
    if not tensor.operation.adds:
        return 0.0
    total = sum(sum_of_squares(scaled(bits.view(np.float32), strength)) for bits in tensor.bits_windows())
    if not math.isfinite(total):
        raise too_large(name)
    return total


def _in_tensor(name: str, opened: Sequence[tuple[Delta, float]]) -> dict[tuple[int, int], Meeting]:
    """The overlap of every pair of deltas of which at least one changes the tensor."""
    having = [i for i, (delta, _) in enumerate(opened) if name in delta]
    check_same_base(name, [opened[i][0] for i in having])
    result = {}
    if len(having) == 1:
        nnz, squares = opened[having[0]][0][name].nnz, _alone(opened[having[0]][0], name, opened[having[0]][1])
        for pair in combinations(range(len(opened)), 2):
            if having[0] in pair:
                first = having[0] == pair[0]
                counts, sums = ((nnz, 0), (squares, 0.0)) if first else ((0, nnz), (0.0, squares))
                result[pair] = Meeting(counts, squares=sums)
        return result
    changes = {i: _decoded(opened[i][0], name, opened[i][1]) for i in having}
    laid = overlay([(change.positions, change.values) for change in changes.values()])
    at = dict(zip(having, laid.at, strict=True))
    for i, j in combinations(range(len(opened)), 2):
        one, other = changes.get(i), changes.get(j)
        if one and other:
            result[i, j] = _meet(one, other, _common(at[i], at[j], laid.positions.size))
            prints = {one.tensor.base_fingerprint, other.tensor.base_fingerprint} - {None}
            if len(prints) > 1 and result[i, j].jaccard == 1:
                raise different_bases(name, [opened[i][0], opened[j][0]])
        elif one:
            result[i, j] = Meeting((one.tensor.nnz, 0), squares=(sum_of_squares(one.values), 0.0))
        elif other:
            result[i, j] = Meeting((0, other.tensor.nnz), squares=(0.0, sum_of_squares(other.values)))
    return result


def _common(a: Positions, b: Positions, size: int) -> tuple[Positions, Positions]:
    """Indices, in each of two sorted lists of numbers below `size`, of the numbers that both have."""
    rank = np.full(size, -1, np.int64)
    rank[a] = np.arange(a.size)
    in_b = np.flatnonzero(rank[b] >= 0)
    return rank[b[in_b]], in_b


def _meet(one: _Change, other: _Change, where: tuple[Positions, Positions]) -> Meeting:
    """The overlap in a tensor that both change; `where` indexes the shared positions in each."""
    both_add = one.tensor.operation.adds and other.tensor.operation.adds
    products = one.values[where[0]].astype(np.float64) * other.values[where[1]]
    shape = one.tensor.shape
    left, right = factors((one.positions, one.values), (other.positions, other.values), shape)
    product, estimated = product_nonzeros(left, right)
    count, _, columns = matrices_in(shape)
    return Meeting(
        nnz=(one.tensor.nnz, other.tensor.nnz),
        shared=products.size,
        chance=one.tensor.nnz * other.tensor.nnz / max(one.tensor.numel, 1),
        clashes=0 if both_add else products.size,
        opposed=int(np.count_nonzero(products < 0)),
        dot=float(products.sum()),
        squares=(sum_of_squares(one.values), sum_of_squares(other.values)) if both_add else (0.0, 0.0),
        awom=spectral_norm(left, right) if both_add else None,
        product=product,
        product_size=count * columns**2,
        estimated=estimated,
    )
