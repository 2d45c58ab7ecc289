"""Many deltas into one, in the compressed domain: cost grows with nonzeros, one tensor in memory at a time.

Contributions are taken in the order of the deltas' content digests (FORMAT.md, 6.2), so the result does not depend
on the order of the arguments, and a fused file applies to the same bits as its parts applied together.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from shiradelta.errors import BaseMismatchError, DeltaError
from shiradelta.format.arithmetic import Array, Float32, Positions, scaled
from shiradelta.format.delta import TensorDelta
from shiradelta.format.registry import MAGIC
from shiradelta.io.reader import Delta, StoredTensor, open_delta
from shiradelta.io.writer import writing
from shiradelta.models.checkpoint import Checkpoint, match_names, open_checkpoint
from shiradelta.util.files import check_target

Source = str | os.PathLike[str]
Progress = Callable[[str, int, int], None]
T = TypeVar("T")


@dataclass(frozen=True)
class FuseReport:
    """What `fuse` did.  `conflicts` counts shared elements that the inputs move in opposite directions."""

    out: str
    tensors: int
    nnz: int
    input_nnz: int
    shared: int
    conflicts: int


@dataclass(frozen=True)
class Overlay:
    """The contributions of several deltas to one tensor, laid over one another.

    `positions` is the sorted union, `shared` tells which of them several inputs touch; input i adds `values[i]` to
    its elements `at[i]`.  Inputs are in the order in which contributions are to be summed.
    """

    positions: Positions
    shared: npt.NDArray[np.bool_]
    at: tuple[Positions, ...]
    values: tuple[Float32, ...]

    @property
    def inputs(self) -> int:
        """How many there are."""
        return len(self.at)

    @property
    def entries(self) -> int:
        """Contributions of all inputs."""
        return sum(values.size for values in self.values)

    def counts(self) -> Positions:
        """Per element, the inputs that touch it."""
        counts = np.zeros(self.positions.size, np.int64)
        for at in self.at:
            counts[at] += 1
        return counts

    def sum(self, keep: Callable[[Positions, Float32], npt.NDArray[np.bool_]] | None = None) -> Float32:
        """Per element, in float32, one contribution after the other; 0 where none is kept."""
        total = np.zeros(self.positions.size, np.float32)
        begun = np.zeros(self.positions.size, bool)
        for at, values in zip(self.at, self.values, strict=True):
            if keep is not None:
                kept = keep(at, values)
                at, values = at[kept], values[kept]
            # Most elements are touched once; the few others take a second look.
            meets = self.shared[at]
            again, more = at[meets], values[meets]
            # The first contribution stands as it is: 0 + -0 would lose its sign.
            so_far = np.where(begun[again], total[again] + more, more)
            total[at] = values
            total[again] = so_far
            begun[again] = True
        return total


def overlay(parts: Sequence[tuple[Positions, Float32]]) -> Overlay:
    """Lays sorted positions and their values over one another."""
    everywhere = np.concatenate([positions for positions, _ in parts])
    order = np.argsort(everywhere, kind="stable")  # merges the sorted runs
    ordered = everywhere[order]
    first = np.diff(ordered, prepend=-1) != 0
    at = np.empty(order.size, np.int64)
    at[order] = np.cumsum(first) - 1
    edges = np.cumsum([positions.size for positions, _ in parts])[:-1]
    shared = np.append(~first[1:], False)[first]
    return Overlay(ordered[first], shared, tuple(np.split(at, edges)), tuple(values for _, values in parts))


# ------------------------------------------------------------------------------------------------ methods

Merge = Callable[[Overlay], Float32]


def weighted_sum(o: Overlay) -> Float32:
    """What applying them together does."""
    return o.sum()


def mean(o: Overlay) -> Float32:
    """The sum over the number of inputs, whether or not they touch an element."""
    return o.sum() / np.float32(o.inputs)


def largest(o: Overlay) -> Float32:
    """Each element takes its contribution of largest magnitude, the first of equal ones."""
    result = np.full(o.positions.size, np.nan, np.float32)
    for at, values in zip(o.at, o.values, strict=True):
        wins = ~(np.abs(values) <= np.abs(result[at]))  # the first one beats NaN
        result[at[wins]] = values[wins]
    return result


def ties(o: Overlay) -> Float32:
    """TIES (Yadav et al. 2023, arXiv:2306.01708, section 3): the sign of the sum, the mean of those that have it.

    Its first step, trimming to the largest values, is what made the inputs sparse.
    """
    elected = np.sign(o.sum())
    count = np.zeros(o.positions.size, np.float32)

    def agrees(at: Positions, values: Float32) -> npt.NDArray[np.bool_]:
        agree: npt.NDArray[np.bool_] = np.sign(values) == elected[at]
        count[at] += agree
        return agree

    total = o.sum(agrees)
    return (total / np.maximum(count, 1)).astype(np.float32)


def disjoint(o: Overlay) -> Float32:
    """Each shared element goes to one of its inputs, in turn, so that all give up alike."""
    counts = o.counts()
    turn = np.cumsum(counts > 1) % counts

    def has_its_turn(at: Positions, values: Float32) -> npt.NDArray[np.bool_]:
        mine: npt.NDArray[np.bool_] = turn[at] == 0
        turn[at] -= 1
        return mine

    return o.sum(has_its_turn)


METHODS: Mapping[str, Merge] = {
    "sum": weighted_sum,
    "mean": mean,
    "max": largest,
    "ties": ties,
    "disjoint": disjoint,
    "dare": weighted_sum,
    "della": weighted_sum,
}


def thinned(method: str, drop: float, seed: bytes, positions: Positions, values: Float32) -> tuple[Positions, Float32]:
    """DARE (Yu et al. 2023, arXiv:2311.03099) and DELLA (Deep et al. 2024, arXiv:2406.11617): drop at random, rescale.

    DARE drops each element with the same probability; DELLA the smaller ones more often, from 1.5 `drop` for the
    smallest to 0.5 `drop` for the largest.  What stays is divided by its chance of staying.  The sum is taken of both:
    DELLA's second step, an election of signs as in TIES, is not made.
    """
    keep = np.full(values.size, 1 - drop)
    if method == "della":
        rank = np.empty(values.size)
        rank[np.argsort(np.abs(values), kind="stable")] = np.linspace(1.5, 0.5, values.size)
        keep = 1 - np.minimum(drop * rank, 0.99)
    stay = np.random.Generator(np.random.PCG64(int.from_bytes(seed, "little"))).random(values.size) < keep
    return positions[stay], (values[stay] / keep[stay]).astype(np.float32)


# --------------------------------------------------------------------------------------------------- fuse


def fuse(
    deltas: Mapping[Source, float],
    out: Source,
    method: str = "sum",
    values: str = "f32",
    *,
    drop: float = 0.5,
    seed: int = 0,
    base: Source | None = None,
    progress: Progress | None = None,
) -> FuseReport:
    """Fuses `.shd` files into one.

    Args:
        deltas: file -> strength.
        out: the file to write.
        method: "sum" (the same as applying them together), "mean", "max", "ties", "disjoint", "dare" or "della".
        values: codec of the result; with "f32" the sum is exact.
        drop: for dare and della, the share of each delta's elements that is dropped, from 0 to below 1.
        seed: for dare and della.
        base: the base model, for fingerprints in the result.  Without it the result has them where they follow
            from the inputs': where supports are the same, or do not meet.
        progress: is told how far it is.

    Raises:
        BaseMismatchError: the inputs were made against different bases.
        DeltaError: inputs that do not go together, or an argument that cannot be.
        FormatError: an input is refused.
        TargetError: the file cannot be written, or something else is there.
    """
    if method not in METHODS:
        raise DeltaError(f"method {method!r} is unknown; take {', '.join(METHODS)}")
    if not 0 <= drop < 1:
        raise DeltaError(f"drop {drop} is not a share from 0 to below 1")
    if not deltas:
        raise DeltaError("nothing to fuse; give at least one .shd file")
    check_target(Path(out), MAGIC, "a .shd file")
    if any(Path(path).exists() and Path(out).exists() and os.path.samefile(path, out) for path in deltas):
        raise DeltaError(f"{os.fspath(out)} is one of the files to fuse, which the result would replace; name another")
    checkpoint = None if base is None else open_checkpoint(base)
    with ExitStack() as stack:
        opened = [(stack.enter_context(open_delta(path)), strength) for path, strength in deltas.items()]
        opened.sort(key=lambda pair: pair[0].digest)
        check_distinct([delta for delta, _ in opened])
        names = sorted({name for delta, _ in opened for name in delta}, key=str.encode)
        shared = conflicts = nnz = 0
        with writing(out, values) as writer:

            def work(name: str) -> tuple[TensorDelta, int, int]:
                parts = [(delta, delta[name], strength) for delta, strength in opened if name in delta]
                return _fuse_tensor(name, parts, len(opened), method, drop, seed, checkpoint)

            pool = stack.enter_context(ThreadPoolExecutor(2))
            for number, (name, fused) in enumerate(zip(names, a_little_ahead(pool, work, names), strict=True)):
                if progress:
                    progress(name, number, len(names))
                tensor, met, opposed = fused
                writer.add(name, tensor)
                nnz, shared, conflicts = nnz + tensor.nnz, shared + met, conflicts + opposed
            parts_text = " + ".join(f"{s:g} {Path(d.file or d.digest[:12]).name}" for d, s in opened)
            writer.metadata.update({"method": f"fuse {method}", "source": parts_text})
            bases = {delta.metadata["base"] for delta, _ in opened if "base" in delta.metadata}
            if len(bases) == 1:
                writer.metadata["base"] = bases.pop()
        return FuseReport(os.fspath(out), len(names), nnz, sum(d.nnz for d, _ in opened), shared, conflicts)


def a_little_ahead(pool: ThreadPoolExecutor, work: Callable[[str], T], names: Sequence[str]) -> Iterator[T]:
    """Results in order, the next two being made meanwhile: never more than a few tensors in memory."""
    waiting: deque[Future[T]] = deque()
    for name in names:
        waiting.append(pool.submit(work, name))
        if len(waiting) > 2:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def check_distinct(deltas: Sequence[Delta]) -> None:
    """Raises DeltaError where two are the same."""
    for one, other in pairwise(sorted(deltas, key=lambda delta: delta.digest)):
        if one.digest == other.digest:
            raise DeltaError(f"{one.file} and {other.file} are the same delta; give it once, with one strength")


Part = tuple[Delta, StoredTensor, float]


def _fuse_tensor(
    name: str, parts: Sequence[Part], inputs: int, method: str, drop: float, seed: int, checkpoint: Checkpoint | None
) -> tuple[TensorDelta, int, int]:
    """(the fused tensor, elements that more than one input touches, those of them with opposite signs).

    `parts` are those of the `inputs` deltas that have the tensor.
    """
    known = with_dtype(name, [delta for delta, _, _ in parts])
    _check_alike(name, known, parts)
    first, dtype = parts[0][1], known[name].dtype
    if first.op in ("new", "drop"):
        return TensorDelta(first.shape, None, first.bits(), first.dtype, first.op), 0, 0
    if first.op == "set":
        positions, bits = _union_of_sets(name, parts)
        base = _base_bits(checkpoint, name, first, positions)
        return TensorDelta(first.shape, positions, bits, dtype, "set", base_bits=base), 0, 0
    contributions = []
    for delta, tensor, strength in parts:
        positions, values = tensor.positions(), scaled(tensor.values(), strength)
        if not np.all(np.isfinite(values)):
            raise too_large(name)
        if method in ("dare", "della"):
            own = hashlib.sha256(f"{seed} {delta.digest} {name}".encode()).digest()
            positions, values = thinned(method, drop, own, positions, values)
        contributions.append((positions, values))
    nothing = np.zeros(0, np.int64), np.zeros(0, np.float32)
    together = overlay(contributions + [nothing] * (inputs - len(parts)))
    with np.errstate(over="ignore", invalid="ignore"):
        fused = METHODS[method](together)
    if not np.all(np.isfinite(fused)):
        raise too_large(name)
    shared, conflicts = _meetings(together)
    base = _base_bits(checkpoint, name, first, together.positions)
    fingerprint = None if base is not None else _fingerprint(name, parts, together)
    result = TensorDelta(first.shape, together.positions, fused, dtype, base_bits=base, base_fingerprint=fingerprint)
    return result, shared, conflicts


def _check_alike(name: str, known: Delta, parts: Sequence[Part]) -> None:
    """Shapes, dtypes and operations go together; `known` is `with_dtype` of all."""
    delta, first, _ = parts[0]
    for other_delta, other, strength in parts:
        check_same_base(name, known, other_delta)
        pair = f"{delta.file} and {other_delta.file}: tensor {name!r}"
        if other.op != first.op or (len(parts) > 1 and other.op in ("new", "drop")):
            raise DeltaError(f"{pair} is {first.op} in one and {other.op} in the other; apply them one by one")
        if other.op != "add" and strength != 1:
            raise DeltaError(f"{other_delta.file}: tensor {name!r} is {other.op}, which has strength 1 only")


def with_dtype(name: str, deltas: Sequence[Delta]) -> Delta:
    """The first that says what its base's elements are; what goes with it goes together."""
    return next((delta for delta in deltas if delta[name].dtype != "unspecified"), deltas[0])


