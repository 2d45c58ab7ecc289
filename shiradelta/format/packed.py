"""Packed files: a file on its way, without what another part of it tells (spec/FORMAT.md, 2.3)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from shiradelta.errors import FormatError, LimitError
from shiradelta.format import registry
from shiradelta.format.codecs.base import Bytes
from shiradelta.format.header import Header, crc32
from shiradelta.format.record import Record
from shiradelta.format.registry import Flag, Incompatible
from shiradelta.format.zstd import compressed, unzstd
from shiradelta.util import text
from shiradelta.util.arrays import ranges

Counts = npt.NDArray[np.int64]
#: The minor version that defines it.
MINOR = 1

#: A record as NumPy sees it (section 3); what no field names is left as it is.
_FIELDS = np.dtype(
    {
        "names": ["name_offset", "name_size", "flags", "index", "values", "index_crc", "values_crc"],
        "formats": ["<u4", "<u2", "u1", ("<u8", 3), ("<u8", 3), "<u4", "<u4"],
        "offsets": [0, 4, 11, 40, 64, 88, 92],
        "itemsize": registry.RECORD_SIZE,
    }
)
#: A file is packed where that saves this share of it.
_WORTH = 1 / 64
_SECTIONS = ("index", "values")


def unpack(data: Bytes, header: Header, most: int | None = None) -> Bytes:
    """The file that a packed one stands for.

    Args:
        data: the packed file.
        header: its header.
        most: the most bytes that it may take; None for any number.

    Raises:
        FormatError: in the order and with the reasons of FORMAT.md.
        LimitError: it takes more.
    """
    (stored, decoded), start, n = header.control, registry.HEADER_SIZE, header.tensor_count
    if stored > data.size - start:
        raise FormatError("section_layout", f"CONTROL of {stored} bytes", offset=start)
    packed, rest = data[start : start + stored], data[start + stored :]
    for part, crc in zip((packed, rest), header.crcs[:2], strict=True):
        if crc32(part) != crc:
            raise FormatError("section_checksum", offset=start if part is packed else start + stored)
    if decoded > stored * registry.MAX_ZSTD_RATIO:
        raise FormatError("zstd_ratio", f"{decoded} from {stored} bytes", offset=start)
    front = sum(header.whole_sizes)
    if decoded < front:
        raise FormatError("bad_size", f"CONTROL of {decoded} bytes", offset=start)
    _within(most, decoded)
    try:
        control = np.frombuffer(unzstd(packed, decoded), np.uint8)
    except FormatError as error:
        error.offset = start
        raise
    planes, names, metadata, extension, leads = _cut(
        control, (n * registry.RECORD_SIZE, *header.sizes, decoded - front)
    )
    table = planes.reshape(registry.RECORD_SIZE, n).T.copy().reshape(-1).view(_FIELDS)
    cuts = _Cuts.of(table, leads.size, rest.size)

    starts = [*accumulate((_aligned(size) for size in header.whole_sizes), initial=start)]
    ends = starts[-1] + np.cumsum(_aligned(cuts.stored))
    size = int(ends[-1]) if n else starts[-1]
    _within(most, decoded + size)
    result = np.zeros(size, np.uint8)
    offsets, of_leads, of_rest = np.append(starts[-1], ends)[:-1], 0, 0
    for offset, lead, middle in zip(offsets.tolist(), cuts.leads.tolist(), cuts.middles.tolist(), strict=True):
        result[offset : offset + lead] = leads[of_leads : of_leads + lead]
        result[offset + lead : offset + lead + middle] = rest[of_rest : of_rest + middle]
        of_leads, of_rest = of_leads + lead, of_rest + middle
    crcs = [crc32(result[a : a + b]) for a, b in zip(offsets.tolist(), cuts.stored.tolist(), strict=True)]
    table["name_offset"] = np.cumsum(table["name_size"], dtype=np.uint32) - table["name_size"]
    for which, name in enumerate(_SECTIONS):
        table[name][:, 0] = offsets[which::2]
        plain = ~cuts.zstd[which::2]
        table[name][plain, 2] = cuts.stored[which::2][plain]
        table[f"{name}_crc"] = crcs[which::2]

    parts = table.view(np.uint8), names, metadata, extension
    for place, part in zip(starts, parts, strict=False):
        result[place : place + part.size] = part
    whole = replace(
        header,
        incompatible=header.incompatible & ~Incompatible.PACKED,
        file_size=size,
        crcs=(crc32(parts[0]), crc32(names), crc32(metadata), crc32(extension)),
        control=(0, 0),
    )
    result[:start] = np.frombuffer(whole.to_bytes(), np.uint8)
    return result


@dataclass(frozen=True)
class _Cuts:
    """What of each section is where: INDEX 0, VALUES 0, INDEX 1, ...

    Attributes:
        stored: bytes of the section.
        leads: its first bytes, which are in CONTROL.
        middles: those that follow, which are in REST; slack is left out.
        zstd: whether it is compressed by itself.
    """

    stored: Counts
    leads: Counts
    middles: Counts
    zstd: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, table: npt.NDArray[np.void], of_leads: int, of_rest: int) -> _Cuts:
        """Those that a table says, which have to take so many bytes.  Raises FormatError for the first wrong one."""
        both = np.stack([table[name] for name in _SECTIONS], axis=1).reshape(-1, 3)
        crcs = np.stack([table[f"{name}_crc"] for name in _SECTIONS], axis=1).reshape(-1)
        zstd = ((table["flags"][:, None] & np.array([Flag.INDEX_ZSTD, Flag.VALUES_ZSTD])) != 0).reshape(-1)
        lead, stored, decoded = both.T
        tail = np.where((stored > 0) & ~zstd, np.uint64(registry.SLACK), np.uint64(0))
        too_short = (lead > stored) | (stored - np.minimum(lead, stored) < tail)
        middle = np.where(too_short, 0, stored - lead - tail)
        # A sum that is too large stays so, and none overflows: only the first that is wrong matters.
        leads, rest = (
            np.cumsum(np.minimum(each, most + 1).astype(np.int64))
            for each, most in ((lead, of_leads), (middle, of_rest))
        )
        reserved = (crcs != 0) | (~zstd & (decoded != 0)) | np.repeat(table["name_offset"] != 0, 2)
        problems = (
            (reserved, "reserved_not_zero"),
            (too_short | (leads > of_leads), "bad_size"),
            (rest > of_rest, "section_layout"),
        )
        wrong = np.logical_or.reduce([where for where, _ in problems])
        if wrong.any():
            first = int(wrong.argmax())
            reason = next(reason for where, reason in problems if where[first])
            raise FormatError(reason, f"record {first // 2} of CONTROL", offset=registry.HEADER_SIZE)
        for total, expected, reason in (leads, of_leads, "bad_size"), (rest, of_rest, "section_layout"):
            if (total[-1] if total.size else 0) != expected:
                raise FormatError(reason, "CONTROL does not tell where all bytes belong", offset=registry.HEADER_SIZE)
        return cls(stored.astype(np.int64), lead.astype(np.int64), middle.astype(np.int64), zstd)


def _cut(data: Bytes, sizes: Iterable[int]) -> list[Bytes]:
    """Parts of these sizes, one after the other."""
    edges = [*accumulate(sizes, initial=0)]
    return [data[start:stop] for start, stop in pairwise(edges)]


def _aligned(size: int | Counts) -> Any:
    return -(-size // registry.SECTION_ALIGNMENT) * registry.SECTION_ALIGNMENT


def _within(most: int | None, size: int) -> None:
    if most is not None and size > most:
        raise LimitError(
            f"it takes {text.size(size)} of memory when it is unpacked, over the limit of {text.size(most)}; if you"
            " trust the file, raise it with limit= or --max-memory"
        )


class Packer:
    """Packs a file, of which only a section's part is in memory at a time.

    Args:
        header: the file's.
        parts: TABLE, NAMES, METADATA and EXTENSION.
        records: the table.
        leads: how many first bytes of each record's INDEX and VALUES go to CONTROL.
        read: (offset, size) -> bytes of a section; offsets are the records'.
    """

    def __init__(
        self,
        header: Header,
        parts: Sequence[bytes],
        records: Sequence[Record],
        leads: Sequence[tuple[int, int]],
        read: Callable[[int, int], bytes],
    ) -> None:
        self._header = header
        self._sections = [section for record in records for section in (record.index, record.values)]
        self._leads, self._read = [lead for pair in leads for lead in pair], read
        self._middles = [
            section.stored - lead - (0 if section.zstd or not section.stored else registry.SLACK)
            for section, lead in zip(self._sections, self._leads, strict=True)
        ]
        control = self._control(*parts)
        self._frame, self._decoded = compressed(control), len(control)

    def _control(self, table_part: bytes, *others: bytes) -> bytes:
        table = np.frombuffer(bytearray(table_part), _FIELDS)
        table["name_offset"] = 0
        for which, name in enumerate(_SECTIONS):
            table[name][:, 0] = self._leads[which::2]
            table[name][[not section.zstd for section in self._sections[which::2]], 2] = 0
            table[f"{name}_crc"] = 0
        planes = table.view(np.uint8).reshape(-1, registry.RECORD_SIZE).T
        pairs = zip(self._sections, self._leads, strict=True)
        return b"".join((planes.tobytes(), *others, *(self._read(section.offset, lead) for section, lead in pairs)))

    @property
    def size(self) -> int | None:
        """Bytes of the packed file; None where the format does not allow it, or zstd makes nothing smaller."""
        return None if self._frame is None else registry.HEADER_SIZE + len(self._frame) + sum(self._middles)

    @property
    def pays(self) -> bool:
        """Whether it is enough smaller than the file itself."""
        return self.size is not None and self.size <= self._header.file_size * (1 - _WORTH)

    def write(self, output: IO[bytes]) -> None:
        """Writes the packed file."""
        assert self._frame is not None
        crc = 0
        for part in self._rest():
            crc = crc32(part, crc)
        header = replace(
            self._header,
            minor=max(self._header.minor, MINOR),
            incompatible=self._header.incompatible | Incompatible.PACKED,
            file_size=self.size or 0,
            crcs=(crc32(self._frame), crc, 0, 0),
            control=(len(self._frame), self._decoded),
        )
        output.write(header.to_bytes() + self._frame)
        for part in self._rest():
            output.write(part)

    def _rest(self) -> Iterator[bytes]:
        for section, lead, middle in zip(self._sections, self._leads, self._middles, strict=True):
            for start, stop in ranges(middle):
                yield self._read(section.offset + lead + start, stop - start)
