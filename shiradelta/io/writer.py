"""Writes `.shd` files: canonical bytes (spec/FORMAT.md, section 8), one tensor in memory at a time."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, cast

import numpy as np

from shiradelta.backends.choose import AUTO, choose
from shiradelta.backends.protocols import Backend
from shiradelta.errors import ArgumentError, DeltaError, FormatError
from shiradelta.format import arithmetic, container, registry
from shiradelta.format.arithmetic import Array, Positions
from shiradelta.format.codecs import BITS, INDEX_CODECS, ULP, VALUE_CODECS, VALUE_OPTIONS, smallest_index_codec
from shiradelta.format.delta import TensorDelta
from shiradelta.format.digest import TensorDigest, content_digest, tensor_digest
from shiradelta.format.header import crc32
from shiradelta.format.operations import OPERATIONS
from shiradelta.format.packed import Packer
from shiradelta.format.record import Record, Section, combination_problem
from shiradelta.format.windows import windows_of
from shiradelta.format.zstd import FAST, LEVEL, compressed
from shiradelta.io.reader import StoredTensor
from shiradelta.util.arguments import ArgumentKind, checked
from shiradelta.util.files import replacing

#: Sections are collected in memory up to this size, then on disk beside the output.
SPOOL_BYTES = 16 << 20
#: Called with positions, the bits of the base's elements there, and those of the result at strength 1.
SeesResult = Callable[[Positions, Array, Array], None]


class DeltaWriter:
    """Writes a `.shd` file, tensor by tensor in any order; encoded sections wait until all tensors are known.

    `writing` makes it, and moves the file into place.

    Attributes:
        metadata: what the file says about itself.
        packed: whether the file that was written is packed.
    """

    def __init__(self, spool: IO[bytes], values: str, zstd: bool, backend: str, packed: bool = False) -> None:
        self._spool, self._may_pack, self.packed = spool, packed, False
        self._codec = VALUE_OPTIONS.find(values)
        self._zstd = zstd
        self._level = LEVEL if zstd else None
        # Positions may need any index codec; a backend given by name uses only the codecs that it knows.
        index_ids = INDEX_CODECS.by_id if backend == AUTO else ()
        self._backend = choose(backend, index_ids, (self._codec.id, ULP.id, BITS.id))
        self._records: dict[str, Record] = {}
        self._digests: dict[str, bytes] = {}
        self.metadata: dict[str, str] = {}

    def add(
        self, name: str, tensor: TensorDelta, *, compress: bool = False, see: SeesResult | None = None
    ) -> TensorDelta:
        """Encodes one tensor; returns it as a reader will see it, with quantised values.

        Args:
            name: its name.
            tensor: the delta.
            compress: compress its sections fast where that helps, in a file in which others are not compressed.
            see: called with the elements that it changes, if the base's are known.

        Raises:
            DeltaError: a name that is taken or not allowed, values that do not fit the codec, or a tensor that a reader
            would refuse.
        """
        if name in self._records:
            raise ArgumentError(f"tensor {name!r} is given twice")
        try:
            container.check_name(name.encode())
        except (FormatError, UnicodeEncodeError) as error:
            raise ArgumentError(f"tensor name {name!r} is not allowed: {error}") from None
        self._level = LEVEL if self._zstd else FAST if compress else None
        try:
            record, stored = self._encode(name, tensor, see)
        except DeltaError as error:
            raise DeltaError(f"tensor {name!r}: {error}") from None
        self._records[name] = record
        self._digests[name] = tensor_digest(stored)
        return stored

    def add_set(
        self, name: str, at: StoredTensor, dtype: registry.DType, windows: Iterable[tuple[Positions, Array, Array]]
    ) -> Record:
        """Adds a SET of the elements at the positions of a tensor in another file, in little memory.

        The section of the positions is taken over as it is there; none is compressed.

        Args:
            name: the tensor's name; it is not checked again.
            at: a tensor of the same shape, whose positions these are.
            dtype: the elements' dtype.
            windows: (positions, new elements' bits, bits of what they replace) of consecutive nonzeros.

        Returns:
            The tensor's row of the table.

        Raises:
            FormatError: the other file is damaged.
        """
        digest = TensorDigest(OPERATIONS["set"], dtype, at.shape, at.nnz)
        for positions in at.position_windows():
            digest.update(positions)
        index = self._store_in_parts([at.section(at.record.index).tobytes()] if at.nnz else [])
        fingerprint, of_base, of_result = self._backend.fingerprint, 0, 0

        def parts() -> Iterator[bytes]:
            nonlocal of_base, of_result
            for positions, bits, base in windows:
                digest.update(bits)
                of_base, of_result = of_base + fingerprint(positions, base), of_result + fingerprint(positions, bits)
                yield bits.astype(bits.dtype.newbyteorder("<"), copy=False).tobytes()
            yield bytes(BITS.size(at.nnz, dtype.size) - at.nnz * dtype.size if at.nnz else 0)

        values = self._store_in_parts(parts())
        record = Record(
            name=name,
            shape=at.shape,
            dtype=dtype,
            operation=OPERATIONS["set"],
            index_codec=at.record.index_codec,
            value_codec=(BITS.id if at.nnz else registry.ValueId.NONE).value,
            nnz=at.nnz,
            base_fingerprint=of_base % (1 << 64),
            result_fingerprint=of_result % (1 << 64),
            index=index,
            values=values,
        )
        self._records[name], self._digests[name] = record, digest.digest()
        return record

    def add_sections(
        self, record: Record, digest: bytes, index: bytes, values: bytes, *, compress: bool = False
    ) -> None:
        """Adds a tensor as sections that are ready; nothing is checked again.

        Args:
            record: its row of the table, but for the sections.
            digest: the digest of what it does.
            index: the positions' section.
            values: the values' section.
            compress: compress both where that helps, in a file in which others are not compressed.
        """
        self._level = LEVEL if self._zstd or compress else None
        leads = (
            self._index_lead(record.index_codec, index, record.nnz, record.numel),
            self._values_lead(record.value_codec, values, record.nnz),
        )
        sections = [self._store(*each) for each in zip((index, values), leads, strict=True)]
        self._records[record.name] = replace(record, index=sections[0], values=sections[1])
        self._digests[record.name] = digest

    def drop_results(self, which: Callable[[Record], bool]) -> None:
        """Leaves out the fingerprints of the results of some of the tensors added so far."""
        for name, record in self._records.items():
            if which(record):
                self._records[name] = replace(record, result_fingerprint=None)

    def _store_in_parts(self, parts: Iterable[bytes]) -> Section:
        """Appends a section to the spool, part by part."""
        offset, size, crc = self._spool.tell(), 0, 0
        for part in parts:
            self._spool.write(part)
            size, crc = size + len(part), crc32(part, crc)
        self._spool.write(bytes(-size % registry.SECTION_ALIGNMENT))
        return Section(offset, size, size, crc)

    def _encode(self, name: str, tensor: TensorDelta, see: SeesResult | None) -> tuple[Record, TensorDelta]:
        operation = tensor.operation
        index_id, value_id = registry.IndexId.NONE.value, registry.ValueId.NONE.value
        index = values = Section(0, 0, 0, 0)
        stored = tensor
        if tensor.nnz:
            positions = tensor.positions()
            index_id = smallest_index_codec(positions, tensor.shape, self._backend.index_codecs)
            section = self._backend.index_codecs[index_id].encode(positions, tensor.shape)
            index = self._store(section, self._index_lead(index_id, section, tensor.nnz, tensor.numel))
            value_id = self._codec.id if operation.adds else (ULP if operation.shifts else BITS).id
            values, decoded = self._store_values(tensor, value_id)
            stored = TensorDelta.trusted(
                shape=tensor.shape,
                positions=None if operation.creates else positions,
                values=decoded,
                dtype=tensor.dtype,
                op=tensor.op,
                base_bits=tensor.base_bits,
            )
        base_fingerprint, result_fingerprint = _fingerprints(tensor, stored, self._backend, see)
        record = Record(
            name=name,
            shape=tensor.shape,
            dtype=registry.DTYPE_OF_NAME[tensor.dtype],
            operation=operation,
            index_codec=index_id,
            value_codec=value_id,
            nnz=tensor.nnz,
            base_fingerprint=base_fingerprint,
            result_fingerprint=result_fingerprint,
            index=index,
            values=values,
        )
        problem = combination_problem(record)
        if problem:
            raise DeltaError(problem)
        return record, stored

    def _store_values(self, tensor: TensorDelta, id: int) -> tuple[Section, Array]:
        """Encodes values: (the VALUES section, the values as a reader will decode them)."""
        codec, count = self._backend.value_codecs[id], tensor.nnz
        payload = codec.encode(tensor.values() if tensor.operation.adds else tensor.bits())
        size = registry.DTYPE_OF_NAME[tensor.dtype].size
        stored = self._store(payload, self._values_lead(id, payload, count))
        return stored, codec.decode(np.frombuffer(payload, np.uint8), count, size, 0, count)

    def _store(self, payload: bytes, lead: int) -> Section:
        """Appends a section to the spool; returns its offset there.

        Args:
            payload: the section.
            lead: how many of its first bytes are compressed together with those of all others if the file is packed.
        """
        frame = None if self._level is None else compressed(payload, self._level)
        if frame is not None and self._may_pack and len(frame) > len(payload) - lead * 3 // 4 - registry.SLACK:
            frame = None
        stored = payload if frame is None else frame
        offset = self._spool.tell()
        self._spool.write(container.pad_section(stored))
        return Section(offset, len(stored), len(payload), crc32(stored), frame is not None)

    @property
    def digest(self) -> str:
        """The content digest, hexadecimal, of the tensors added so far."""
        return content_digest((name, self._digests[name]) for name in sorted(self._records, key=str.encode)).hex()

    @property
    def size(self) -> int:
        """Size of the file in bytes, with the tensors added so far."""
        names_size = sum(len(name.encode()) for name in self._records)
        return container.payload_start(len(self._records), names_size, self.metadata) + self._spool.tell()

    def finish(self, output: IO[bytes]) -> str:
        """Writes the file; returns its content digest, hexadecimal."""
        names = sorted(self._records, key=str.encode)
        names_size = sum(len(name.encode()) for name in names)
        if len(names) > registry.MAX_TENSORS or names_size > registry.MAX_NAMES_SIZE:
            raise DeltaError(
                f"{len(names)} tensors with {names_size} bytes of names; a file holds at most "
                f"{registry.MAX_TENSORS} with {registry.MAX_NAMES_SIZE}"
            )
        metadata_size = len(container.build_metadata(self.metadata))
        if metadata_size > registry.MAX_METADATA_SIZE or "" in self.metadata:
            raise DeltaError(
                f"metadata of {metadata_size} bytes (at most {registry.MAX_METADATA_SIZE}), or an empty key"
            )
        start = container.payload_start(len(names), names_size, self.metadata)
        cursor, records, spooled = start, [], [self._records[name] for name in names]
        for record in spooled:
            index = record.index.at(cursor)
            values = record.values.at(index.end)
            cursor = values.end
            records.append(replace(record, index=index, values=values))
        digest = self.digest
        header, parts = container.front(records, self.metadata, bytes.fromhex(digest), cursor)
        if self._may_pack:
            packer = Packer(header, parts, spooled, [self._leads(record) for record in spooled], self._read)
            self.packed = packer.pays
            if self.packed:
                packer.write(output)
                return digest
        output.write(b"".join((header.to_bytes(), *map(container.pad_section, parts))))
        for record in spooled:
            for section in record.index, record.values:
                self._spool.seek(section.offset)
                _copy(self._spool, output, section.end - section.offset)
        return digest

    def _read(self, offset: int, size: int) -> bytes:
        """Bytes of the spool."""
        self._spool.seek(offset)
        return self._spool.read(size)

    def _leads(self, record: Record) -> tuple[int, int]:
        """How many first bytes of both sections a packed file has beside its table."""
        index, values = (self._read(each.offset, each.stored) for each in (record.index, record.values))
        return (
            0 if record.index.zstd else self._index_lead(record.index_codec, index, record.nnz, record.numel),
            0 if record.values.zstd else self._values_lead(record.value_codec, values, record.nnz),
        )

    def _index_lead(self, id: int, section: bytes, nnz: int, numel: int) -> int:
        """The lead of an INDEX section that is not compressed; 0 in a file that is not packed."""
        data = np.frombuffer(section, np.uint8)
        return INDEX_CODECS.by_id[id].lead(data, nnz, numel) if self._may_pack and nnz else 0

    def _values_lead(self, id: int, section: bytes, nnz: int) -> int:
        """As `_index_lead`, of VALUES."""
        return VALUE_CODECS.by_id[id].lead(np.frombuffer(section, np.uint8), nnz) if self._may_pack and nnz else 0


def _copy(source: IO[bytes], target: IO[bytes], size: int) -> None:
    while size:
        chunk = source.read(min(size, 1 << 20))
        target.write(chunk)
        size -= len(chunk)


def _fingerprints(
    tensor: TensorDelta, stored: TensorDelta, backend: Backend, see: SeesResult | None
) -> tuple[int | None, int | None]:
    """Fingerprints of the base and of the result at strength 1; None if the base is unknown."""
    if tensor.dtype == "unspecified":
        return None, None
    base, operation = tensor.base_bits, tensor.operation
    if not operation.in_result or (base is None and not operation.stores_elements):
        # Where the values stay as they are, so does the result.
        same = tensor.result_fingerprint is not None and np.array_equal(stored.bits(), tensor.bits())
        return tensor.base_fingerprint, tensor.result_fingerprint if same else None
    of_base = of_result = start = 0
    for positions, bits in windows_of(stored):
        old = None if base is None else base[start : start + positions.size]
        start += positions.size
        if old is not None:
            of_base += backend.fingerprint(positions, old)
            bits = arithmetic.result(operation, bits, old, tensor.dtype, 1)
            if see is not None:
                see(positions, old, bits)
        of_result += backend.fingerprint(positions, bits)
    known = tensor.base_fingerprint if base is None else of_base % (1 << 64)
    return (known if operation.in_base else None), of_result % (1 << 64)


class _Scale:
    """A spool that keeps only the size of what is written to it."""

    def __init__(self) -> None:
        self._at = 0

    def write(self, data: bytes) -> int:
        self._at += len(data)
        return len(data)

    def tell(self) -> int:
        return self._at


def weighing(values: str = "int4", zstd: bool = False, backend: str = "auto") -> DeltaWriter:
    """A `DeltaWriter` that writes nothing; only its `size` is of use."""
    return DeltaWriter(cast(IO[bytes], _Scale()), values, zstd, backend)


@contextmanager
def writing(
    path: str | os.PathLike[str], values: str = "int4", zstd: bool = False, backend: str = "auto", packed: bool = False
) -> Iterator[DeltaWriter]:
    """A context with a `DeltaWriter`; its file replaces `path` atomically if the block succeeds.  See `writing_to`.

    Raises:
        TargetError: the file cannot be written; `path` is unchanged.
    """
    target = Path(path)
    with replacing(target) as output, writing_to(output, values, zstd, backend, target.parent, packed) as writer:
        yield writer


@contextmanager
def writing_to(
    output: IO[bytes],
    values: str = "int4",
    zstd: bool = False,
    backend: str = "auto",
    scratch: Path | None = None,
    packed: bool = False,
) -> Iterator[DeltaWriter]:
    """A context with a `DeltaWriter` that writes to an open file when the block succeeds.

    Args:
        output: the file.
        values: how added values are stored.
        zstd: compress sections where that helps.
        backend: a name of `shiradelta.backends.choose.FILE_BACKENDS`, or "auto".
        scratch: the folder of a nameless file for what is too large for memory; None for the system's.
        packed: pack the file where that makes it smaller: for one on its way or in an archive, which is unpacked to be
            read.
    """
    with tempfile.SpooledTemporaryFile(SPOOL_BYTES, dir=None if scratch is None else str(scratch)) as spool:
        writer = DeltaWriter(spool, values, zstd, backend, packed)
        yield writer
        writer.finish(output)


def _are_deltas(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(name, str) for name in value)


@checked(tensors=ArgumentKind("a mapping of names to TensorDelta", _are_deltas))
def save_delta(
    path: str | os.PathLike[str],
    tensors: Mapping[str, TensorDelta],
    metadata: Mapping[str, str] | None = None,
    values: str = "int4",
    *,
    zstd: bool = False,
    backend: str = "auto",
) -> None:
    """Writes tensor deltas to a `.shd` file: canonical bytes, put in place atomically.

    Args:
        path: the file.
        tensors: name -> delta; taken one at a time, so a lazy mapping keeps memory small.
        metadata: free pairs of strings (spec/REGISTRY.md lists keys in use).
        values: how added values are stored, "int4" for example (`VALUE_OPTIONS` has all of them); set
            and new are always exact.
        zstd: compress sections where that helps.  For archives: such a file is slower to swap.
        backend: a name of `shiradelta.backends.choose.FILE_BACKENDS`, or "auto" for the fastest that knows the codecs;
            the bytes are the same.

    Raises:
        ArgumentError: an unknown codec or backend, or a backend that does not know the codec.
        DeltaError: something that the format cannot hold.
        TargetError: the file cannot be written.
    """
    with writing(path, values, zstd, backend) as writer:
        writer.metadata.update(metadata or {})
        for name, tensor in tensors.items():
            writer.add(name, tensor)
