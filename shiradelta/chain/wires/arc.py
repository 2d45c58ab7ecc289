"""Payloads of fireworks-delta-compression: one tensor's change as bytes.

- arc_v1 and arc_v2 compress old ^ new, of all bytes, by zlib and by zstd.
- arc_v3 is an envelope, or, where that is smaller, a safetensors file in which an arc_v2 payload stands.  The envelope
  is a pickle of a codec (zstd or bz2) and data, which decompress to a pickle of plain values.  They have the mantissas
  of the elements that change, as they are, as old ^ new, or as their difference with the sign in the last bit.  Three
  bits each may stand for the seven most frequent ones, which the package reads, and in 0.1.0 never finds small enough
  to write.  Where sign or exponent change, all bits are listed.  Positions are the gaps between them, over all of the
  tensor, or anew in each row, with a number of bytes for each row.

Each has an Adler-32 of the tensor's bytes after the step.  Which payload it is, its first bytes tell.
Read in fireworks-delta-compression 0.1.0, backends/arc2.py and backends/arc3.py.
"""

from __future__ import annotations

import bz2
import json
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from shiradelta.chain.wires.checks import described, number, part, positions_of_gaps, sequence, unzipped, viewed
from shiradelta.errors import SourceError
from shiradelta.format.arithmetic import Array
from shiradelta.format.registry import DTYPE_OF_NAME
from shiradelta.models.safetensors import Slot, Unwritten, header_of
from shiradelta.util.arrays import different
from shiradelta.util.optional import importing
from shiradelta.util.plain_pickle import read_plain, write_plain
from shiradelta.util.registry import Registry

_ENVELOPE = b"ARC3_ENVELOPE\0"
_VERSION = 1
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_TENSOR, _FALLBACK = "tensor", "fallback_name"
#: dtype -> bits of the mantissa.
_MANTISSA = {"float32": 23, "float16": 10, "bfloat16": 7, "float8_e4m3fn": 3, "float8_e5m2": 2}
_GAPS = ("uint8", "uint16", "uint32", "uint64")
_CODES, _OTHER = 7, 7
_CODE_BITS = 3
_LEVEL_2, _LEVEL_3 = 3, 1
#: Bytes of a payload for each element, and around them, at most.
_EACH, _AROUND = 64, 1 << 16


@dataclass(frozen=True)
class Transform:
    """How mantissas after a step are stored.

    Attributes:
        name: what a payload calls it.
        encode: (mantissas before, after), as int64 -> what is stored.
        decode: (mantissas before, what is stored) -> mantissas after.
    """

    name: str
    encode: Callable[[Array, Array], Array]
    decode: Callable[[Array, Array], Array]


def _to_zigzag(old: Array, new: Array) -> Array:
    difference = new - old
    found: Array = (difference << 1) ^ (difference >> 63)
    return found


def _from_zigzag(old: Array, stored: Array) -> Array:
    found: Array = old + ((stored >> 1) ^ -(stored & 1))
    return found


def _exclusive_or(old: Array, other: Array) -> Array:
    found: Array = old ^ other
    return found


TRANSFORMS = Registry(
    "transform",
    (
        Transform("raw", lambda old, new: new, lambda old, stored: stored),
        Transform("xor", _exclusive_or, _exclusive_or),
        Transform("zigzag", _to_zigzag, _from_zigzag),
    ),
)


def checksum(bits: Array) -> str:
    """Adler-32 of a tensor's bytes, in decimal digits."""
    return str(zlib.adler32(bits.view(np.uint8).data))


# ------------------------------------------------------------------------------------------------- reading


def decoded(where: str, payload: bytes, slot: Slot, old: Array, wanted: object) -> Array:
    """A tensor's bits after a step.

    Args:
        where: the tensor, for messages.
        payload: its change.
        slot: the tensor before the step.
        old: its bits.
        wanted: the checksum that it has to have afterwards.

    Raises:
        SourceError: the payload is damaged, or was made for another tensor.
    """
    if payload.startswith(_ENVELOPE):
        new = _from_envelope(where, payload[len(_ENVELOPE) :], slot, old)
    elif payload.startswith(_ZSTD_MAGIC):
        new = _xored(where, unzipped(where, payload, old.nbytes), old)
    elif int.from_bytes(payload[:8], "little") > len(payload):  # too long for the header of a safetensors file
        new = _xored(where, _inflated(where, payload, zlib.decompressobj(), old.nbytes), old)
    else:
        with described(where):
            inner, said = _fallback(payload)
        new = _xored(where, unzipped(where, inner, old.nbytes), old)
        if said != wanted:
            raise SourceError(f"{where} has two checksums; get the step again")
    if checksum(new) != wanted:
        raise SourceError(f"{where} does not give the bytes of its checksum; give the model before the step")
    return new


