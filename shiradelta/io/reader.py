"""Opens `.shd` files: maps the file, and decodes one tensor at a time."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from shiradelta.backends.choose import choose
from shiradelta.backends.protocols import Backend, Decoder
from shiradelta.errors import ArgumentError, DeltaError, FormatError, LimitError, ShiraDeltaError
from shiradelta.format import container, registry
from shiradelta.format.arithmetic import Array, Float32, Positions
from shiradelta.format.codecs import SEEDED
from shiradelta.format.codecs.base import Bytes
from shiradelta.format.codecs.seeded import draw_of
from shiradelta.format.container import Container
from shiradelta.format.delta import TensorDelta, matrix_shape
from shiradelta.format.digest import content_digest, tensor_digest
from shiradelta.format.draw import Draw
from shiradelta.format.record import Record, Section
from shiradelta.io.hub import Path_, hub_path
from shiradelta.util import text
from shiradelta.util.arguments import OPEN, ArgumentKind, checked, is_path
from shiradelta.util.mapping import map_file
from shiradelta.util.regular_file import open_regular

if TYPE_CHECKING:
    from torch import Tensor

Source = str | os.PathLike[str] | bytes | Bytes | BinaryIO


class StoredTensor(TensorDelta):
    """A tensor delta in a file; decodes and checks it each time that positions or values are read.

    `record` is its row of the table: codecs, sizes, fingerprints.
    """

    def __init__(self, delta: Delta, record: Record) -> None:
        self._delta = delta
        self.record = record
        self._shape = record.shape
        self._dtype = record.dtype.name
        self._operation = record.operation
        self.base_bits = None

    @property
    def nnz(self) -> int:
        return self.record.nnz

    @property
    def base_fingerprint(self) -> int | None:
        return self.record.base_fingerprint

    @property
    def result_fingerprint(self) -> int | None:
        return self.record.result_fingerprint

    @property
    def draw(self) -> Draw | None:
        """The draw that all positions are of; None without.  Raises FormatError where there is no such draw."""
        record = self.record
        if record.index_codec != SEEDED.id:
            return None
        try:
            return draw_of(self.section(record.index), record.nnz, record.numel)
        except FormatError as error:
            error.file, error.tensor, error.offset = self.file, record.name, record.index.offset
            raise

    @property
    def decoder(self) -> Decoder:
        """The decoder of the file.  Raises LimitError if decompressed sections alone take more than the limit."""
        size = self.record.unpacked_size
        return self._within(size) if size else self._delta.decoder

    @property
    def limit(self) -> int:
        """The most memory, in bytes, that decoding it may take."""
        return self._delta.limit

    def check_memory(self, size: int) -> None:
        """Checks that `size` bytes are within the limit of the open file.  Raises LimitError."""
        if size > self._delta.limit:
            self._delta.check_memory(f"tensor {self.record.name!r}", size)

    def _within(self, size: int) -> Decoder:
        """The decoder, once `size` bytes are known to be within the limit.  Raises LimitError."""
        self.check_memory(size)
        return self._delta.decoder

    def positions(self) -> Positions:
        """int64 [nnz].  Raises FormatError where the section is damaged, LimitError where it takes too much memory."""
        return self._within(self.record.decoded_size).positions(self.record) if self.nnz else np.zeros(0, np.int64)

    def bits(self) -> Array:
        """Unsigned [nnz].  Raises FormatError where the section is damaged, LimitError if it takes too much memory."""
        if self.nnz:
            return self._within(self.record.decoded_size).bits(self.record)
        lists_floats = self.operation.adds or not self.operation.in_result
        return np.zeros(0, "<u4" if lists_floats else f"<u{self.record.element_size}")

    def position_windows(self) -> Iterator[Positions]:
        return self.decoder.position_windows(self.record) if self.nnz else iter(())

    def bits_windows(self) -> Iterator[Array]:
        return self.decoder.bits_windows(self.record) if self.nnz else iter(())

    @property
    def file(self) -> str | None:
        """The file's name, or None."""
        return self._delta.file

    def section(self, which: Section, checked: bool = False) -> Bytes:
        """One of the record's sections, decompressed; only its checksum is checked, if not yet.  Raises FormatError."""
        return self.decoder.section(self.record, which, checked)

    def check(self) -> None:
        """Decodes all of it without keeping it.  Raises FormatError if it is damaged."""
        self.decoder.check(self.record)

    def to_dense(self) -> Float32:
        self.check_memory(self.record.decoded_size + 4 * self.numel)
        return super().to_dense()

    def rows(self, start: int, stop: int) -> tuple[Positions, Array]:
        """(positions, flat in the whole tensor; values) of the rows from start to stop - 1.

        A row is an index of the first dimension.  Only the blocks that hold the range are read, so the
        sections' checksums are not looked at.  Values are float32 for add, unsigned bits otherwise.
        """
        count, columns = matrix_shape(self.shape)
        if not 0 <= start <= stop <= count:
            raise ArgumentError(f"rows {start} to {stop} of a tensor of {count} rows")
        positions, bits = self.between(start * columns, stop * columns)
        return positions, bits.view(np.float32) if self.operation.adds else bits

    def between(self, start: int, stop: int) -> tuple[Positions, Array]:
        """(positions from start to stop - 1; what `bits` gives of them).

        Only the blocks that hold the range are read, so the sections' checksums are not looked at; see `check`.
        """
        if not self.nnz or start >= stop:
            return np.zeros(0, np.int64), self.bits()[:0]
        most = min(self.nnz, stop - start) * 16 + self.record.unpacked_size
        return self._within(min(most, self.record.decoded_size)).between(self.record, start, stop)

    def runs(self, spans: Sequence[tuple[int, int]], checked: bool = False) -> list[tuple[int, Positions]]:
        """(rank of the first, positions) of the nonzeros in several spans of positions, (start, stop).

        All of the tensor is checked before, unless it has been: then only the blocks that hold the spans are.

        Raises:
            FormatError: it is damaged.
            LimitError: it takes too much memory.
        """
        if not self.nnz:
            return [(0, np.zeros(0, np.int64)) for _ in spans]
        most = sum(min(self.nnz, stop - start) for start, stop in spans) * 16 + self.record.unpacked_size
        return self._within(min(most, self.record.decoded_size)).runs(self.record, spans, checked)

    def bits_from(self, rank: int, count: int) -> Array:
        """What `bits` gives of the nonzeros from a rank on, of a tensor that has been checked."""
        return self._within(4 * count).bits_from(self.record, rank, count) if count else self.bits()[:0]

    def patch(self, weight: Array, dtype: str, strength: float = 1.0) -> None:
        """Applies the delta in place to the bits of a whole tensor, flat and writable; shapes and dtypes must fit."""
        self.decoder.patch(self.record, weight, dtype, strength)


