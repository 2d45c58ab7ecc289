"""Writes `.shd` files: canonical bytes (spec/FORMAT.md, section 8), one tensor in memory at a time."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

import numpy as np

from shiradelta.backends.choose import AUTO, choose
from shiradelta.errors import ArgumentError, DeltaError, FormatError
from shiradelta.format import container, registry
from shiradelta.format.arithmetic import Array, Positions
from shiradelta.format.codecs import BITS, INDEX_CODECS, ULP, VALUE_CODECS, VALUE_OPTIONS
from shiradelta.format.delta import TensorDelta
from shiradelta.format.digest import TensorDigest, content_digest
from shiradelta.format.header import crc32
from shiradelta.format.operations import OPERATIONS
from shiradelta.format.packed import Packer
from shiradelta.format.record import Record, Section
from shiradelta.format.zstd import FAST, LEVEL, compressed
from shiradelta.io.encoded import Encoded, SeesResult, encoded
from shiradelta.io.reader import StoredTensor
from shiradelta.util.arguments import ArgumentKind, checked
from shiradelta.util.files import replacing

#: Sections are collected in memory up to this size, then on disk beside the output.
SPOOL_BYTES = 16 << 20


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
        made, stored = self._encoded(name, tensor, see)
        self.add_encoded(made, compress=compress)
        return stored

    def encode(self, name: str, tensor: TensorDelta) -> Encoded:
        """What `add` makes of one tensor, in its sections' memory; several threads may call it at a time.

        Raises:
            DeltaError: as `add`, but for a name that is taken.
        """
        return self._encoded(name, tensor, None)[0]

    def _encoded(self, name: str, tensor: TensorDelta, see: SeesResult | None) -> tuple[Encoded, TensorDelta]:
        try:
            container.check_name(name.encode())
        except (FormatError, UnicodeEncodeError) as error:
            raise ArgumentError(f"tensor name {name!r} is not allowed: {error}") from None
        try:
            return encoded(name, tensor, self._codec, self._backend, see)
        except DeltaError as error:
            raise DeltaError(f"tensor {name!r}: {error}") from None

    def add_encoded(self, tensor: Encoded, *, compress: bool = False) -> None:
        """Adds what `encode` made, as `add` does.

        Raises:
            ArgumentError: its name is taken.
        """
        if tensor.record.name in self._records:
            raise ArgumentError(f"tensor {tensor.record.name!r} is given twice")
        level = LEVEL if self._zstd else FAST if compress else None
        self._put(tensor.record, tensor.digest, (tensor.index, tensor.values), level)

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
        self._put(record, digest, (index, values), LEVEL if self._zstd or compress else None)

    def _put(self, record: Record, digest: bytes, sections: tuple[bytes, bytes], level: int | None) -> None:
        """Appends both sections to the spool, compressed at a level where that helps."""
        leads = (
            self._index_lead(record.index_codec, sections[0], record.nnz, record.numel),
            self._values_lead(record.value_codec, sections[1], record.nnz),
        )
        index, values = (self._store(*each, level) for each in zip(sections, leads, strict=True))
        self._records[record.name] = record._replace(index=index, values=values)
        self._digests[record.name] = digest

    def drop_results(self, which: Callable[[Record], bool]) -> None:
        """Leaves out the fingerprints of the results of some of the tensors added so far."""
        for name, record in self._records.items():
            if which(record):
                self._records[name] = record._replace(result_fingerprint=None)

    def _store_in_parts(self, parts: Iterable[bytes]) -> Section:
        """Appends a section to the spool, part by part."""
        offset, size, crc = self._spool.tell(), 0, 0
        for part in parts:
            self._spool.write(part)
            size, crc = size + len(part), crc32(part, crc)
        self._spool.write(bytes(-size % registry.SECTION_ALIGNMENT))
        return Section(offset, size, size, crc)

    def _store(self, payload: bytes, lead: int, level: int | None) -> Section:
        """Appends a section to the spool; returns its offset there.

        Args:
            payload: the section.
            lead: how many of its first bytes are compressed together with those of all others if the file is packed.
            level: compress it at this level where that helps; None for never.
        """
        frame = None if level is None else compressed(payload, level)
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
            records.append(record._replace(index=index, values=values))
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