def check_same_base(name: str, one: Delta, other: Delta) -> None:
    """Raises BaseMismatchError where a tensor of both has two shapes or dtypes."""
    a, b = one[name], other[name]
    pair = f"{one.file} and {other.file}: tensor {name!r}"
    if a.shape != b.shape:
        raise BaseMismatchError(f"{pair} has shapes {list(a.shape)} and {list(b.shape)}; take those of one base")
    if "unspecified" not in (a.dtype, b.dtype) and a.dtype != b.dtype:
        raise BaseMismatchError(f"{pair} was made against {a.dtype} and {b.dtype}; take those of one base")


def different_bases(name: str, deltas: Sequence[Delta]) -> BaseMismatchError:
    """What to raise where fingerprints over the same elements differ."""
    files = " and ".join(str(delta.file) for delta in deltas)
    return BaseMismatchError(f"{files}: tensor {name!r} was made against different bases; take those of one base")


def too_large(name: str) -> DeltaError:
    """What to raise where a strength or a sum takes changes out of range."""
    return DeltaError(f"tensor {name!r}: the changes become larger than float32 holds; take smaller strengths")


def _union_of_sets(name: str, parts: Sequence[Part]) -> tuple[Positions, Array]:
    """Elements that are set, each by one input."""
    positions = np.concatenate([tensor.positions() for _, tensor, _ in parts])
    bits = np.concatenate([tensor.bits() for _, tensor, _ in parts])
    order = np.argsort(positions, kind="stable")
    positions, bits = positions[order], bits[order]
    twice = np.flatnonzero(positions[1:] == positions[:-1])
    if twice.size:
        raise DeltaError(f"tensor {name!r}: element {positions[twice[0]]} is set by two inputs; leave one of them out")
    return positions, bits