class Delta(Mapping[str, StoredTensor]):
    """An open `.shd` file: a Mapping from tensor names, in byte order, to `StoredTensor`.

    Attributes:
        metadata: dict[str, str].
        digest: the content digest, hexadecimal (FORMAT.md, section 7).
        file: the file's name, or None.
        limit: the most memory, in bytes or such as "500MB", that decoding one of its tensors may take.
        table: the rows of all tensors; those of a packed file when it is unpacked.
        packed: whether the file is packed (FORMAT.md, 2.3), and was unpacked into memory.
    """

    def __init__(
        self,
        container: Container,
        file: str | None,
        mapped: mmap.mmap | None,
        backend: Backend,
        limit: int,
    ) -> None:
        self._decoder: Decoder | None = backend.decoder(container.data, file, container.records)
        self._mapped = mapped
        self.table = container.records
        self.file = file
        self.limit = limit
        self.metadata = dict(container.metadata)
        self.digest = container.digest.hex()
        self.version = f"1.{container.minor}"
        self.sizes = container.sizes
        self.packed = container.packed
        self._unpacked = container.data if container.packed else None

    def __getitem__(self, name: str) -> StoredTensor:
        return StoredTensor(self, self.table.named(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.table.names)

    def __len__(self) -> int:
        return len(self.table)

    def __repr__(self) -> str:
        return f"<Delta {self._about}>"

    def _repr_html_(self) -> str:
        """A table for notebooks."""
        from shiradelta.util.html import html_table

        rows = [
            [record.name, record.operation.name, text.shape(record.shape), record.dtype.name, f"{record.nnz:,}"]
            for record in self.table
        ]
        return html_table(self._about, [["tensor", "op", "shape", "dtype", "nonzeros"], *rows])

    @property
    def _about(self) -> str:
        figures = text.count(self, "tensor"), text.count(self.nnz, "nonzero"), text.size(self.sizes["file"])
        return f"{text.brief(self.file or 'in memory')}: {', '.join(figures)}"

    def __enter__(self) -> Delta:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file.  Decoded arrays stay valid."""
        self._decoder = self._unpacked = None
        if self._mapped is not None:
            # If a view of BITS values is still in use, the map lives as long as the view.
            with suppress(BufferError):
                self._mapped.close()
            self._mapped = None

    @property
    def decoder(self) -> Decoder:
        """The decoder of this file.  Raises ShiraDeltaError after `close`."""
        if self._decoder is None:
            raise ShiraDeltaError(f"{self.file or 'delta'} was closed; open it again to read from it")
        return self._decoder

    @property
    def unpacked(self) -> Bytes | None:
        """The file that a packed one stands for, in memory; None where this one is not packed."""
        return self._unpacked

    def check_memory(self, what: str, size: int) -> None:
        """Checks that `size` bytes, which `what` takes when it is decoded, are within the limit.

        Raises:
            LimitError: they are not.
        """
        if size > self.limit:
            raise LimitError(
                f"{self.file or 'delta'}: {what} takes {text.size(size)} of memory when it is decoded, over the limit"
                f" of {text.size(self.limit)}; if you trust the file, raise it with limit= or --max-memory"
            )

    @property
    def nnz(self) -> int:
        """Nonzeros of all tensors."""
        return int(self.table.nnz.sum())

    @property
    def needs_base(self) -> bool:
        """Whether positions or values of a tensor can only be read with the base; see `shiradelta.recode`."""
        return bool(self.table.needs_base.any())

    def to_torch_sparse(self) -> dict[str, Tensor]:
        """Name -> the tensor's delta as a torch.sparse COO tensor, float32; see `TensorDelta.to_torch_sparse`.

        Raises:
            DeltaError: a tensor is not an addition, so that its values are no differences.
            MissingDependencyError: torch is not installed.
        """
        for name, tensor in self.items():
            if not tensor.operation.adds:
                raise DeltaError(f"tensor {name!r} is {tensor.op}, which is no difference; read its bits() instead")
        return {name: tensor.to_torch_sparse() for name, tensor in self.items()}

    def verify(self) -> None:
        """Decodes and checks everything, the content digest too.  Raises FormatError."""
        found = content_digest((name, tensor_digest(tensor)) for name, tensor in self.items())
        if found.hex() != self.digest:
            raise FormatError("digest_mismatch", offset=registry.DIGEST_OFFSET, file=self.file)

    def verify_without_base(self) -> None:
        """As `verify`; of a delta that is read with its base only, what needs no base: sections have their checksums.

        For its owner and whoever passes it on; who has the base compares the digest when it is read.
        """
        if not self.needs_base:
            self.verify()
            return
        for tensor in self.values():
            if tensor.record.needs_base:
                tensor.section(tensor.record.index)
                tensor.section(tensor.record.values)
            else:
                tensor.check()


#: An argument that is a delta.
DELTA = ArgumentKind("a path or an open delta", lambda value: isinstance(value, Delta) or is_path(value))


def default_limit(file_size: int) -> int:
    """The limit of a file for which none is given, in bytes: 1 GiB, or 64 times its size if that is more."""
    return max(1 << 30, registry.MAX_ZSTD_RATIO * file_size)


@checked(source=OPEN)
def open_delta(source: Source, backend: str = "auto", *, limit: int | str | None = None) -> Delta:
    """Opens a `.shd` file and checks its header and tables; tensors are decoded when they are read.

    Args:
        source: a path (mapped into memory; also `user/repo[@revision][/file]` on the Hub), bytes or an array of them,
            or a binary file (read to its end).
        backend: "libshd", "numpy", or "auto" for the fastest that knows the file's codecs; the bits are the same.
        limit: the most memory that decoding one tensor may take, or unpacking a packed file, in bytes or such as
            "500MB"; what takes more raises LimitError before any is allocated.  None for 1 GiB, or 64 times the file's
            size if that is more.

    Raises:
        ArgumentError: the backend does not know one of the file's codecs, or the limit is not positive.
        FormatError: the file is refused; its `reason` is a code of spec/REGISTRY.md.
        ShiraDeltaError: there is no such file, here or on the Hub, or it cannot be read.
    """
    if not isinstance(source, (str, os.PathLike)):
        return parse_delta(bytes_of(source), None, backend, limit=limit)
    path = local_source(source)
    data, mapped = _map(Path(path))
    return parse_delta(data, os.fspath(path), backend, mapped, limit=limit)


def local_source(source: Path_, beside: Sequence[str] = ()) -> Path_:
    """A local path as it is; that of the downloaded file for one on the Hub, with `beside` as `local_delta` takes it.

    Raises:
        ShiraDeltaError: the Hub does not have it, or it cannot be downloaded.
    """
    if hub_path(source) is None:
        return source
    from shiradelta.io.download import local_delta

    return local_delta(source, beside)


def parse_delta(
    data: Bytes,
    file: str | None,
    backend: str = "auto",
    mapped: mmap.mmap | None = None,
    *,
    limit: int | str | None = None,
) -> Delta:
    """`open_delta` of bytes that came from `file`."""
    allowed = default_limit(data.size) if limit is None else text.parse_size(limit)
    if not allowed:
        raise ArgumentError(
            f"limit {limit} is less than a byte; give a positive number of bytes, or None for the default"
        )
    try:
        # A mapped file may change after it was checked.
        parsed = container.parse(data, allowed, choose(backend).accepts if mapped is None else None)
        chosen = choose(backend, parsed.records.index_codecs, parsed.records.value_codecs)
        return Delta(parsed, file, mapped, chosen, allowed)
    except LimitError as error:
        raise LimitError(f"{file or 'delta'}: {error}") from None
    except FormatError as error:
        error.file = file
        if file is not None:
            from shiradelta.io.recognise import explain_refusal  # only a refusal needs it

            explain_refusal(error, Path(file))
        raise


def bytes_of(source: Source) -> Bytes:
    """The bytes of a source, in memory; a binary file is read to its end.

    Raises:
        ShiraDeltaError: there is no such file, or it cannot be read.
    """
    if isinstance(source, (str, os.PathLike)):
        with explained(Path(source)), open_regular(Path(source)) as stream:
            source = stream.read()
    return np.frombuffer(source if isinstance(source, (bytes, np.ndarray)) else source.read(), np.uint8)


def _map(path: Path) -> tuple[Bytes, mmap.mmap | None]:
    with explained(path), open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        if not size:
            return np.zeros(0, np.uint8), None
        mapped = map_file(stream.fileno(), path, size)
        return np.frombuffer(mapped, np.uint8), mapped


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns the system's errors into one line, which says what the path is where it is no `.shd` file."""
    try:
        yield
    except OSError as error:
        from shiradelta.io.recognise import Wanted, explain

        full = error.errno in (errno.EMFILE, errno.ENFILE)
        advice = "open fewer at a time, or raise the limit (`ulimit -n`)" if full else "check the path"
        message = explain(path, Wanted.DELTA) or f"{path}: cannot be read ({error.strerror}); {advice}"
        raise ShiraDeltaError(message) from None
