"""The protocols of file backends: NumPy's, which is the reference, and libshd's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shiradelta.format.arithmetic import Array, Float32, Positions
from shiradelta.format.codecs import INDEX_CODECS, VALUE_CODECS
from shiradelta.format.codecs.base import Bytes, IndexCodec, ValueCodec
from shiradelta.format.record import Record, Section
from shiradelta.format.table import Table


class Decoder(Protocol):
    """Decodes and applies the tensors of one open file, each section checked.  Raises FormatError.

    Attributes:
        records: the file's table.
    """

    records: Sequence[Record]

    def positions(self, record: Record) -> Positions:
        """int64 [nnz], nnz > 0."""

    def bits(self, record: Record) -> Array:
        """Unsigned [nnz], nnz > 0: binary32 of the values for ADD, elements otherwise."""

    def section(self, record: Record, which: Section, checked: bool = False) -> Bytes:
        """A section of a record, decompressed; only its checksum is checked, if it has not been."""

    def position_windows(self, record: Record) -> Iterator[Positions]:
        """What `positions` gives, in runs of at most `WINDOW`; all is checked when the last one was taken."""

    def bits_windows(self, record: Record) -> Iterator[Array]:
        """What `bits` gives, in runs of at most `WINDOW`; all is checked when the last one was taken."""

    def between(self, record: Record, start: int, stop: int) -> tuple[Positions, Array]:
        """Positions in [start, stop) and their bits; reads only the blocks that hold them, and no checksums."""

    def runs(
        self, record: Record, spans: Sequence[tuple[int, int]], checked: bool = False
    ) -> list[tuple[int, Positions]]:
        """(rank of the first, positions) of the nonzeros in several spans of positions, (start, stop).

        All of the tensor is checked before, unless it has been.
        """

    def bits_from(self, record: Record, rank: int, count: int) -> Array:
        """What `bits` gives of the nonzeros from a rank on, of a tensor that has been checked."""

    def check(self, record: Record) -> None:
        """Checks everything that `positions` and `bits` check, without keeping it; safe in several threads."""

    def check_of(self, numbers: NDArray[np.int64]) -> Callable[[], None]:
        """A function that checks tensors of these numbers as `check` does, in as few steps as the decoder can."""

        def check() -> None:
            for number in numbers.tolist():
                self.check(self.records[number])

        return check

    def patch(self, record: Record, weight: Array, dtype: str, strength: float) -> None:
        """Applies a tensor's delta to all its elements' bits, flat and writable.  Dtypes are known to fit."""


@dataclass(frozen=True)
class Backend:
    """One implementation of everything that touches many elements.

    Attributes:
        name: what a user calls it.
        decoder: makes the decoder of a file from its bytes, its name and its table.
        index_codecs: id -> codec, for the codecs that it decodes and encodes.
        value_codecs: the same for values.
        fingerprint: of elements' bits at positions (FORMAT.md, 6.3).
        at_least: indices of |x| >= threshold > 0.
        accepts: makes all checks that opening a file does, of bytes; None if the backend leaves them to
            `shiradelta.format.container`.
    """

    name: str
    decoder: Callable[[Bytes, str | None, Table], Decoder]
    index_codecs: Mapping[int, IndexCodec]
    value_codecs: Mapping[int, ValueCodec]
    fingerprint: Callable[[Positions, Array], int]
    at_least: Callable[[Float32, float], Positions]
    accepts: Callable[[Bytes], bool] | None = None

    def unknown_codec(self, index_ids: Iterable[int], value_ids: Iterable[int]) -> str | None:
        """Names a codec of these ids that the backend does not know; None if it knows all of them."""
        for known, ids, registry in (
            (self.index_codecs, index_ids, INDEX_CODECS),
            (self.value_codecs, value_ids, VALUE_CODECS),
        ):
            for id in ids:
                if id not in known:
                    return f"{registry.kind} {registry.by_id[id].name} (id {id})"
        return None
