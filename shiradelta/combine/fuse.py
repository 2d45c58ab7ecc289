"""`fuse`: combines several deltas into one, in the compressed domain.

Cost grows with the nonzeros, and a few tensors are in memory at a time.  Contributions are summed in the order of the
deltas' content digests (FORMAT.md, 6.2).  So the result does not depend on the order of the arguments, and a sum gives
the same weights as applying its parts together.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from shiradelta.combine.checks import (
    Part,
    check_alike,
    check_distinct,
    check_readable,
    different_bases,
    too_large,
    with_dtype,
)
from shiradelta.combine.methods import METHODS, MergeMethod, drop_at_random
from shiradelta.combine.overlay import Overlay, overlay
from shiradelta.errors import ArgumentError, BaseMismatchError, DeltaError
from shiradelta.format.arithmetic import Array, Float32, Positions, scaled
from shiradelta.format.delta import TensorDelta
from shiradelta.format.draw import common_draw
from shiradelta.format.registry import MAGIC
from shiradelta.format.windows import Window, side_by_side
from shiradelta.io.download import local_model
from shiradelta.io.reader import Delta, open_delta
from shiradelta.io.writer import writing
from shiradelta.models.checkpoint import Checkpoint, open_checkpoint
from shiradelta.models.compatibility import TensorSpec, difference, spec_of
from shiradelta.models.library import match_names
from shiradelta.models.strengths import Strength, described, strengths_by_name
from shiradelta.select.largest import largest
from shiradelta.select.shares import check_share, count_for
from shiradelta.util.arguments import NUMBER, STRENGTHS_BY_TENSOR, checked
from shiradelta.util.arrays import RepeatedPositionError, join_sorted, merge_sorted
from shiradelta.util.files import check_target
from shiradelta.util.progress import Progress
from shiradelta.util.threads import ahead
from shiradelta.util.version import made_by

Source = str | os.PathLike[str]
#: Bytes that fusing a tensor takes for each nonzero of the result, as was measured.
_RESULT = 48
#: The same for each nonzero of the inputs, where the method needs all of them at once.
_WHOLE = 48


@dataclass(frozen=True)
class FuseReport:
    """Report of `fuse`.

    Attributes:
        out: the file that was written.
        tensors: number of tensors in it.
        nnz: number of nonzeros in it.
        input_nnz: number of nonzeros in all inputs.
        shared: number of the file's nonzeros that several inputs list.
        conflicts: number of these that the inputs move in opposite directions.
    """

    out: str
    tensors: int
    nnz: int
    input_nnz: int
    shared: int
    conflicts: int


@dataclass(frozen=True)
class _Options:
    """How tensors are fused.

    Attributes:
        method: how contributions are combined.
        drop: share of each delta's nonzeros to drop, for methods that drop some.
        density: share of a tensor's elements that the result may change; None for all that are fused.
        seed: the seed of the random choice.
        checkpoint: the base.
        names: the inputs' names -> the base's.
    """

    method: MergeMethod
    drop: float
    density: float | None
    seed: int
    checkpoint: Checkpoint | None
    names: Mapping[str, str] = field(default_factory=dict)


@checked(deltas=STRENGTHS_BY_TENSOR, density=NUMBER)
def fuse(
    deltas: Mapping[Source, Strength],
    out: Source,
    method: str = "sum",
    values: str = "f32",
    *,
    drop: float = 0.5,
    density: float | None = None,
    seed: int = 0,
    base: Source | None = None,
    progress: Progress | None = None,
    limit: int | str | None = None,
) -> FuseReport:
    """Fuses `.shd` files into one.

    Args:
        deltas: file -> strength; or file -> {pattern: strength}, a pattern being a glob of tensors' names, a component
            of a pipeline, or "layers 0-15", which counts layers by the first number in a name.  The first pattern that
            matches a tensor counts, and each tensor needs one; 0 leaves the tensor out.
        out: the file to write.
        method: a name of `shiradelta.combine.methods.METHODS`; "sum" is the same as applying the deltas together.
        values: value codec of the result; with "f32" the sum is exact.
        drop: share of each delta's nonzeros to drop, from 0 to below 1, for methods that drop some.
        density: keep only the largest changes of each tensor, this share of its elements; None keeps all.
        seed: the random seed, for methods that drop nonzeros.
        base: the base model, for fingerprints in the result.  Without it a tensor has them only if they follow from
            the inputs: if all list the same positions, or no two list a common one.
        progress: called with (tensor, done, total).
        limit: the most memory that decoding one tensor may take; see `open_delta`.

    Raises:
        BaseMismatchError: the inputs were made against different bases.
        ArgumentError: the method is unknown, or an argument is out of range.
        DeltaError: the inputs cannot be fused.
        FormatError: an input is refused.
        LimitError: a tensor takes more memory than `limit` allows.
        TargetError: the file cannot be written, or is not a `.shd` file.
    """
    row = METHODS.find(method)
    if not 0 <= drop < 1:
        raise ArgumentError(f"drop {drop} is not a share from 0 to below 1; give a number such as 0.5")
    if density is not None:
        check_share(density, "density")
    if not deltas:
        raise ArgumentError("nothing to fuse; give at least one .shd file")
    check_readable(deltas)
    check_target(Path(out), MAGIC, "a .shd file")
    if any(Path(path).exists() and Path(out).exists() and os.path.samefile(path, out) for path in deltas):
        raise ArgumentError(
            f"{os.fspath(out)} is one of the files to fuse, which the result would replace; name another"
        )
    checkpoint = None if base is None else open_checkpoint(local_model(base))
    options = _Options(method=row, drop=drop, density=density, seed=seed, checkpoint=checkpoint)
    with ExitStack() as stack:
        opened = [(stack.enter_context(open_delta(path, limit=limit)), strength) for path, strength in deltas.items()]
        opened.sort(key=lambda pair: pair[0].digest)
        check_distinct([delta for delta, _ in opened])
        strengths = [strengths_by_name(strength, delta, str(delta.file)) for delta, strength in opened]
        shapes = {
            name: tensor.shape
            for (delta, _), by_name in zip(opened, strengths, strict=True)
            for name, tensor in delta.items()
            if name in by_name
        }
        if not shapes and any(delta for delta, _ in opened):
            raise ArgumentError("all strengths are 0, so nothing is left; give a tensor a strength such as 0.7")
        names = sorted(shapes, key=str.encode)
        if checkpoint is not None:
            options = replace(options, names=match_names(shapes, checkpoint).names)
        shared = conflicts = nnz = 0
        with writing(out, values) as writer:

            def work(name: str) -> tuple[TensorDelta, int, int]:
                parts = [
                    (delta, delta[name], by_name[name])
                    for (delta, _), by_name in zip(opened, strengths, strict=True)
                    if name in by_name
                ]
                without = [
                    _strength_without(name, delta, strength)
                    for (delta, strength), by_name in zip(opened, strengths, strict=True)
                    if name not in by_name
                ]
                return _fuse_tensor(name, parts, without, options)

            for number, (name, fused) in enumerate(zip(names, ahead(work, names), strict=True)):
                if progress:
                    progress(name, number, len(names))
                tensor, met, opposed = fused
                writer.add(name, tensor)
                nnz, shared, conflicts = nnz + tensor.nnz, shared + met, conflicts + opposed
            parts_text = " + ".join(f"{described(s)} {Path(d.file or d.digest[:12]).name}" for d, s in opened)
            writer.metadata.update({"created_by": made_by(), "method": f"fuse {method}", "source": parts_text})
            if "seed" in row.options:
                writer.metadata["seed"] = str(seed)
            for key in ("base", "base_revision"):
                named = {delta.metadata[key] for delta, _ in opened if key in delta.metadata}
                if len(named) != 1:
                    break
                writer.metadata[key] = named.pop()
        return FuseReport(
            out=os.fspath(out),
            tensors=len(names),
            nnz=nnz,
            input_nnz=sum(delta.nnz for delta, _ in opened),
            shared=shared,
            conflicts=conflicts,
        )


def _strength_without(name: str, delta: Delta, strength: Strength) -> float:
    """The strength of a delta where it takes no part in a tensor: it was left out, or does not have it."""
    if name in delta:
        return 0.0
    return 1.0 if isinstance(strength, Mapping) else strength


def _fuse_tensor(
    name: str, parts: Sequence[Part], without: Sequence[float], options: _Options
) -> tuple[TensorDelta, int, int]:
    """Fuses one tensor.

    Args:
        name: the tensor's name.
        parts: the deltas that have it.
        without: the strengths of the others.
        options: how to fuse.

    Returns:
        (the fused tensor, elements that several inputs change, how many of these have opposite signs).
    """
    check_alike(name, parts)
    first = parts[0][1]
    if first.operation.restructures:
        known = first.base_fingerprint
        return TensorDelta(first.shape, None, first.bits(), first.dtype, first.op, base_fingerprint=known), 0, 0
    spec = spec_of(with_dtype(name, [delta for delta, _, _ in parts])[name])
    base = None
    if options.checkpoint is not None:
        in_base = _find_base(options.checkpoint, options.names.get(name), name, spec)
        spec, base = spec_of(options.checkpoint[in_base]), options.checkpoint.bits(in_base)
    most = min(sum(tensor.nnz for _, tensor, _ in parts), first.numel)
    adds = first.operation.adds
    in_windows = options.method.by_position or not adds
    _check_memory(name, parts, most, in_windows)
    tensors = [tensor for _, tensor, _ in parts]
    windows = side_by_side(tensors) if in_windows else iter([[(each.positions(), each.bits()) for each in tensors]])
    positions, values = (
        np.empty(most, np.int64),
        np.empty(most, np.float32 if adds else f"<u{first.record.element_size}"),
    )
    size = nonzeros = shared = conflicts = 0
    for window in windows:
        if adds:
            together = _overlaid(name, parts, without, window, options)
            own, fused = together.positions, _merged(name, together, options.method)
            met, opposed = together.meetings()
            nonzeros += together.nonzeros
        elif first.operation.shifts:
            own, fused, met, opposed = _sum_of_shifts(name, [each for each in window if each is not None])
        else:
            own, fused = _union_of_sets(name, [each for each in window if each is not None])
            met = opposed = 0
        shared, conflicts = shared + met, conflicts + opposed
        positions[size : size + own.size], values[size : size + own.size] = own, fused
        size += own.size
    positions, values = positions[:size], values[:size]
    if options.density is not None and adds:
        kept = largest(np.abs(values), count_for(options.density, first.numel))
        positions, values = positions[kept], values[kept]
        nonzeros = nonzeros if kept.size == size else -1  # fingerprints of the inputs no longer tell
        size = kept.size
    result = TensorDelta.trusted(
        shape=spec.shape,
        positions=positions,
        values=values,
        dtype=spec.dtype,
        op=first.op,
        base_bits=None if base is None else base[positions],
        base_fingerprint=_fingerprint(name, parts, size, nonzeros) if base is None and adds else None,
        draw=common_draw(tensors),
    )
    return result, shared, conflicts


def _check_memory(name: str, parts: Sequence[Part], nonzeros: int, in_windows: bool) -> None:
    """Checks that what fusing a tensor takes is within the limit.

    Raises:
        LimitError: it is not.
    """
    size = nonzeros * _RESULT + sum(tensor.record.unpacked_size for _, tensor, _ in parts)
    if not in_windows:
        size += sum(tensor.nnz for _, tensor, _ in parts) * _WHOLE
    most_allowed = max((delta for delta, _, _ in parts), key=lambda delta: delta.limit)
    most_allowed.check_memory(f"tensor {name!r}, fused,", size)


def _overlaid(
    name: str, parts: Sequence[Part], without: Sequence[float], window: Sequence[Window | None], options: _Options
) -> Overlay:
    """The contributions of all inputs to a window of a tensor, or to all of it."""
    nothing = np.zeros(0, np.int64), np.zeros(0, np.float32)
    contributions = [
        nothing if each is None else _contribution(name, part, each, options)
        for part, each in zip(parts, window, strict=True)
    ]
    strengths = [strength for _, _, strength in parts]
    return overlay(contributions + [nothing] * len(without), [*strengths, *without])


def _merged(name: str, together: Overlay, method: MergeMethod) -> Float32:
    """A value for each position of an overlay.  Raises DeltaError if one is not finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        fused = np.asarray(method.merge(together)).astype(np.float32, copy=False)
    if fused.shape != together.positions.shape:
        raise DeltaError(f"method {method.name} gives {fused.size} values for {together.positions.size} positions")
    if not np.all(np.isfinite(fused)):
        raise too_large(name)
    return fused


