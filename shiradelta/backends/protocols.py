"""The seam between the format and the code that works on its bits: NumPy's, which defines them, or libshd's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from shiradelta.format.arithmetic import Array, Float32, Positions
from shiradelta.format.codecs.base import Bytes, IndexCodec, ValueCodec
from shiradelta.format.container import Record
from shiradelta.format.registry import IndexCodec as IndexId
from shiradelta.format.registry import ValueCodec as ValueId


class Decoder(Protocol):
    """Decodes and applies the tensors of one open file, each section checked.  Raises FormatError."""

    def positions(self, record: Record) -> Positions:
        """int64 [nnz], nnz > 0."""

    def bits(self, record: Record) -> Array:
        """Unsigned [nnz], nnz > 0: binary32 of the values for ADD, elements otherwise."""

    def between(self, record: Record, start: int, stop: int) -> tuple[Positions, Array]:
        """Positions in [start, stop) and their bits; reads only the blocks that hold them, no checksums."""

    def check(self, record: Record) -> None:
        """Goes over everything that `positions` and `bits` would, and keeps nothing; threads may do so at a time."""

    def patch(self, record: Record, weight: Array, dtype: str, strength: float) -> None:
        """Applies a tensor's delta to all its elements' bits, flat and writable.  Dtypes are known to fit."""


@dataclass(frozen=True)
class Backend:
    """One implementation of everything that touches many elements."""

    name: str
    decoder: Callable[[Bytes, str | None, tuple[Record, ...]], Decoder]  # (a file's bytes, its name, its table)
    index_codecs: Mapping[IndexId, IndexCodec]
    value_codecs: Mapping[ValueId, ValueCodec]
    fingerprint: Callable[[Positions, Array], int]
    at_least: Callable[[Float32, float], Positions]  # indices of |x| >= threshold > 0
