"""Checks that deltas can be combined: the same base, the same operations, values in range."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from shiradelta.errors import ArgumentError, BaseMismatchError, DeltaError
from shiradelta.io.reader import Delta, StoredTensor, explained, local_source
from shiradelta.models.compatibility import Misfit, check_strength, difference
from shiradelta.util.regular_file import open_regular

#: (a delta, its change of one tensor, its strength).
Part = tuple[Delta, StoredTensor, float]


def check_readable(files: Iterable[str | os.PathLike[str]]) -> None:
    """Checks that files are there and can be read, before anything is said of the file to write.

    Raises:
        ShiraDeltaError: one cannot be read.
    """
    for file in files:
        path = Path(local_source(file))
        with explained(path), open_regular(path):
            pass


def check_distinct(deltas: Sequence[Delta]) -> None:
    """Checks that no delta is given twice.

    Raises:
        DeltaError: two deltas are the same.
    """
    for one, other in pairwise(sorted(deltas, key=lambda delta: delta.digest)):
        if one.digest == other.digest:
            raise ArgumentError(f"{one.file} and {other.file} are the same delta; give it once, with one strength")


def check_alike(name: str, parts: Sequence[Part]) -> None:
    """Checks that several deltas of one tensor can be combined.

    Raises:
        BaseMismatchError: they were made against tensors of different shapes or dtypes.
        DeltaError: their operations differ, or cannot be combined, or cannot have their strengths.
    """
    check_same_base(name, [delta for delta, _, _ in parts])
    delta, first, _ = parts[0]
    for other_delta, other, strength in parts:
        if other.op != first.op or (len(parts) > 1 and other.operation.restructures):
            pair = f"{delta.file} and {other_delta.file}: tensor {name!r}"
            raise DeltaError(f"{pair} is {first.op} in one and {other.op} in the other; apply them one by one")
        check_strength(f"{other_delta.file}: tensor {name!r}", strength, [other.operation])


def with_dtype(name: str, deltas: Sequence[Delta]) -> Delta:
    """The first delta that specifies the base's dtype; the first delta if none does."""
    return next((delta for delta in deltas if delta[name].dtype != "unspecified"), deltas[0])


def check_same_base(name: str, deltas: Sequence[Delta]) -> None:
    """Checks that deltas of one tensor agree on its shape and dtype.

    Raises:
        BaseMismatchError: two of them do not.
    """
    one = with_dtype(name, deltas)
    for other in deltas:
        a, b = one[name], other[name]
        pair, found = f"{one.file} and {other.file}: tensor {name!r}", difference(a, b)
        if found is Misfit.SHAPE:
            raise BaseMismatchError(f"{pair} has shapes {list(a.shape)} and {list(b.shape)}; take deltas of one base")
        if found is Misfit.DTYPE:
            raise BaseMismatchError(f"{pair} was made against {a.dtype} and {b.dtype}; take deltas of one base")


def different_bases(name: str, deltas: Sequence[Delta]) -> BaseMismatchError:
    """The error for fingerprints that differ at the same positions."""
    files = " and ".join(str(delta.file) for delta in deltas)
    return BaseMismatchError(f"{files}: tensor {name!r} was made against different bases; take deltas of one base")


def too_large(name: str) -> DeltaError:
    """The error for a strength or a sum that takes values out of range."""
    return DeltaError(f"tensor {name!r}: the changes become larger than float32 holds; take smaller strengths")