def _contribution(name: str, part: Part, window: Window, options: _Options) -> tuple[Positions, Float32]:
    """(positions, values) that one delta adds to a tensor, strength included, without those that the method drops."""
    delta, _, strength = part
    positions, bits = window
    values = scaled(bits.view(np.float32), strength)
    if not np.all(np.isfinite(values)):
        raise too_large(name)
    if options.method.chances is None:
        return positions, values
    keep = options.method.chances(values, options.drop)
    return drop_at_random(keep, positions, values, options.seed, delta.digest, name)


def _union_of_sets(name: str, windows: Sequence[Window]) -> Window:
    """(positions, bits) of all elements that the inputs set; no two inputs may set the same one."""
    try:
        return join_sorted(windows)
    except RepeatedPositionError as error:
        raise DeltaError(
            f"tensor {name!r}: element {error.position} is set by two inputs; leave one of them out"
        ) from None


def _sum_of_shifts(name: str, windows: Sequence[Window]) -> tuple[Positions, Array, int, int]:
    """Sums of shifts, without those that cancel out.

    Returns:
        (positions, bits, how many of them are of several inputs, how many of these have opposite signs).

    Raises:
        DeltaError: a sum does not fit.
    """
    merged = merge_sorted([positions for positions, _ in windows])
    bits_type = windows[0][1].dtype
    sums = np.zeros(merged.union.size, f"<i{bits_type.itemsize}")
    shifts = [bits.view(sums.dtype) for _, bits in windows]
    for at, by in zip(merged.indices, shifts, strict=True):
        before = sums[at]
        with np.errstate(over="ignore"):
            sums[at] = before + by
        if np.any(((before ^ sums[at]) & (by ^ sums[at])) < 0) or np.any(sums[at] == np.iinfo(sums.dtype).min):
            raise DeltaError(f"tensor {name!r}: the sum of two shifts does not fit; apply the inputs one by one")
    kept = sums != 0
    together = Overlay(merged.union, merged.shared() & kept, tuple(merged.indices), tuple(shifts), ())
    return merged.union[kept], sums[kept].view(bits_type), *together.meetings()


