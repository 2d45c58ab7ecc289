"""The two forms of a delta: a plain one, and a smaller one that is read with its base only (FORMAT.md, 4.7 and 5.2).

Whatever works on deltas works on the plain form.  So a file of the other form is turned into it as soon as the base is
at hand; the digest, which is that of both, tells whether the base was the right one.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from shiradelta.backends.choose import choose
from shiradelta.errors import FormatError
from shiradelta.format import arithmetic, registry
from shiradelta.format.arithmetic import Array
from shiradelta.format.codecs import (
    INDEX_CODECS,
    SEEDED,
    ULP,
    VALUE_CODECS,
)
from shiradelta.format.codecs.base import Bytes
from shiradelta.format.codecs.smallest import smallest_section
from shiradelta.format.delta import TensorDelta
from shiradelta.format.digest import tensor_digest
from shiradelta.format.record import Record
from shiradelta.format.registry import IndexId
from shiradelta.format.zstd import FAST, compressed
from shiradelta.io.reader import Delta, StoredTensor, default_limit, parse_delta
from shiradelta.io.restored import Elements, Located, codecs_on_base, locating, with_values
from shiradelta.io.writer import DeltaWriter, writing_to
from shiradelta.util.files import temporary_errors
from shiradelta.util.mapping import map_file
from shiradelta.util.progress import Progress
from shiradelta.util.threads import THREADS, ahead

#: Bytes that encoding a tensor with its base takes for each of its decoded ones, about.
_ENCODED = 6
#: What is taken for known where a file is read.
CONTEXTS = ("none", "base")
#: All elements' bits, flat, of the base of a file's tensor.  Raises FormatError ("wrong_base") where there is none.
Base = Callable[[Record], Array]
#: The same, or where the elements are, if NumPy does not see them.
AnyBase = Callable[[Record], Array | Elements]


@dataclass(frozen=True)
class _Sections:
    """A tensor's sections, each with its codec's id."""

    index_codec: int
    index: bytes
    value_codec: int
    values: bytes

    def index_taken(self, record: Record) -> int:
        """What INDEX takes of a packed file, in which the first bytes are compressed."""
        data = np.frombuffer(self.index, np.uint8)
        return _taken(data, INDEX_CODECS.by_id[self.index_codec].lead(data, record.nnz, record.numel))

    def values_taken(self, record: Record) -> int:
        """What VALUES takes."""
        data = np.frombuffer(self.values, np.uint8)
        return _taken(data, VALUE_CODECS.by_id[self.value_codec].lead(data, record.nnz))


def _taken(section: Bytes, lead: int) -> int:
    frame = compressed(section[:lead].tobytes(), FAST)
    return section.size - lead + (lead if frame is None else len(frame))


#: What is left to do for a tensor, on any thread: (what it does, its sections in the other form).
_Work = Callable[[], tuple[TensorDelta, _Sections]]


class WrittenForm(NamedTuple):
    """What a file became: read with its base only, or packed."""

    needs_base: bool
    packed: bool


def write_plain(
    delta: Delta,
    base: AnyBase,
    output: IO[bytes],
    progress: Progress | None = None,
    *,
    scratch: Path | None = None,
    zstd: bool = False,
    passing: bool = False,
    threads: int = 1,
) -> None:
    """Writes a file that does the same and needs no base to be read.

    Args:
        delta: the file.
        base: the elements that it was made for.
        output: where to write.
        progress: called with (tensor, done, total).
        scratch: the folder of a nameless file for what is too large for memory; None for the system's.
        zstd: compress the sections of tensors that have compressed ones, where that helps.
        passing: the file is read once and thrown away, so no time is spent on making it smaller, and who reads it
            compares the base.
        threads: tensors that are in memory at a time, each on a thread of its own, as far as the file's limit allows.

    Raises:
        FormatError: the file is damaged, or was made for another base.
    """
    backend = choose(index_ids=INDEX_CODECS.by_id)
    codecs = {id: codec for id, codec in backend.index_codecs.items() if not passing or id == IndexId.RICE}

    def plain(stored: StoredTensor) -> _Work:
        if stored.record.needs_base:
            return partial(encoded, stored, locating(stored, base(stored.record)))
        if delta.needs_base and lacks_result(stored.record):
            find = locating(stored, base(stored.record))
            return lambda: (with_values(stored, find()), _as_stored(stored))
        return lambda: (stored, _as_stored(stored))

    def encoded(stored: StoredTensor, find: Callable[[], Located]) -> tuple[TensorDelta, _Sections]:
        tensor, kept = with_values(stored, find()), _as_stored(stored)
        codec, index = smallest_section(tensor.positions(), tensor.shape, codecs, tensor.draw)
        kept = replace(kept, index_codec=codec, index=index)
        if tensor.operation.shifts:
            kept = replace(kept, value_codec=ULP.id, values=ULP.encode(tensor.bits()))
        return tensor, kept

    threads = min(threads, _threads(delta, 1))
    _write(delta, plain, output, progress, scratch, zstd, threads=threads, passing=passing)


def write_on_base(
    delta: Delta, base: Base, output: IO[bytes], progress: Progress | None = None, *, scratch: Path | None = None
) -> WrittenForm:
    """Writes a file that does the same, on its way to where the base is: packed, and read with its base only.

    Each where it makes the file smaller.  Sections of tensors that have compressed ones are compressed, too.  Args
    and errors are those of `write_plain`; tensors are encoded on all threads that the file's limit has memory for.
    """

    def small(stored: StoredTensor) -> _Work:
        record = stored.record
        if not record.nnz or stored.operation.creates or not record.may_need_base:
            return lambda: (stored, _as_stored(stored))
        return partial(on_base, stored, base(record))

    def on_base(stored: StoredTensor, elements: Array) -> tuple[TensorDelta, _Sections]:
        kept, record, everything = _as_stored(stored), stored.record, stored.all_positions
        positions = None if everything else stored.positions()
        at = elements if positions is None else elements[positions]
        if record.base_fingerprint not in (None, _fingerprint(stored, at)):
            raise FormatError("wrong_base", tensor=record.name, file=stored.file)
        index_codec, value_codec = codecs_on_base()
        # A draw stays, so that the way back finds it, and so do all positions, which take no bytes.
        index = None
        if positions is not None and record.index_codec != SEEDED.id:
            index = index_codec.encode_on(positions, stored.shape, elements)
        if index is not None:
            other = replace(kept, index_codec=index_codec.id, index=index)
            kept = min(kept, other, key=lambda each: each.index_taken(record))
        if stored.operation.shifts:
            other = replace(kept, value_codec=value_codec.id, values=value_codec.encode_on(stored.bits(), at))
            kept = min(kept, other, key=lambda each: each.values_taken(record))
        return stored, kept

    if delta.needs_base:
        raise FormatError("base_needed", file=delta.file)
    threads = _threads(delta, _ENCODED)
    return _write(delta, small, output, progress, scratch, zstd=True, packed=True, threads=threads)


def plain_delta(delta: Delta, base: Base, progress: Progress | None = None, *, passing: bool = True) -> Delta:
    """A delta that does the same and needs no base to be read; it is in a nameless temporary file, until it is closed.

    Args and errors are those of `write_plain`, and TargetError where there is no room for that file.  Where its
    sections are taken over into another file, it is not `passing`.
    """
    with temporary_errors(), tempfile.TemporaryFile() as stream:
        write_plain(delta, base, stream, progress, passing=passing)
        stream.flush()
        mapped = map_file(stream.fileno(), delta.file or "delta", os.fstat(stream.fileno()).st_size)
    return parse_delta(np.frombuffer(mapped, np.uint8), delta.file, mapped=mapped, limit=delta.limit)


def _threads(delta: Delta, size: int) -> int:
    """How many threads may work where each takes `size` times as much memory as the largest tensor decoded."""
    largest = max((stored.record.decoded_size for stored in delta.values()), default=0)
    room = min(delta.limit, default_limit(delta.sizes["file"]))  # a file of our own may have no limit
    return max(1, min(THREADS, room // max(size * largest, 1)))


def _fingerprint(stored: StoredTensor, at: Array) -> int:
    """The fingerprint of the base's elements at a tensor's positions, in little memory."""
    found = start = 0
    for positions in stored.position_windows():
        found += choose().fingerprint(positions, at[start : start + positions.size])
        start += positions.size
    return found % (1 << 64)


def _as_stored(stored: StoredTensor) -> _Sections:
    record = stored.record
    index, values = (stored.section(each).tobytes() for each in (record.index, record.values))
    return _Sections(record.index_codec, index, record.value_codec, values)


def _write(
    delta: Delta,
    other_form: Callable[[StoredTensor], _Work],
    output: IO[bytes],
    progress: Progress | None,
    scratch: Path | None,
    zstd: bool,
    packed: bool = False,
    threads: int = 1,
    passing: bool = False,
) -> WrittenForm:
    """Writes the other form of every tensor, and compares the digests."""
    needs_base = False

    def begun() -> Iterator[tuple[StoredTensor, _Work]]:
        for number, (name, stored) in enumerate(delta.items()):
            if progress:
                progress(name, number, len(delta))
            yield stored, other_form(stored)

    def finished(each: tuple[StoredTensor, _Work]) -> tuple[StoredTensor, Record, bytes, _Sections]:
        stored, work = each
        tensor, sections = work()
        record = stored.record._replace(index_codec=sections.index_codec, value_codec=sections.value_codec)
        if not packed:
            record = _with_result(record, tensor, passing, delta.file)
        return stored, record, tensor_digest(tensor), sections

    every = map(finished, begun()) if threads < 2 else ahead(finished, begun(), threads - 1)
    with writing_to(output, "f32", scratch=scratch, packed=packed) as writer:
        writer.metadata.update(delta.metadata)
        for stored, record, digest, sections in every:
            compress = zstd and (stored.record.index.zstd or stored.record.values.zstd)
            writer.add_sections(record, digest, sections.index, sections.values, compress=compress)
            needs_base |= record.needs_base
        if packed and needs_base:
            writer.drop_results(_follows)
        _check_digest(writer, delta)
    return WrittenForm(needs_base, writer.packed)


def _follows(record: Record) -> bool:
    """Whether the fingerprint of the result follows from the base, which can be told by its own."""
    return record.base_fingerprint is not None and record.nnz > 0 and not record.operation.restructures


def lacks_result(record: Record) -> bool:
    """Whether a fingerprint of the result is left out that follows from the base."""
    return record.result_fingerprint is None and _follows(record)


def _with_result(record: Record, tensor: TensorDelta, passing: bool, file: str | None) -> Record:
    """A record with the fingerprint of the result, which a file that is read with its base only leaves out.

    Raises:
        FormatError: the tensor is not the base's, though it decoded, and whoever reads the file may not notice.
    """
    base = tensor.base_bits
    if base is None or not lacks_result(record):
        return record
    positions, fingerprint = tensor.positions(), choose().fingerprint
    if fingerprint(positions, base) != record.base_fingerprint:
        if passing:
            return record
        raise FormatError("wrong_base", tensor=record.name, file=file)
    result = arithmetic.result(tensor.operation, tensor.bits(), base, tensor.dtype, 1)
    return record._replace(result_fingerprint=fingerprint(positions, result))


def _check_digest(writer: DeltaWriter, delta: Delta) -> None:
    if writer.digest != delta.digest:
        reason = "wrong_base" if delta.needs_base else "digest_mismatch"
        raise FormatError(reason, offset=registry.DIGEST_OFFSET, file=delta.file)