def _xored(where: str, difference: bytes, old: Array) -> Array:
    if len(difference) != old.nbytes:
        raise SourceError(
            f"{where} has {len(difference):,} bytes for {old.nbytes:,}; get the step again, or give the model before it"
        )
    found: Array = old ^ np.frombuffer(difference, old.dtype)
    return found


def _inflated(where: str, packed: bytes, decompressor: Any, most: int) -> bytes:
    """What zlib or bz2 holds, at most so many bytes."""
    try:
        raw: bytes = decompressor.decompress(packed, most + 1)
    except (zlib.error, OSError, ValueError) as error:
        raise SourceError(f"{where} cannot be decompressed ({error}); get the step again") from None
    if len(raw) > most or not decompressor.eof or decompressor.unused_data:
        raise SourceError(f"{where} has more or less than {most:,} bytes; get the step again")
    return raw


def _fallback(payload: bytes) -> tuple[bytes, object]:
    """(the arc_v2 payload in a safetensors file, its checksum).

    Raises:
        LookupError, TypeError, ValueError: it is none.
    """
    data = np.frombuffer(payload, np.uint8)
    size = int.from_bytes(payload[:8], "little")
    header = json.loads(part(data, 8, 8 + size).tobytes().decode())
    metadata = header.pop("__metadata__")
    if list(header) != [_TENSOR] or metadata.get(_FALLBACK, "arc_v2") != "arc_v2":
        raise ValueError("it holds something else than a tensor as arc_v2 has it")
    start, end = header[_TENSOR]["data_offsets"]
    inner = part(data[8 + size :], start, end)
    if start != 0 or inner.size != data.size - 8 - size:
        raise ValueError("its tensor does not fill it")
    return inner.tobytes(), metadata[_TENSOR]


def _from_envelope(where: str, raw: bytes, slot: Slot, old: Array) -> Array:
    most = _AROUND + _EACH * old.size + 8 * (slot.shape[0] if slot.shape else 1)
    with described(where):
        envelope = read_plain(raw)
        codec, packed = envelope["codec"], envelope["data"]
        if codec == "zstd":
            inner = unzipped(where, packed, most)
        elif codec == "bz2":
            inner = _inflated(where, packed, bz2.BZ2Decompressor(), most)
        else:
            raise ValueError(f"codec {str(codec)[:40]!r} is unknown; zstd and bz2 are known")
        payload = read_plain(inner)
        if payload["version"] != _VERSION:
            raise ValueError(f"version {str(payload['version'])[:40]} is unknown; {_VERSION} is known")
        if payload["dtype"] != f"torch.{slot.dtype.name}" or tuple(sequence(payload["shape"])) != slot.shape:
            there = f"{slot.dtype.name} {list(slot.shape)}"
            raise SourceError(f"{where} is not of {there}, as the model's is; give the model before the step")
        if payload["strategy"] == "none":
            return old
        if payload["strategy"] != "mantissa_xor" or slot.dtype.name not in _MANTISSA:
            raise ValueError(f"strategy {str(payload['strategy'])[:40]!r} is unknown for {slot.dtype.name}")
        new = _mantissas(payload, slot, old)
        if payload["checksum"] != checksum(new):
            raise SourceError(f"{where} does not give the bytes of its checksum; give the model before the step")
        return new