def _meetings(o: Overlay) -> tuple[int, int]:
    """Elements that several inputs touch, and those that they move in opposite directions."""
    up, down = (np.zeros(o.positions.size, bool) for _ in range(2))
    for at, values in zip(o.at, o.values, strict=True):
        meets = o.shared[at]
        up[at[meets]] |= values[meets] > 0
        down[at[meets]] |= values[meets] < 0
    return int(np.count_nonzero(o.shared)), int(np.count_nonzero(up & down))


def _base_bits(checkpoint: Checkpoint | None, name: str, tensor: TensorDelta, positions: Positions) -> Array | None:
    if checkpoint is None:
        return None
    found = match_names({name: tensor.shape}, checkpoint).get(name)
    if found is None or checkpoint[found].shape != tensor.shape or checkpoint[found].dtype.name != tensor.dtype:
        raise BaseMismatchError(
            f"{checkpoint.root}: tensor {name!r} is missing or of another shape or dtype; give the inputs' base"
        )
    return checkpoint.bits(found)[positions]


def _fingerprint(name: str, parts: Sequence[Part], o: Overlay) -> int | None:
    """The base's fingerprint over the union, where it follows from the inputs'.  It is a sum over positions."""
    known = [(tensor.nnz, tensor.base_fingerprint) for _, tensor, _ in parts]
    prints = [fingerprint for _, fingerprint in known if fingerprint is not None]
    if len(prints) < len(parts) or o.entries < sum(nnz for nnz, _ in known):  # unknown, or elements were dropped
        return None
    if o.positions.size == o.entries:
        return sum(prints) % (1 << 64)
    if all(nnz == o.positions.size for nnz, _ in known):
        if len(set(prints)) > 1:
            raise different_bases(name, [delta for delta, _, _ in parts])
        return prints[0]
    return None