def _find_base(checkpoint: Checkpoint, found: str | None, name: str, spec: TensorSpec) -> str:
    """The name of a tensor in the base, once it has been checked.

    Raises:
        BaseMismatchError: the base does not have it, or its shape or dtype differs.
    """
    if found is None or difference(checkpoint[found], spec) is not None:
        raise BaseMismatchError(
            f"{checkpoint.root}: tensor {name!r} is missing or of another shape or dtype; give the inputs' base"
        )
    return found


def _fingerprint(name: str, parts: Sequence[Part], size: int, nonzeros: int) -> int | None:
    """The base's fingerprint at the union, if it follows from the inputs': a fingerprint is a sum over positions.

    Args:
        name: the tensor's name.
        parts: the deltas that have it.
        size: positions of the union.
        nonzeros: of all deltas together, without those that the method dropped.
    """
    known = [(tensor.nnz, tensor.base_fingerprint) for _, tensor, _ in parts]
    prints = [fingerprint for _, fingerprint in known if fingerprint is not None]
    if len(prints) < len(parts) or nonzeros < sum(nnz for nnz, _ in known):
        return None  # unknown, or the method dropped some positions
    if size == nonzeros:
        return sum(prints) % (1 << 64)
    if all(nnz == size for nnz, _ in known):
        if len(set(prints)) > 1:
            raise different_bases(name, [delta for delta, _, _ in parts])
        return prints[0]
    return None