def _mantissas(payload: Any, slot: Slot, old: Array) -> Array:
    """All bits after a step.

    Raises:
        LookupError, TypeError, ValueError: the payload is damaged.
    """
    bits = _MANTISSA[slot.dtype.name]
    if (payload["mantissa_bits"], payload["total_bits"]) != (bits, 8 * slot.dtype.size):
        raise ValueError(f"it has mantissas of {str(payload['mantissa_bits'])[:20]} bits")
    at = _positions(payload["indices"], slot.shape)
    if at.size and (at.min() < 0 or at.max() >= old.size or np.any(at[1:] <= at[:-1])):
        raise ValueError("positions out of order or range")
    mask = (1 << bits) - 1
    before = old[at].astype(np.int64)
    stored = _values(payload["mantissa_stream"], at.size)
    mantissas = TRANSFORMS.find(payload["transform"]).decode(before & mask, stored)
    if at.size and (mantissas.min() < 0 or mantissas.max() > mask):
        raise ValueError("mantissas that are too large")
    new = old.copy()
    new[at] = ((before & ~mask) | mantissas).astype(old.dtype)
    others = _flat(payload["exception_positions"])
    if others.size and (others.min() < 0 or others.max() >= at.size or np.any(others[1:] <= others[:-1])):
        raise ValueError("exceptions out of order or range")
    if payload["exception_dtype"] != f"uint{8 * slot.dtype.size}":
        raise ValueError(f"exceptions of dtype {str(payload['exception_dtype'])[:40]!r}")
    values = viewed(np.frombuffer(payload["exception_values"], np.uint8), slot.dtype.bits)
    if values.size != others.size:
        raise ValueError(f"{others.size:,} exceptions and {values.size:,} values")
    new[at[others]] = values
    return new


def _flat(meta: Any) -> Array:
    """Positions from gaps over all of a tensor."""
    if meta["dtype"] not in _GAPS:
        raise ValueError(f"gaps of dtype {str(meta['dtype'])[:40]!r}; {', '.join(_GAPS)} are known")
    gaps = viewed(np.frombuffer(meta["data"], np.uint8), meta["dtype"])
    if gaps.size != number(meta["count"]):
        raise ValueError(f"{gaps.size:,} gaps, and {meta['count']:,} are said to be there")
    return positions_of_gaps(gaps, 0)


def _positions(meta: Any, shape: tuple[int, ...]) -> Array:
    """Positions, by the kind of what holds them."""
    kind = meta.get("kind", "flat")
    if kind == "flat":
        return _flat(meta)
    if kind != "row" or meta["count_dtype"] not in _GAPS:
        raise ValueError(f"positions of kind {str(kind)[:40]!r}; flat and row are known")
    rows, width = _rows(shape)
    if (meta["n_rows"], meta["row_width"]) != (rows, width):
        raise ValueError(f"rows for another shape than {list(shape)}")
    data = np.frombuffer(meta["data"], np.uint8)
    place = rows * np.dtype(meta["count_dtype"]).itemsize
    counts = viewed(part(data, 0, place), meta["count_dtype"])
    found = [np.zeros(0, np.int64)]
    for row in np.flatnonzero(counts).tolist():
        size, count = int(part(data, place, place + 1)[0]), int(counts[row])
        if size not in (1, 2, 4, 8):
            raise ValueError(f"gaps of {size} bytes")
        gaps = viewed(part(data, place + 1, place + 1 + size * count), f"<u{size}")
        columns = positions_of_gaps(gaps, 0)
        if columns[-1] >= width:
            raise ValueError(f"columns beyond {width:,}")
        found.append(row * width + columns)
        place += 1 + size * count
    if place != data.size:
        raise ValueError(f"{data.size:,} bytes of rows for {place:,}")
    return np.concatenate(found)


def _rows(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, elements of a row) of a tensor as arc_v3 sees it."""
    rows, width = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))
    return rows, max(1, width)


def _values(meta: Any, count: int) -> Array:
    """What is stored of mantissas, as int64."""
    if meta["kind"] == "raw":
        if meta["dtype"] not in _GAPS:
            raise ValueError(f"mantissas of dtype {str(meta['dtype'])[:40]!r}")
        values = viewed(np.frombuffer(meta["data"], np.uint8), meta["dtype"])
    elif meta["kind"] == "codebook3":
        bits = np.unpackbits(np.frombuffer(meta["codes"], np.uint8), bitorder="little")
        if bits.size < _CODE_BITS * count:
            raise ValueError(f"{bits.size:,} bits of codes for {count:,}")
        codes = bits[: _CODE_BITS * count].reshape(-1, _CODE_BITS) @ np.array([1, 2, 4])
        book = np.zeros(_CODES + 1, np.uint8)
        known = np.frombuffer(meta["codebook"], np.uint8)
        book[: known.size] = known
        values = book[codes]
        others = np.frombuffer(meta["exception_values"], np.uint8)
        places = _flat(meta["exception_positions"])
        if not np.array_equal(places, np.flatnonzero(codes == _OTHER)):
            raise ValueError("exceptions that are not those of the codes")
        values[places] = others
    else:
        raise ValueError(f"mantissas of kind {str(meta['kind'])[:40]!r}; raw and codebook3 are known")
    if values.size != count:
        raise ValueError(f"{values.size:,} mantissas for {count:,}")
    return values.astype(np.int64)


# ------------------------------------------------------------------------------------------------- writing


def _zstd(raw: bytes, level: int) -> bytes:
    with importing("a step that is compressed by zstd"):
        import zstandard
    return zstandard.ZstdCompressor(level=level).compress(raw)


def arc_v1(slot: Slot, old: Array, new: Array) -> bytes:
    """old ^ new by zlib."""
    return zlib.compress((old ^ new).tobytes())


def arc_v2(slot: Slot, old: Array, new: Array) -> bytes:
    """old ^ new by zstd."""
    return _zstd((old ^ new).tobytes(), _LEVEL_2)


def arc_v3(slot: Slot, old: Array, new: Array) -> bytes:
    """The smallest of the forms of arc_v3."""
    data = np.frombuffer(arc_v2(slot, old, new), np.uint8)
    tensor = Unwritten(_TENSOR, (data.size,), DTYPE_OF_NAME["uint8"], lambda: data)
    found = [header_of([tensor], {_TENSOR: checksum(new), _FALLBACK: "arc_v2"}) + data.tobytes()]
    if slot.dtype.name in _MANTISSA:
        for payload in _payloads(slot, old, new):
            raw = write_plain(payload)
            for codec, packed in (("zstd", _zstd(raw, _LEVEL_3)), ("bz2", bz2.compress(raw))):
                found.append(_ENVELOPE + write_plain({"codec": codec, "data": packed}))
    return min(found, key=len)


def _payloads(slot: Slot, old: Array, new: Array) -> list[dict[str, Any]]:
    """The payloads, one for each way to store positions."""
    dtype, at = slot.dtype.name, different(old, new)
    about = {"version": _VERSION, "shape": slot.shape, "dtype": f"torch.{dtype}", "checksum": checksum(new)}
    if not at.size:
        return [{**about, "strategy": "none"}]
    bits = _MANTISSA[dtype]
    mask = (1 << bits) - 1
    before, after = old[at].astype(np.int64), new[at].astype(np.int64)
    same = (before & ~mask) == (after & ~mask)
    streams = []
    for transform in TRANSFORMS.values():
        stored = np.where(same, transform.encode(before & mask, after & mask), 0)
        narrow = _narrowest(stored)
        stream = {"kind": "raw", "dtype": narrow.dtype.name, "data": narrow.tobytes()}
        streams.append((len(_zstd(write_plain(stream), _LEVEL_3)), transform.name, stream))
    _, transform_name, stream = min(streams, key=lambda one: one[0])
    others = np.flatnonzero(~same)
    payload = {
        **about,
        "strategy": "mantissa_xor",
        "mantissa_bits": bits,
        "total_bits": 8 * slot.dtype.size,
        "transform": transform_name,
        "mantissa_dtype": stream["dtype"],
        "mantissa_stream": stream,
        "exception_positions": _as_flat(others),
        "exception_dtype": f"uint{8 * slot.dtype.size}",
        "exception_values": new[at[others]].tobytes(),
        "uint_dtype": f"uint{8 * slot.dtype.size}",
    }
    flat = {**payload, "indices": {**_as_flat(at), "kind": "flat"}}
    return [flat, {**payload, "indices": _as_rows(at, slot.shape)}]


def _narrowest(values: Array) -> Array:
    """Unsigned numbers in as few bytes as hold all of them."""
    most = int(values.max()) if values.size else 0
    return values.astype(next(kind for kind in _GAPS if most <= np.iinfo(kind).max))


def _as_flat(positions: Array) -> dict[str, Any]:
    gaps = _narrowest(np.diff(positions, prepend=0))
    return {"count": int(positions.size), "dtype": gaps.dtype.name, "data": gaps.tobytes()}


def _as_rows(positions: Array, shape: tuple[int, ...]) -> dict[str, Any]:
    rows, width = _rows(shape)
    counts = _narrowest(np.bincount(positions // width, minlength=rows))
    stream = [counts.tobytes()]
    for columns in np.split(positions % width, np.cumsum(counts.astype(np.int64))[:-1]):
        if columns.size:
            gaps = _narrowest(np.diff(columns, prepend=0))
            stream += bytes([gaps.itemsize]), gaps.tobytes()
    about = {"kind": "row", "shape": shape, "n_rows": rows, "row_width": width, "count_dtype": counts.dtype.name}
    return {**about, "data": b"".join(stream)}
