"""Makes the conformance vectors of the shiradelta format, version 1.

    python spec/make_vectors.py            writes the folders below vectors/
    python spec/make_vectors.py --check    says whether the files there are those that it would write

It needs the standard library alone and knows nothing of the package: the encoders below were written
from FORMAT.md, and what a valid file is expected to hold is what was put into it.

valid/NAME.shd     a file that every reader accepts, NAME.json what it holds, as `decoder.py` prints it:
                   values are bits, of binary32 for ADD, of the dtype for SET, NEW and REPLACE, of shifts for ULP
invalid/NAME.shd   a file that every reader refuses, with the reason that invalid/reasons.json gives.
                   Checksums are right unless they are what is wrong, so that the intended check decides.
                   `zstd_unavailable` is the reason of a reader without zstd; others accept that file.
with_base/NAME.shd a file that is read beside its base, NAME.base: the elements of all tensors of the table, one tensor
                   after the other.  What it holds is in NAME.json, or the reason why it is refused in
                   with_base/reasons.json.  Without the base every reader refuses it: `base_needed`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import struct
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import chain, pairwise
from math import prod
from operator import add
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
VECTORS = Path(__file__).parent / "vectors"

# --- REGISTRY.md ---

#: name -> (id, bytes of an element)
DTYPES = {
    "unspecified": (0, 0),
    "float32": (1, 4),
    "float16": (2, 2),
    "bfloat16": (3, 2),
    "float64": (4, 8),
    "float8_e4m3fn": (5, 1),
    "float8_e5m2": (6, 1),
    "float8_e8m0fnu": (7, 1),
    "bool": (8, 1),
    "uint8": (9, 1),
    "int8": (10, 1),
    "uint16": (11, 2),
    "int16": (12, 2),
    "uint32": (13, 4),
    "int32": (14, 4),
    "uint64": (15, 8),
    "int64": (16, 8),
    "float8_e4m3fnuz": (17, 1),
    "float8_e5m2fnuz": (18, 1),
    "complex64": (19, 8),
}
OPS = {"ADD": 0, "SET": 1, "ULP": 2, "NEW": 3, "DROP": 4, "REPLACE": 6}
INDEX_CODECS = {"NONE": 0, "RICE": 1, "RAW": 2, "BITMAP": 3, "STRUCT": 4, "ALL": 5}
INDEX_CODECS |= {"TILED": 7, "SEEDED": 10, "FROM_BASE": 11}
VALUE_CODECS = {"NONE": 0, "F32": 1, "F16": 2, "BF16": 3, "I8": 4, "I4": 5, "SIGN": 6, "BITS": 7, "ULP": 8}
VALUE_CODECS["ULP_FROM_BASE"] = 10
#: What only the base's elements tell, and the dtypes that it has.
FROM_BASE_CODECS = ("FROM_BASE", "ULP_FROM_BASE")
FROM_BASE_DTYPES = sorted(name for name in DTYPES if "float" in name and name != "float8_e8m0fnu")
#: Operation or codec -> the minor version that defines it, where that is not 0.
MINORS: dict[str, int] = {"REPLACE": 1, "TILED": 1, "SEEDED": 1, "FROM_BASE": 1, "ULP": 1, "ULP_FROM_BASE": 1}
MAX_NUMEL = 1 << 56
U64 = (1 << 64) - 1
ZSTD_MAGIC = bytes.fromhex("28b52ffd")
#: What a zstd library made of a section: Huffman and sequences, with a checksum.
ZSTD_COMPRESSED = "28b52ffd648801e50000a80000003f0000a0bf000040400000003f00000000000100e04c35979f51fe86"
UNSIGNED = {1: "B", 2: "H", 4: "I", 8: "Q"}

# --- numbers and bits (FORMAT.md, section 1) ---

SLACK = bytes(8)


def align(size: int, unit: int) -> int:
    """`size` rounded up to a multiple of `unit`."""
    return -(-size // unit) * unit


def padded(data: bytes, unit: int = 4) -> bytes:
    """`data` with zeros up to a multiple of `unit` bytes."""
    return data + bytes(-len(data) % unit)


def patched(data: bytes, at: int, new: bytes) -> bytes:
    """`data` with `new` from `at` on; a negative `at` counts from the end."""
    at %= len(data)
    return data[:at] + new + data[at + len(new) :]


def unsigned(numbers: Sequence[int], size: int) -> bytes:
    """Numbers of `size` bytes, little-endian."""
    return struct.pack(f"<{len(numbers)}{UNSIGNED[size]}", *numbers)


def bit_words(number: int, bits: int) -> bytes:
    """The lowest `bits` bits of a long integer, in u32 words."""
    return number.to_bytes(4 * -(-bits // 32), "little")


def bitmap_of(ones: Sequence[int], bits: int) -> bytes:
    """A bitmap with the bits `ones` set."""
    return bit_words(sum(1 << one for one in ones), bits)


def bits32(x: float) -> int:
    """The bits of fl32(x); Python rounds a binary64 to nearest even."""
    try:
        return int.from_bytes(struct.pack("<f", x), "little")
    except OverflowError:
        return 0x7F800000 if x > 0 else 0xFF800000


def float32(bits: int) -> float:
    """The number whose binary32 bits these are."""
    (number,) = struct.unpack("<f", struct.pack("<I", bits))
    return float(number)


def fl32(x: float) -> float:
    """Rounded to binary32.

    A sum, product or quotient of two binary32 that was taken in binary64 is rounded twice then, which
    gives the same as once: 53 bits are at least 2 x 24 + 2.
    """
    return float32(bits32(x))


def bf16(x: float) -> int:
    """The bits of the bf16 nearest to fl32(x), ties to even; x is not NaN."""
    bits = bits32(x)
    upper, lower = bits >> 16, bits & 0xFFFF
    return upper + (lower > 0x8000 or (lower == 0x8000 and upper & 1))


def from_bf16(bits: int) -> float:
    """The number whose bf16 bits these are."""
    return float32(bits << 16)


def f16(x: float) -> int:
    """The bits of the binary16 nearest to x, ties to even."""
    try:
        return int.from_bytes(struct.pack("<e", x), "little")
    except OverflowError:
        return 0x7C00 if x > 0 else 0xFC00


def from_f16(bits: int) -> float:
    """The number whose binary16 bits these are."""
    (number,) = struct.unpack("<e", struct.pack("<H", bits))
    return float(number)


FLOATS: Mapping[str, tuple[Callable[[int], float], Callable[[float], int], int]] = {
    "float32": (float32, bits32, 0x7FC00000),
    "float16": (from_f16, f16, 0x7E00),
    "bfloat16": (from_bf16, bf16, 0x7FC0),
}


def added(base: int, value: float, dtype: str) -> int:
    """Section 6.1, ADD at strength 1, on an element's bits."""
    decode, encode, nan = FLOATS[dtype]
    weight = decode(base)
    if weight != weight:
        return base
    total = fl32(weight + value)
    return nan if total != total else encode(total)


def mix(position: int, bits: int) -> int:
    """Section 6.3."""
    x = (position * 0x9E3779B97F4A7C15 + (bits + 1) * 0xD1B54A32D192ED03) & U64
    x = ((x ^ (x >> 32)) * 0xD6E8FEB86659FD93) & U64
    return x ^ (x >> 32)


def fingerprint(pairs: Iterator[tuple[int, int]]) -> int:
    """Section 6.3, of (position, bits)."""
    return sum(mix(position, bits) for position, bits in pairs) & U64


# --- index codecs (section 4) ---


@dataclass(frozen=True)
class Index:
    """An INDEX section, decoded, and what it lists.

    `frame` is what is stored instead, if zstd is, and `draw` the seed and the cells of SEEDED.
    """

    codec: str
    positions: tuple[int, ...]
    section: bytes
    frame: bytes | None = None
    draw: tuple[int, int] | None = None


NO_INDEX = Index("NONE", (), b"")


def word_size(numel: int) -> int:
    """W of section 3.2."""
    return 4 if numel <= 0xFFFFFFFF else 8


def all_of(numel: int) -> Index:
    """Every position."""
    return Index("ALL", tuple(range(numel)), b"")


def best_k(gaps: Sequence[int]) -> int:
    """Section 8: the sum of q + n k is smallest; ties go to the smallest k."""
    return min(range(32), key=lambda k: sum(gap >> k for gap in gaps) + len(gaps) * k)


def rice(positions: Sequence[int], numel: int, k: int | None = None) -> Index:
    """RICE, with any k; positions may be outside."""
    gaps = [after - before - 1 for before, after in zip((-1, *positions), positions, strict=False)]
    if k is None:
        k = best_k(gaps)
    ones, bit = [], -1
    for gap in gaps:
        bit += (gap >> k) + 1
        ones.append(bit)
    unary_bits = bit + 1
    directory = []
    for start in range(0, unary_bits, 2048):
        rank = sum(one < start for one in ones)
        one, position = (ones[rank - 1], positions[rank - 1]) if rank else (-1, -1)
        directory += [position + 1 + ((start - one - 1) << k), rank]
    word = word_size(numel)
    low = sum((gap & ((1 << k) - 1)) << (i * k) for i, gap in enumerate(gaps))
    section = b"".join(
        (
            struct.pack("<B7xQ", k, unary_bits),
            unsigned([entry % (1 << 8 * word) for entry in directory], word),
            bit_words(low, k * len(gaps)),
            bitmap_of(ones, unary_bits),
            SLACK,
        )
    )
    return Index("RICE", tuple(positions), section)


def raw(positions: Sequence[int], numel: int) -> Index:
    """RAW."""
    return Index("RAW", tuple(positions), unsigned(positions, word_size(numel)) + SLACK)


def bitmap(positions: Sequence[int], numel: int) -> Index:
    """BITMAP."""
    ranks = [sum(position < start for position in positions) for start in range(0, numel, 2048)]
    section = unsigned(ranks, word_size(numel)) + bitmap_of(positions, numel) + SLACK
    return Index("BITMAP", tuple(positions), section)


ROW, COLUMN, DIAGONAL = 0, 1, 2
#: (kind, start, step, count)
Entry = tuple[int, int, int, int]


def struct_section(*entries: Entry) -> bytes:
    """A STRUCT section, whatever its entries say."""
    return b"".join(struct.pack("<QqQQ", *entry) for entry in entries) + SLACK


def struct_of(shape: tuple[int, ...], *entries: Entry) -> Index:
    """STRUCT; the positions by looking at each element of the matrix."""
    rows = shape[0] if len(shape) > 1 else 1
    columns = prod(shape) // rows
    lines = [(kind, line) for kind, start, step, count in entries for line in range(start, start + step * count, step)]
    found = [
        r * columns + c
        for r in range(rows)
        for c in range(columns)
        if any(line == (r, c, c - r)[kind] for kind, line in lines)
    ]
    return Index("STRUCT", tuple(found), struct_section(*entries))


def seeded(
    numel: int,
    seed: int,
    cells: int,
    chosen: Sequence[int] | None = None,
    k: int | None = None,
    tail: bytes | None = None,
) -> Index:
    """SEEDED.

    Args:
        numel: elements of the tensor.
        seed: the seed.
        cells: how many cells there are.
        chosen: those with a nonzero; None for all.
        k: that of the list of cells.
        tail: what follows seed and cells, instead of what is right.
    """
    chosen = range(cells) if chosen is None else chosen
    starts = {cell: cell * numel // cells for i in chosen for cell in (i, i + 1)}
    positions = [starts[i] + ((mix(i, seed) >> 32) * (starts[i + 1] - starts[i]) >> 32) for i in chosen]
    if tail is None and len(chosen) == cells:
        tail = SLACK
    elif tail is None:
        listed = chosen if 2 * len(chosen) <= cells else sorted(set(range(cells)) - set(chosen))
        tail = rice(listed, cells, k).section
    return Index("SEEDED", tuple(positions), struct.pack("<QQ", seed, cells) + tail, draw=(seed, cells))


@dataclass(frozen=True)
class Matrix:
    """What TILED takes a tensor for: classes of rows and of columns, and the k of each pair of classes."""

    tile_rows: int
    row_classes: Sequence[int]
    column_classes: Sequence[int]
    k: Sequence[Sequence[int]]

    def order(self, tile: int, k: int) -> list[int]:
        """The positions of a tile's elements of this k, in their order."""
        rows = range(tile * self.tile_rows, min((tile + 1) * self.tile_rows, len(self.row_classes)))
        found = [
            (a, b, r, c)
            for r in rows
            for a in (self.row_classes[r],)
            for c, b in enumerate(self.column_classes)
            if self.k[a][b] == k
        ]
        return [r * len(self.column_classes) + c for _, _, r, c in sorted(found)]


def fields_of(numbers: Sequence[int], width: int) -> bytes:
    """Fields of `width` bits in u32 words."""
    return bit_words(sum(number << (i * width) for i, number in enumerate(numbers)), width * len(numbers))


def tiled(positions: Sequence[int], matrix: Matrix, outside: Mapping[int, int] | None = None, **parts: object) -> Index:
    """TILED.

    Args:
        positions: increasing.
        matrix: the classes.
        outside: position -> the number in its tile's order that takes its place.
        parts: what the section says of itself, instead of what is right: `head` by field, `widths`, or bytes of a part.
    """
    table = [k for row in matrix.k for k in row]
    ks = sorted(set(table))
    tiles = range(-(-len(matrix.row_classes) // matrix.tile_rows))
    numbers = [
        [[(outside or {}).get(p, i) for i, p in enumerate(matrix.order(tile, k)) if p in positions] for k in ks]
        for tile in tiles
    ]
    row_bits, column_bits = (len(matrix.k) - 1).bit_length(), (len(matrix.k[0]) - 1).bit_length()
    widths, gaps, unary_bits = gap_parts(ks, numbers)
    head = {
        "row_bits": row_bits,
        "column_bits": column_bits,
        "zero": 0,
        "tile_rows": matrix.tile_rows,
        "columns": len(matrix.column_classes),
        "unary_bits": unary_bits,
    }
    right = {
        "table": padded(bytes(table)),
        "widths": widths,
        "row_classes": fields_of(matrix.row_classes, row_bits),
        "column_classes": fields_of(matrix.column_classes, column_bits),
        **gaps,
    }
    return Index("TILED", tuple(positions), section_of("<BBHIQQ", head, right, parts))


def gap_parts(ks: Sequence[int], tiles: Sequence[Sequence[Sequence[int]]]) -> tuple[bytes, dict[str, bytes], int]:
    """(widths, the parts from the sizes of tiles on, U) of sections 4.6 and 4.7.

    Args:
        ks: of each group.
        tiles: the numbers o of each tile, of each group.
    """
    low: list[tuple[int, int]] = []
    ones: list[int] = []
    sizes: list[int] = []
    bit = -1
    for groups in tiles:
        first = bit
        for k, numbers in zip(ks, groups, strict=True):
            for before, number in pairwise((-1, *numbers)):
                gap = number - before - 1
                bit += (gap >> k) + 1
                ones.append(bit)
                low.append((gap & ((1 << k) - 1), k))
        sizes.append(bit - first)
    counts = [[len(groups[i]) for groups in tiles] for i in range(len(ks))]
    widths = [max(numbers).bit_length() for numbers in (sizes, *counts)]
    low_bits = "".join(f"{number:0{k}b}"[::-1] for number, k in low if k)
    parts = {
        "sizes": fields_of(sizes, widths[0]),
        "counts": b"".join(fields_of(column, width) for column, width in zip(counts, widths[1:], strict=True)),
        "low": bitmap_of([i for i, one in enumerate(low_bits) if one == "1"], len(low_bits)),
        "unary": bitmap_of(ones, bit + 1),
        "slack": SLACK,
    }
    return padded(bytes(widths)), parts, bit + 1


def section_of(layout: str, head: dict[str, int], right: dict[str, bytes], parts: Mapping[str, object]) -> bytes:
    """A section: its head and its parts in order.  `parts` has others, or functions that make them of the right."""
    made = {name: part(right[name]) if callable(part) else part for name, part in parts.items() if name in right}
    changed = {name: part for name, part in made.items() if isinstance(part, bytes)}
    fields = {name: part for name, part in parts.items() if name in head and isinstance(part, int)}
    assert len(changed) + len(fields) == len(parts)
    return struct.pack(layout, *(head | fields).values()) + b"".join((right | changed).values())


# --- the base's elements (sections 4.7 and 5.2) ---


def key_of(element: int, dtype: str) -> int:
    """The bits below the sign, 15 at most."""
    bits = 8 * DTYPES[dtype][1] - 1
    return (element % (1 << bits)) >> max(bits - 15, 0)


@dataclass(frozen=True)
class BaseMatrix:
    """What FROM_BASE takes a tensor for.  The table has a byte for each class of row, column and element."""

    tile_rows: int
    row_classes: Sequence[int]
    column_classes: Sequence[int]
    thresholds: Sequence[int]
    table: Sequence[Sequence[Sequence[int]]]

    def byte_of(self, position: int, key: int) -> int:
        """The table's byte for an element of the base."""
        row, column = divmod(position, len(self.column_classes))
        of_element = sum(threshold <= key for threshold in self.thresholds)
        return self.table[self.row_classes[row]][self.column_classes[column]][of_element]


def from_base(
    positions: Sequence[int],
    base: Sequence[int],
    matrix: BaseMatrix,
    outside: Mapping[int, int] | None = None,
    dtype: str = "bfloat16",
    /,
    **parts: object,
) -> Index:
    """FROM_BASE.

    Args:
        positions: increasing.
        base: bits of all elements.
        matrix: the classes.
        outside: position -> the number in its group that takes its place.
        dtype: of the elements.
        parts: what the section says of itself, instead of what is right, as for `tiled`.
    """
    rows, columns = len(matrix.row_classes), len(matrix.column_classes)
    table = [byte for row in matrix.table for column in row for byte in column]
    groups, nonzeros, size = sorted(set(table)), set(positions), matrix.tile_rows * columns
    tiles = []
    for start in range(0, rows * columns, size):
        members: dict[int, list[int]] = {byte: [] for byte in groups}
        for position in range(start, min(start + size, rows * columns)):
            members[matrix.byte_of(position, key_of(base[position], dtype))].append(position)
        tiles.append(
            [
                [(outside or {}).get(p, i) for i, p in enumerate(members[byte]) if (p in nonzeros) == (byte < 0x80)]
                for byte in groups
            ]
        )
    row_bits, column_bits = (len(matrix.table) - 1).bit_length(), (len(matrix.table[0]) - 1).bit_length()
    widths, gaps, unary_bits = gap_parts([byte % 32 for byte in groups], tiles)
    head = {
        "row_bits": row_bits,
        "column_bits": column_bits,
        "classes": len(matrix.thresholds) + 1,
        "zero": 0,
        "tile_rows": matrix.tile_rows,
        "columns": columns,
        "unary_bits": unary_bits,
    }
    right = {
        "thresholds": padded(unsigned(matrix.thresholds, 2)),
        "table": padded(bytes(table)),
        "widths": widths,
        "row_classes": fields_of(matrix.row_classes, row_bits),
        "column_classes": fields_of(matrix.column_classes, column_bits),
        **gaps,
    }
    return Index("FROM_BASE", tuple(positions), section_of("<BBBBIQQ", head, right, parts))


# --- value codecs (section 5) and the canonical choice of their parameters (section 8) ---


@dataclass(frozen=True)
class Values:
    """A VALUES section, decoded, and the bits that it holds; `source` is what was quantised."""

    codec: str
    bits: tuple[int, ...]
    section: bytes
    frame: bytes | None = None
    source: tuple[float, ...] = ()


NO_VALUES = Values("NONE", (), b"")


def grouped(numbers: Sequence[float]) -> list[Sequence[float]]:
    """Groups of 128."""
    return [numbers[start : start + 128] for start in range(0, len(numbers), 128)]


def clip(number: int, low: int, high: int) -> int:
    """Kept within low to high."""
    return max(low, min(high, number))


def f32_values(numbers: Sequence[float]) -> Values:
    """F32."""
    bits = tuple(map(bits32, numbers))
    return Values("F32", bits, unsigned(bits, 4) + SLACK, source=tuple(numbers))


def f16_values(numbers: Sequence[float]) -> Values:
    """F16."""
    halves = [f16(fl32(number)) for number in numbers]
    bits = tuple(bits32(from_f16(half)) for half in halves)
    return Values("F16", bits, padded(unsigned(halves, 2)) + SLACK, source=tuple(numbers))


def bf16_values(numbers: Sequence[float]) -> Values:
    """BF16."""
    halves = [bf16(number) for number in numbers]
    bits = tuple(half << 16 for half in halves)
    return Values("BF16", bits, padded(unsigned(halves, 2)) + SLACK, source=tuple(numbers))


def i8_stored(scales: Sequence[int], codes: Sequence[int]) -> Values:
    """I8 with these parameters."""
    bits = tuple(bits32(from_bf16(scales[i // 128]) * code) for i, code in enumerate(codes))
    section = padded(unsigned(scales, 2)) + padded(struct.pack(f"<{len(codes)}b", *codes)) + SLACK
    return Values("I8", bits, section)


def i8_values(numbers: Sequence[float]) -> Values:
    """I8, canonical."""
    scales, codes = [], []
    for group in grouped([fl32(number) for number in numbers]):
        scales.append(bf16(max(map(abs, group)) / 127))
        scale = from_bf16(scales[-1])
        codes += [clip(round(fl32(v / scale)), -127, 127) if scale else 0 for v in group]
    return replace(i8_stored(scales, codes), source=tuple(numbers))


def i4_stored(parameters: Sequence[tuple[int, int]], nibbles: Sequence[int]) -> Values:
    """I4 with these parameters."""
    bits = []
    for i, nibble in enumerate(nibbles):
        lo, step = map(from_bf16, parameters[i // 128])
        bits.append(bits32(lo + fl32(step * (nibble & 7))) | (nibble >> 3) << 31)
    packed = bytes(low | high << 4 for low, high in zip(nibbles[::2], (*nibbles[1::2], 0), strict=False))
    section = unsigned([*chain(*parameters)], 2) + padded(packed) + SLACK
    return Values("I4", tuple(bits), section)


def i4_values(numbers: Sequence[float]) -> Values:
    """I4, canonical."""
    parameters, nibbles = [], []
    for group in grouped([fl32(number) for number in numbers]):
        lo_bits = bf16(min(map(abs, group)))
        lo = from_bf16(lo_bits)
        step_bits = bf16(max(fl32(max(map(abs, group)) - lo), 0.0) / 7)
        step = from_bf16(step_bits)
        parameters.append((lo_bits, step_bits))
        for v in group:
            code = clip(round(fl32(fl32(abs(v) - lo) / step)), 0, 7) if step else 0
            nibbles.append(code | bits32(v) >> 31 << 3)
    return replace(i4_stored(parameters, nibbles), source=tuple(numbers))


def sign_stored(magnitudes: Sequence[int], signs: Sequence[int]) -> Values:
    """SIGN with these parameters."""
    bits = tuple(magnitudes[i // 128] << 16 | sign << 31 for i, sign in enumerate(signs))
    ones = [i for i, sign in enumerate(signs) if sign]
    return Values("SIGN", bits, padded(unsigned(magnitudes, 2)) + bitmap_of(ones, len(signs)) + SLACK)


def sign_values(numbers: Sequence[float]) -> Values:
    """SIGN, canonical."""
    numbers = [fl32(number) for number in numbers]
    magnitudes = [bf16(reduce(add, map(abs, group), 0.0) / len(group)) for group in grouped(numbers)]
    signs = [bits32(number) >> 31 for number in numbers]
    return replace(sign_stored(magnitudes, signs), source=tuple(numbers))


#: The canonical encoders of the value codecs of ADD.
FLOAT_CODECS = (f32_values, f16_values, bf16_values, i8_values, i4_values, sign_values)


def bits_values(elements: Sequence[int], dtype: str) -> Values:
    """BITS."""
    return Values("BITS", tuple(elements), padded(unsigned(elements, DTYPES[dtype][1])) + SLACK)


def ulp_values(shifts: Sequence[int], size: int = 2, k: int | None = None, j: int | None = None) -> Values:
    """ULP of elements of `size` bytes; canonical, unless k or j is given."""
    blocks = [shifts[start : start + 8192] for start in range(0, len(shifts), 8192)]
    listed = [[(i, abs(d)) for i, d in enumerate(block) if abs(d) > 1] for block in blocks]
    ranks = [[-1, *(rank for rank, _ in block)] for block in listed]
    gaps = [[b - a - 1 for a, b in pairwise(each)] for each in ranks]
    magnitudes = [magnitude for block in listed for _, magnitude in block]
    if k is None:
        k = min(range(14), key=lambda k: sum((gap >> k) + k for block in gaps for gap in block))
    if j is None:
        j = min(range(8 * size - 1), key=lambda j: sum(2 * ulp_width(m, j) - j for m in magnitudes))
    stream, bits, directory, before = 0, 0, [], 0
    for block, own in zip(listed, gaps, strict=True):
        directory += [bits, before]
        before += len(block)
        coded = [(gap, magnitude, k, j) for gap, (_, magnitude) in zip(own, block, strict=True)]
        number, width = ulp_stream(coded)
        stream |= number << bits
        bits += width
    signs = bitmap_of([i for i, d in enumerate(shifts) if d < 0], len(shifts))
    head = bytes((k, j)) + bytes(6) + unsigned([bits, len(magnitudes)], 8)
    section = head + unsigned(directory, 4) + signs + bit_words(stream, bits) + SLACK
    return Values("ULP", tuple(d % (1 << 8 * size) for d in shifts), section)


def ulp_stream(listed: Sequence[tuple[int, int, int, int]]) -> tuple[int, int]:
    """A block's stream and its bits: four parts, of (gap, magnitude, k, j) of each listed shift."""
    parts = [(1 << (gap >> k), (gap >> k) + 1) for gap, _, k, _ in listed]
    parts += [(gap & (1 << k) - 1, k) for gap, _, k, _ in listed]
    widths = [ulp_width(magnitude, j) for _, magnitude, _, j in listed]
    parts += [(1 << (width - j), width - j + 1) for width, (_, _, _, j) in zip(widths, listed, strict=True)]
    parts += [(m - 2 + (1 << j) - (1 << width), width) for width, (_, m, _, j) in zip(widths, listed, strict=True)]
    stream = bits = 0
    for number, width in parts:
        stream |= number << bits
        bits += width
    return stream, bits


def ulp_from_base(
    shifts: Sequence[int],
    base: Sequence[int],
    thresholds: Sequence[int],
    pairs: Sequence[tuple[int, int]],
    outside: Mapping[int, int] | None = None,
    dtype: str = "bfloat16",
    /,
    **parts: object,
) -> Values:
    """ULP_FROM_BASE.

    Args:
        shifts: of all nonzeros.
        base: bits of their elements.
        thresholds: of the keys.
        pairs: k and j of each class.
        outside: rank -> the number in its class that takes its place.
        dtype: of the elements.
        parts: what the section says of itself, instead of what is right, as for `tiled`.
    """
    classes, size = range(len(thresholds) + 1), DTYPES[dtype][1]
    of_class = [sum(threshold <= key_of(element, dtype) for threshold in thresholds) for element in base]
    counts: list[list[int]] = [[] for _ in classes]
    directory, stream, bits = [], 0, 0
    for start in range(0, len(shifts), 8192):
        coded = []
        for each, (k, j) in zip(classes, pairs, strict=True):
            ranks = [rank for rank in range(start, min(start + 8192, len(shifts))) if of_class[rank] == each]
            listed = [(i, rank) for i, rank in enumerate(ranks) if abs(shifts[rank]) > 1]
            numbers = [-1, *((outside or {}).get(rank, i) for i, rank in listed)]
            gaps = [after - before - 1 for before, after in pairwise(numbers)]
            coded += [(gap, abs(shifts[rank]), k, j) for gap, (_, rank) in zip(gaps, listed, strict=True)]
            counts[each].append(len(listed))
        number, width = ulp_stream(coded)
        directory.append(bits)
        stream |= number << bits
        bits += width
    width = max(map(max, counts)).bit_length()
    right = {
        "thresholds": padded(unsigned(thresholds, 2)),
        "parameters": padded(bytes(chain(*pairs))),
        "counts": b"".join(fields_of(of_blocks, width) for of_blocks in counts),
        "directory": unsigned(directory, 4),
        "signs": bitmap_of([i for i, d in enumerate(shifts) if d < 0], len(shifts)),
        "stream": bit_words(stream, bits),
        "slack": SLACK,
    }
    head = {"classes": len(classes), "width": width, "zero": 0, "zeros": 0, "bits": bits}
    section = section_of("<BBHIQ", head, right, parts)
    return Values("ULP_FROM_BASE", tuple(d % (1 << 8 * size) for d in shifts), section)


def ulp_width(magnitude: int, j: int) -> int:
    """w of section 5.1."""
    return (magnitude - 2 + (1 << j)).bit_length() - 1


# --- zstd frames, put together by hand, so that no version of a library decides their bytes ---


def zstd_frame(content: bytes, states_size: bool = True) -> bytes:
    """A frame of raw blocks and, for zeros, of runs of one byte (RFC 8878, 3.1.1)."""
    blocks = [
        (1, len(part), part[:1]) if part.startswith(bytes(8)) else (0, len(part), part)
        for part in re.split(rb"(\0{8,})", content)
        if part
    ] or [(0, 0, b"")]
    # A single segment with a size of four bytes, or no size and a window of 128 KiB.
    head = b"\xa0" + struct.pack("<I", len(content)) if states_size else b"\x00\x38"
    body = b"".join(
        ((i == len(blocks) - 1) | kind << 1 | size << 3).to_bytes(3, "little") + data
        for i, (kind, size, data) in enumerate(blocks)
    )
    return ZSTD_MAGIC + head + body


def zstd_index(index: Index, frame: bytes | None = None) -> Index:
    """Stored as a frame."""
    return replace(index, frame=zstd_frame(index.section) if frame is None else frame)


def zstd_values(values: Values, frame: bytes | None = None) -> Values:
    """Stored as a frame."""
    return replace(values, frame=zstd_frame(values.section) if frame is None else frame)


# --- the file (sections 2, 3 and 7) ---

HEADER = struct.Struct("<8sHHIQQQQQQIIII32s12s")
HEADER_FIELDS = (
    *("magic", "major", "minor", "tensor_count", "incompatible", "compatible", "file_size"),
    *("names_size", "metadata_size", "extension_size"),
    *("table_crc", "names_crc", "metadata_crc", "extension_crc", "digest", "zero"),
)
RECORD = struct.Struct("<IHBBBBBBIQQQQQQQQQII8Q")
RECORD_FIELDS = (
    *("name_offset", "name_size", "rank", "dtype", "op", "index_codec", "value_codec", "flags", "zero"),
    *("nnz", "base_fingerprint", "result_fingerprint"),
    *("index_offset", "index_stored", "index_decoded", "values_offset", "values_stored", "values_decoded"),
    *("index_crc", "values_crc", *(f"dim{i}" for i in range(8))),
)
Fields = Mapping[str, int | bytes]


@dataclass(frozen=True)
class Tensor:
    """One tensor's delta.  `record` replaces fields of its record, for files that are to be refused.

    `base` is the base's elements at the positions, `base_tensor` all of them, as bits.
    """

    shape: tuple[int, ...]
    index: Index = NO_INDEX
    values: Values = NO_VALUES
    name: str | bytes = "w"
    dtype: str = "bfloat16"
    op: str = "ADD"
    base_fingerprint: int | None = None
    result_fingerprint: int | None = None
    base: tuple[int, ...] | None = None
    base_tensor: tuple[int, ...] | None = None
    record: Fields = field(default_factory=dict)

    @property
    def raw_name(self) -> bytes:
        """The name's bytes."""
        return self.name if isinstance(self.name, bytes) else self.name.encode()

    @property
    def digest(self) -> bytes:
        """T of section 7."""
        size = 4 if self.op == "ADD" else DTYPES[self.dtype][1]
        head = bytes((OPS[self.op], DTYPES[self.dtype][0], len(self.shape)))
        numbers = (*self.shape, len(self.index.positions), *self.index.positions)
        values = unsigned(self.values.bits, size) if self.values.bits else b""
        return hashlib.sha256(head + unsigned(numbers, 8) + values).digest()

    def expected(self) -> dict[str, object]:
        """What a reader finds."""
        return {
            "name": self.name,
            "dtype": self.dtype,
            "op": self.op,
            "index_codec": self.index.codec,
            "value_codec": self.values.codec,
            "shape": self.shape,
            "positions": self.index.positions,
            "values": self.values.bits,
            "base_fingerprint": self.base_fingerprint,
            "result_fingerprint": self.result_fingerprint,
        }


def fingerprinted(tensor: Tensor, base: Sequence[int]) -> Tensor:
    """With both fingerprints, over a base that has these elements, as bits, at the positions."""
    positions, result = tensor.index.positions, tensor.values.bits
    if tensor.op == "ADD":
        pairs = zip(base, tensor.values.bits, strict=True)
        result = tuple(added(bits, float32(value), tensor.dtype) for bits, value in pairs)
    if tensor.op == "ULP":
        result = tuple(moved(bits, d, tensor.dtype) for bits, d in zip(base, result, strict=True))
    return replace(
        tensor,
        base=tuple(base),
        base_fingerprint=fingerprint(zip(positions, base, strict=True)),
        result_fingerprint=fingerprint(zip(positions, result, strict=True)),
    )


def ordered(bits: int, dtype: str) -> int:
    """o of section 6.1, for ULP."""
    size = 8 * DTYPES[dtype][1]
    half = 1 << size - 1
    if re.fullmatch(r"int\d+", dtype):
        return bits if bits < half else bits - 2 * half
    if dtype in ("bool", "float8_e8m0fnu") or dtype.startswith("uint"):
        return bits - half
    return bits if bits < half else half - 1 - bits


def moved(bits: int, d: int, dtype: str) -> int:
    """The bits after ULP with the two's complement `d`; looks for them where the map is not to be inverted."""
    size = 8 * DTYPES[dtype][1]
    half = 1 << size - 1
    order = ordered(bits, dtype) + (d - 2 * half if d >= half else d)
    candidates = {order % (2 * half), order + half, half - 1 - order}
    (found,) = (x for x in candidates if x >= 0 and ordered(x, dtype) == order)
    return found


@dataclass(frozen=True)
class File:
    """A whole file.  `names`, `metadata` as bytes and `header` are for files that are to be refused.

    `canonical` says that a writer, given the same contents, makes the same bytes.
    """

    tensors: tuple[Tensor, ...] = ()
    metadata: Mapping[str, str] | bytes = field(default_factory=dict)
    extension: bytes = b""
    minor: int | None = None  # the lowest that suffices
    compatible: int = 0
    canonical: bool = True
    names: bytes | None = None
    tail: bytes = b""
    leads: tuple[int, ...] | None = None  # of each section, INDEX 0, VALUES 0, ...: the file is packed (2.3)
    header: Fields = field(default_factory=dict)

    @property
    def base(self) -> bytes:
        """The elements of the base's tensors, one tensor after the other."""
        return b"".join(unsigned(t.base_tensor or (), DTYPES[t.dtype][1]) for t in self.tensors)

    @property
    def digest(self) -> bytes:
        """Section 7."""
        parts = [struct.pack("<H", len(t.raw_name)) + t.raw_name + t.digest for t in self.tensors]
        head = b"shiradelta 1" + struct.pack("<I", len(parts))
        return hashlib.sha256(head + b"".join(parts)).digest()

    @property
    def written_minor(self) -> int:
        """Section 8."""
        used = chain.from_iterable((t.op, t.index.codec, t.values.codec) for t in self.tensors)
        least = int(self.leads is not None)
        return max((least, *(MINORS.get(name, 0) for name in used))) if self.minor is None else self.minor

    def expected(self) -> dict[str, object]:
        """What a reader finds."""
        return {
            "minor": self.written_minor,
            "digest": self.digest.hex(),
            "metadata": self.metadata,
            "tensors": [tensor.expected() for tensor in self.tensors],
        }


def metadata_section(pairs: Mapping[str, str]) -> bytes:
    """Pairs in byte order of the keys."""
    encoded = sorted((key.encode(), value.encode()) for key, value in pairs.items())
    return b"".join(metadata_pair(key, value) for key, value in encoded)


def metadata_pair(key: bytes, value: bytes) -> bytes:
    """One pair."""
    return struct.pack("<II", len(key), len(value)) + key + value


@dataclass(frozen=True)
class Built:
    """A file's bytes and where its sections are: name -> (start, end without padding)."""

    data: bytes
    places: Mapping[str, tuple[int, int]]


def build(file: File) -> Built:
    """Lays the file out; all checksums are right, unless a field is replaced."""
    names = b"".join(tensor.raw_name for tensor in file.tensors) if file.names is None else file.names
    metadata = file.metadata if isinstance(file.metadata, bytes) else metadata_section(file.metadata)
    sizes = (len(file.tensors) * RECORD.size, len(names), len(metadata), len(file.extension))
    at = 128 + sum(align(size, 64) for size in sizes)
    table, payload, name_offset = [], b"", 0
    for tensor in file.tensors:
        record, stored = _record(tensor, name_offset, at + len(payload))
        table.append(record)
        payload += stored
        name_offset += len(tensor.raw_name)
    payload += file.tail
    sections = {"TABLE": b"".join(table), "NAMES": names, "METADATA": metadata, "EXTENSION": file.extension}
    zstd = any(t.index.frame is not None or t.values.frame is not None for t in file.tensors)
    head = _packed(
        HEADER,
        HEADER_FIELDS,
        {
            "magic": b"\x89SHD\r\n\x1a\n",
            "major": 1,
            "minor": file.written_minor,
            "tensor_count": len(file.tensors),
            "incompatible": int(zstd),
            "compatible": file.compatible,
            "file_size": at + len(payload),
            **{f"{name.lower()}_size": len(section) for name, section in sections.items() if name != "TABLE"},
            **{f"{name.lower()}_crc": zlib.crc32(section) for name, section in sections.items()},
            "digest": file.digest,
            "zero": bytes(12),
            **file.header,
        },
    )
    data = head + struct.pack("<I", zlib.crc32(head))
    places = {}
    for name, section in sections.items():
        places[name] = len(data), len(data) + len(section)
        data += padded(section, 64)
    for i, tensor in enumerate(file.tensors):
        for name, stored in ("INDEX", _stored(tensor.index)), ("VALUES", _stored(tensor.values)):
            places[f"{name} {i}"] = at, at + len(stored)
            at += align(len(stored), 64)
    if file.leads is not None:
        return Built(packed(data + payload, file.leads), {})
    return Built(data + payload, places)


@dataclass(frozen=True)
class Control:
    """What a packed file is made of, for those that are to be refused.

    `records` replaces fields of records, by number.  `frame` is CONTROL as it is stored.
    """

    records: Mapping[int, Fields] = field(default_factory=dict)
    leads: bytes | None = None
    rest: bytes | None = None
    frame: bytes | None = None


def packed(data: bytes, leads: Sequence[int], other: Control = Control(), **header: int | bytes) -> bytes:
    """The packed file that stands for another one (section 2.3), with these fields in its header."""
    fields = dict(zip(HEADER_FIELDS, HEADER.unpack_from(data), strict=True))
    count = fields["tensor_count"]
    at, parts, of_leads, rest, table = 128, [], b"", b"", []
    for size in (count * RECORD.size, fields["names_size"], fields["metadata_size"], fields["extension_size"]):
        parts.append(data[at : at + size])
        at += align(size, 64)
    for i, values in enumerate(RECORD.iter_unpack(parts[0])):
        record = dict(zip(RECORD_FIELDS, values, strict=True))
        record["name_offset"] = 0
        for j, which in enumerate(("index", "values")):
            start, stored, lead = record[f"{which}_offset"], record[f"{which}_stored"], leads[2 * i + j]
            is_zstd = record["flags"] >> (2 + j) & 1
            of_leads += data[start : start + lead]
            rest += data[start + lead : start + stored - (8 if stored and not is_zstd else 0)]
            record |= {f"{which}_offset": lead, f"{which}_crc": 0}
            if not is_zstd:
                record[f"{which}_decoded"] = 0
        table.append(_packed(RECORD, RECORD_FIELDS, {**record, **other.records.get(i, {})}))
    columns = b"".join(bytes(column) for column in zip(*table, strict=True))
    control = b"".join((columns, *parts[1:], of_leads if other.leads is None else other.leads))
    frame = zstd_frame(control) if other.frame is None else other.frame
    rest = rest if other.rest is None else other.rest
    zeros = {"metadata_crc": 0, "extension_crc": 0}
    fields |= zeros | {"incompatible": fields["incompatible"] | 4, "file_size": 128 + len(frame) + len(rest)}
    fields |= {"table_crc": zlib.crc32(frame), "names_crc": zlib.crc32(rest)}
    fields["zero"] = struct.pack("<III", len(frame), len(control), 0)
    head = _packed(HEADER, HEADER_FIELDS, fields | header)
    return head + struct.pack("<I", zlib.crc32(head)) + frame + rest


def _stored(part: Index | Values) -> bytes:
    return part.section if part.frame is None else part.frame


def _packed(layout: struct.Struct, names: Sequence[str], fields: Fields) -> bytes:
    assert fields.keys() <= {*names}, f"no such field: {fields.keys() - {*names}}"
    return layout.pack(*(fields.get(name, 0) for name in names))


def _record(tensor: Tensor, name_offset: int, at: int) -> tuple[bytes, bytes]:
    """(the record, both sections with their padding)."""
    index, values = _stored(tensor.index), _stored(tensor.values)
    flags = (
        tensor.base_fingerprint is not None,
        tensor.result_fingerprint is not None,
        tensor.index.frame is not None,
        tensor.values.frame is not None,
    )
    fields: Fields = {
        "name_offset": name_offset,
        "name_size": len(tensor.raw_name),
        "rank": len(tensor.shape),
        "dtype": DTYPES[tensor.dtype][0],
        "op": OPS[tensor.op],
        "index_codec": INDEX_CODECS[tensor.index.codec],
        "value_codec": VALUE_CODECS[tensor.values.codec],
        "flags": sum(flag << i for i, flag in enumerate(flags)),
        "nnz": len(tensor.index.positions),
        "base_fingerprint": tensor.base_fingerprint or 0,
        "result_fingerprint": tensor.result_fingerprint or 0,
        "index_offset": at,
        "index_stored": len(index),
        "index_decoded": len(tensor.index.section),
        "values_offset": at + align(len(index), 64),
        "values_stored": len(values),
        "values_decoded": len(tensor.values.section),
        "index_crc": zlib.crc32(index),
        "values_crc": zlib.crc32(values),
        **{f"dim{i}": size for i, size in enumerate(tensor.shape)},
    }
    return _packed(RECORD, RECORD_FIELDS, {**fields, **tensor.record}), padded(index, 64) + padded(values, 64)


# --- valid files ---

Valid = Iterator[tuple[str, File]]


def halves(count: int) -> list[float]:
    """0.5, -1, 1.5, ...: exact in every float codec."""
    return [(i + 1) * (-0.5 if i % 2 else 0.5) for i in range(count)]


def change(
    shape: tuple[int, ...],
    index: Index,
    values: Callable[[Sequence[float]], Values] = bf16_values,
    name: str = "w",
    dtype: str = "bfloat16",
) -> Tensor:
    """ADD of some values at the positions of `index`."""
    return Tensor(shape, index, values(halves(len(index.positions))), name, dtype)


def one(tensor: Tensor, canonical: bool = True) -> File:
    """A file of one tensor."""
    return File((tensor,), canonical=canonical)


def spread(count: int, step: int, first: int = 3) -> list[int]:
    """Positions at about `step` from each other."""
    return [first + i * step + i * i * 7 % max(step - 1, 1) for i in range(count)]


EXAMPLE = Tensor((16,), rice([3, 4, 9], 16, k=1), i4_values([0.5, -1.0, 2.25]))
EXAMPLE_BASE = (0x3F80, 0xBF80, 0x7FC0)


def valid_rice() -> Valid:
    """Section 4.2."""
    yield "example", one(fingerprinted(EXAMPLE, EXAMPLE_BASE), canonical=False)
    positions = spread(40, 90)
    yield "rice", one(change((64, 64), rice(positions, 4096)))
    for k in (0, 3, 9, 31):
        yield f"rice_k{k}", one(change((64, 64), rice(positions, 4096, k)), canonical=False)
    yield "rice_one_element", one(change((1,), rice([0], 1)), canonical=False)
    yield "rice_rank_0", one(change((), rice([0], 1, 7)), canonical=False)
    yield "rice_last_element", one(change((100, 100), rice([9999], 10000)), canonical=False)
    yield "rice_first_element", one(change((100, 100), rice([0], 10000)), canonical=False)
    # 32 fields of 3 bits are 3 words and U = 64 is 2: no bit is unused.
    yield "rice_no_unused_bits", one(change((300,), rice([8 * i + 15 for i in range(32)], 300, 3)), False)
    for unary_bits in 2047, 2048, 2049, 4096:
        positions = [5, 6, unary_bits - 1]
        yield f"rice_unary_{unary_bits}", one(change((5000,), rice(positions, 5000, 0)), canonical=False)
    blocks = [0, 2046, 2047, 2048, 2049, 5000, 10239, 10240, 20000]
    yield "rice_blocks", one(change((20001,), rice(blocks, 20001, 0)), canonical=False)
    yield "rice_empty_blocks", one(change((20001,), rice([20000], 20001, 1)), canonical=False)
    yield "rice_blocks_with_low_bits", one(change((150, 150), rice(spread(300, 70), 22500, 2)), canonical=False)
    yield "rice_blocks_canonical", one(change((60, 1000), rice(spread(600, 95), 60000)))
    narrow = (1 << 32) - 1
    positions = [0, 1, 1 << 31, narrow - 2, narrow - 1]
    yield "rice_narrow_limit", one(change((narrow,), rice(positions, narrow, 21)), canonical=False)
    for power in 32, 33, 40:
        numel = 1 << power
        positions = [7, numel // 2, numel // 2 + 1, numel - 2, numel - 1]
        yield f"rice_wide_{power}", one(change((4, numel // 4), rice(positions, numel, power - 12)), False)


def valid_other_positions() -> Valid:
    """Sections 4.1, 4.3, 4.4 and 4.5."""
    yield "raw", one(change((64, 64), raw(spread(40, 90), 4096)), canonical=False)
    yield "raw_canonical", one(change((4096,), raw([1, 4095], 4096)))
    for numel in (1, 0xFFFFFFFF, 0x100000000, MAX_NUMEL):
        positions = sorted({0, numel // 2, numel - 1})
        yield f"raw_{numel}", one(change((numel,), raw(positions, numel)), canonical=False)
    yield "bitmap", one(change((40,), bitmap([i for i in range(40) if i % 3], 40)))
    for numel in (1, 31, 32, 33, 2048, 2049, 6000):
        positions = sorted({0, numel - 1, *range(100, numel, 17)})
        yield f"bitmap_{numel}", one(change((numel,), bitmap(positions, numel)), canonical=False)
    for name, shape, canonical, entries in (
        ("row", (20, 30), True, [(ROW, 4, 1, 1)]),
        ("last_row", (20, 30), True, [(ROW, 19, 1, 1)]),
        ("rows", (64, 60), True, [(ROW, 1, 1, 2), (ROW, 6, 4, 3)]),
        ("column", (30, 20), True, [(COLUMN, 19, 1, 1)]),
        ("columns", (16, 40), True, [(COLUMN, 0, 13, 4)]),
        ("diagonals", (20, 30), True, [(DIAGONAL, -3, 7, 3)]),
        ("diagonals_wide", (3, 50), False, [(DIAGONAL, -2, 1, 1), (DIAGONAL, 49, 1, 1)]),
        ("diagonals_tall", (50, 3), False, [(DIAGONAL, -49, 1, 1), (DIAGONAL, -20, 22, 2)]),
        ("mixed", (20, 30), False, [(ROW, 0, 2, 3), (COLUMN, 29, 1, 1), (DIAGONAL, -19, 1, 1), (DIAGONAL, 0, 1, 2)]),
        ("all_kinds", (40, 60), True, [(ROW, 7, 1, 1), (COLUMN, 11, 1, 1), (DIAGONAL, 0, 1, 1)]),
        ("step_of_one_line", (20, 30), False, [(ROW, 4, 1 << 63, 1)]),
        ("rank_0", (), False, [(DIAGONAL, 0, 1, 1)]),
        ("rank_1", (9,), False, [(COLUMN, 2, 3, 3)]),
        ("rank_3", (12, 5, 8), True, [(ROW, 2, 1, 2)]),
        ("one_column", (9, 1), False, [(ROW, 0, 4, 3)]),
        ("covers_all", (4, 6), False, [(ROW, 0, 1, 4), (COLUMN, 0, 1, 6)]),
    ):
        yield f"struct_{name}", one(change(shape, struct_of(shape, *entries)), canonical)
    many = [(ROW, 2 * i + i % 2, 1, 1) for i in range(256)]
    yield "struct_256_entries", one(change((512, 1), struct_of((512, 1), *many)), canonical=False)
    whole: list[tuple[int, ...]] = [(), (1,), (7, 11), (1, 2, 1, 3, 1, 2, 1, 2)]
    for dims in whole:
        yield f"all_rank_{len(dims)}", one(change(dims, all_of(prod(dims))))
    empty: list[tuple[int, ...]] = [(0,), (3, 0, 2), (0, MAX_NUMEL, MAX_NUMEL), (MAX_NUMEL,), (2,) * 8, ()]
    for dims in empty:
        name = "x".join(str(dim) if dim < MAX_NUMEL else "max" for dim in dims) or "scalar"
        yield f"none_{name}", one(Tensor(dims))


def valid_tiled() -> Valid:
    """Section 4.6."""

    def case(shape: tuple[int, ...], positions: Sequence[int], matrix: Matrix) -> File:
        return one(change(shape, tiled(positions, matrix)), canonical=False)

    halves_of = Matrix(2, (0, 1, 0, 1), (0, 0, 1, 1), ((0, 1), (1, 2)))
    yield "tiled", case((4, 4), (0, 1, 3, 6, 9, 15), halves_of)
    corner = [p for p in range(1 << 14) if p % 4 == 0 and p // 128 % 4 == 0 and (p // 4 + p // 512) % 2]
    quarter = [int(i % 4 == 0) for i in range(128)]
    yield "tiled_canonical", one(change((128, 128), tiled(corner, Matrix(128, quarter, quarter, ((31, 31), (31, 0))))))
    yield "tiled_all_elements", case((4, 4), range(16), halves_of)
    yield "tiled_one_tile", case((4, 4), (0, 15), replace(halves_of, tile_rows=4))
    yield "tiled_last_tile_is_lower", case((4, 4), (2, 13, 14), replace(halves_of, tile_rows=3))
    yield "tiled_empty_tiles", case((6, 4), (11,), Matrix(1, (0, 1, 0, 0, 1, 1), (0, 1, 1, 0), ((0, 1), (3, 1))))
    yield "tiled_rank_0", case((), (0,), Matrix(1, (1,), (0,), ((0, 1), (31, 2))))
    yield "tiled_rank_1", case((12,), (1, 4, 10), Matrix(3, (0, 0, 1), (1, 0, 1, 1), ((2, 2), (0, 2))))
    yield (
        "tiled_rows_of_the_last_dimension",
        case((2, 3, 4), (5, 21), Matrix(6, (0, 1) * 3, (0, 1, 1, 1), ((1, 0), (3, 2)))),
    )
    yield (
        "tiled_one_column",
        case((40, 1), spread(9, 4), Matrix(40, [i % 2 for i in range(40)], (1,), ((4, 1), (4, 3)))),
    )
    yield "tiled_one_row", case((1, 40), spread(9, 4), Matrix(1, (0,), [i // 20 for i in range(40)], ((1, 3), (0, 0))))
    sixteen = [[(3 * a + b) % 11 for b in range(16)] for a in range(16)]
    many = Matrix(5, [i * 7 % 16 for i in range(23)], [i * 5 % 16 for i in range(50)], sixteen)
    yield "tiled_classes_of_4_bits", case((23, 50), spread(90, 12), many)
    yield "tiled_one_k", case((23, 50), spread(90, 12), replace(many, k=[[3] * 16] * 16))
    yield (
        "tiled_every_k",
        case((23, 50), spread(90, 12), replace(many, k=[[(16 * a + b) % 32 for b in range(16)] for a in range(16)])),
    )
    mixed = Matrix(7, [0, 1, 2] * 9, [i % 8 for i in range(33)], [[(a + b) % 3 for b in range(8)] for a in range(4)])
    yield "tiled_classes_without_lines", case((27, 33), spread(80, 11), mixed)
    largest = Matrix(2, [i % 2 for i in range(4)], [i % 3 % 2 for i in range(65536)], ((9, 11), (13, 17)))
    yield "tiled_largest_tile", case((4, 65536), (0, 65535, 65536, 131071, 131072, 262143), largest)


def valid_seeded() -> Valid:
    """Section 4.8."""

    def case(shape: tuple[int, ...], *arguments: Any) -> File:
        return one(change(shape, seeded(prod(shape), *arguments)), canonical=False)

    yield "seeded", case((4, 4), 7, 5, (0, 1, 3), 0)
    yield "seeded_all_cells", one(change((64, 64), seeded(4096, 0, 40)))
    yield "seeded_cells_of_two_sizes", case((29,), U64, 12)
    yield "seeded_cells_of_one_element", case((3, 7), 1, 21, (0, 1, 5, 20))
    yield "seeded_cells_of_one_and_two_elements", case((3, 7), 1, 13, (0, 1, 5, 12))
    yield "seeded_one_cell", case((1000,), 3, 1)
    yield "seeded_rank_0", case((), 9, 1)
    yield "seeded_one_of_many", case((64, 64), 2, 4000, (2345,))
    yield "seeded_all_but_one", one(change((64, 64), seeded(4096, 2, 100, [i for i in range(100) if i != 32])))
    yield "seeded_some", one(change((64, 64), seeded(4096, 2, 500, [i for i in range(500) if i * 7 % 10 < 3])))
    for count in 6, 7:  # the cells with a nonzero are half of all, and more
        yield f"seeded_{count}_of_12", case((100,), 5, 12, [i for i in range(12) if i % 2 or i > 25 - 2 * count])
    for k in 0, 5, 31:
        yield f"seeded_k{k}", case((64, 64), 2, 3000, spread(40, 60), k)
    yield "seeded_blocks", case((128, 64), 1 << 63, 4200, (0, 2047, 2048, 4100), 0)
    yield "seeded_blocks_of_others", case((64, 64), 4, 2060, [i for i in range(2060) if i % 2 or i == 1000], 0)
    for power in 32, 33, 50, 56:
        numel, cells = 1 << power, max(1 << (power - 32), 3)
        yield f"seeded_wide_{power}", case((4, numel // 4), 8, cells, sorted({0, cells // 2, cells - 1}))
    yield "seeded_most_cells", case((1 << 33,), 8, (1 << 32) - 1, (0, 77, 1 << 31, (1 << 32) - 2))


def valid_values() -> Valid:
    """Section 5, for ADD."""
    for codec in FLOAT_CODECS:
        name = codec.__name__.removesuffix("_values")
        for count in 1, 2, 127, 128, 129, 259:
            yield f"values_{name}_{count}", one(change((count,), all_of(count), codec))
    odd = [0.0, -0.0, 1e-3, -3.14159, 2.5e-8, -1.17e-38, 1e-41, 65504.0]
    for codec in FLOAT_CODECS:
        name = codec.__name__.removesuffix("_values")
        yield f"values_{name}_odd", one(Tensor((8,), all_of(8), codec(odd)))
    largest = float32(0x7F7FFFFF)
    yield "values_f32_extremes", one(Tensor((4,), all_of(4), f32_values([largest, -largest, 2**-149, -(2**-149)])))
    yield "values_f16_extremes", one(Tensor((4,), all_of(4), f16_values([65519.0, -65504.0, 2**-24, 2**-25])))
    yield (
        "values_bf16_extremes",
        one(Tensor((4,), all_of(4), bf16_values([from_bf16(0x7F7F), -from_bf16(0x7F7F), 2**-133, 1.00390625]))),
    )
    codes = [-128, -127, -1, 0, 1, 127, 64]
    for name, scale in ("zero", 0), ("smallest", 1), ("one", 0x3F80), ("largest", 0x7BFF):
        yield f"values_i8_scale_{name}", one(Tensor((7,), all_of(7), i8_stored([scale], codes)), canonical=False)
    pairs = {"zero": (0, 0), "step_zero": (0x4049, 0), "lo_zero": (0, 0x3DCD), "denormal": (1, 3)}
    pairs |= {"rounded": (0x3F81, 0x3AAB), "far": (0x4B80, 0x3F81), "largest": (0x7F7F, 0x7A00)}
    for name, pair in pairs.items():
        tensor = Tensor((16,), all_of(16), i4_stored([pair], range(16)))
        yield f"values_i4_{name}", one(tensor, canonical=False)
    for name, lo in ("zero", 0), ("denormal", 1), ("largest", 0x7F7F):
        yield f"values_sign_{name}", one(Tensor((5,), all_of(5), sign_stored([lo], (0, 1, 1, 0, 1))), False)


def valid_ulp() -> Valid:
    """Section 5.1, and 6.1."""

    def ulp(shifts: Sequence[int], dtype: str = "bfloat16", **options: int) -> Tensor:
        values = ulp_values(shifts, DTYPES[dtype][1], **options)
        return Tensor((len(shifts),), all_of(len(shifts)), values, dtype, dtype, "ULP")

    few = [1, -1, 2, -3, 1, 100, -1, -1, 32767, -32767]
    yield "ulp", one(ulp(few))
    yield "ulp_one", one(ulp([-1]))
    yield "ulp_all_one", one(ulp([1, -1] * 50))
    yield "ulp_no_unused_bits", one(ulp([2] * 16))
    for k in 0, 13:
        yield f"ulp_k{k}", one(ulp(few, k=k), canonical=False)
    for j in 0, 14, 62:
        yield f"ulp_j{j}", one(ulp(few, j=j), canonical=False)
    every = [dtype for dtype in sorted(DTYPES) if dtype not in ("unspecified", "complex64")]
    tensors = []
    for dtype in every:
        half = 1 << 8 * DTYPES[dtype][1] - 1
        # Over -0 and +0 where there are both, and inwards from one end.
        base = [0, half, half, 0, 1]
        wanted = [1, -1, 1, -1, 3]
        fits = [-half <= ordered(x, dtype) + d < half for x, d in zip(base, wanted, strict=True)]
        shifts = [d if fit else -d for d, fit in zip(wanted, fits, strict=True)]
        tensors.append(fingerprinted(ulp(shifts, dtype), base))
    yield "ulp_every_dtype", File(tuple(tensors))
    ends = ulp([32767, 32767, -32767, -32767])
    yield "ulp_ends", one(fingerprinted(ends, [0, 0x8000, 0x7FFF, 0]))
    yield "ulp_blocks", one(ulp([1 + (i * i % 11 == 3) * (i * 7 % 5 + 1) for i in range(8192)] + [-2], "int8"))
    sparse = Tensor((64, 64), rice([5, 900, 4000], 4096), ulp_values([1, -2, 9]), op="ULP")
    yield "ulp_sparse", one(fingerprinted(sparse, [0x3F80, 0, 0x8000]), canonical=False)
    yield "ulp_nothing", one(Tensor((4, 8), op="ULP", result_fingerprint=0), canonical=False)
    deep = ulp([1 << 62, (1 << 63) - 1, 1 - (1 << 63)], "int64")
    yield "ulp_deep", one(deep)
    yield "ulp_zstd", one(replace(ulp(few), values=zstd_values(ulp(few).values)), canonical=False)


#: The base and the classes of 9.6: small elements change more often than not, large ones hardly ever.
SMALL_BASE = (
    *(0x3F80, 0x3D00, 0x4080, 0xBF80, 0xBD80, 0xC080, 0x3DC0, 0x3FC0),
    *(0x3D40, 0xC000, 0xBE00, 0x4100, 0x3F00, 0xBD00, 0x4040, 0x0000),
)
SMALL_MATRIX = BaseMatrix(2, (0,) * 4, (0,) * 4, (0x3E80, 0x4000), (((0x80, 0, 1),),))
SMALL = (1, 3, 4, 8, 11, 13, 15)


def base_elements(count: int, dtype: str = "bfloat16", seed: int = 1) -> tuple[int, ...]:
    """Any bits, NaN and infinity among them."""
    bits = 8 * DTYPES[dtype][1]
    numbers = []
    for _ in range(count):
        seed = (seed * 6364136223846793005 + 1442695040888963407) % (1 << 64)
        numbers.append((seed ^ seed >> 29) >> 8 & ((1 << bits) - 1))
    return tuple(numbers)


def beside_base(tensor: Tensor, base: Sequence[int]) -> Tensor:
    """With its base's tensor, and both fingerprints."""
    whole = replace(tensor, base_tensor=tuple(base))
    return fingerprinted(whole, [base[position] for position in tensor.index.positions])


def inward(shifts: Sequence[int], base: Sequence[int], dtype: str) -> list[int]:
    """The shifts, turned where an element would leave the range of its dtype."""
    half = 1 << 8 * DTYPES[dtype][1] - 1
    fits = [-half <= ordered(x, dtype) + d < half for x, d in zip(base, shifts, strict=True)]
    return [d if fit else -d for d, fit in zip(shifts, fits, strict=True)]


def valid_from_base() -> Valid:
    """Section 4.7."""

    def case(
        shape: tuple[int, ...],
        positions: Sequence[int],
        matrix: BaseMatrix,
        dtype: str = "bfloat16",
        base: Sequence[int] | None = None,
    ) -> Tensor:
        base = base_elements(prod(shape), dtype) if base is None else base
        at = [base[position] for position in positions]
        shifts = inward([(1, -1, 2, -1, 1, -3)[i % 6] for i in range(len(at))], at, dtype)
        index, values = from_base(positions, base, matrix, None, dtype), ulp_values(shifts, DTYPES[dtype][1])
        return beside_base(Tensor(shape, index, values, dtype, dtype, "ULP"), base)

    def plain(rows: int, columns: int, tile_rows: int, thresholds: Sequence[int], *table: int) -> BaseMatrix:
        return BaseMatrix(tile_rows, (0,) * rows, (0,) * columns, thresholds, ((table,),))

    yield "from_base", one(case((4, 4), SMALL, SMALL_MATRIX, base=SMALL_BASE), False)
    yield "from_base_one_class", one(case((16, 20), spread(20, 16), plain(16, 20, 5, (), 3)), False)
    yield "from_base_one_class_turned", one(case((6, 7), spread(20, 2), plain(6, 7, 4, (), 0x81)), False)
    # Every element is a nonzero: by all of them, by none of them.
    yield "from_base_all_elements", one(case((4, 4), range(16), plain(4, 4, 2, (0x4000,), 0, 1)), False)
    yield "from_base_nothing_listed", one(case((4, 4), range(16), plain(4, 4, 3, (0x4000,), 0x80, 0x9F)), False)
    yield "from_base_turned_and_not", one(case((9, 30), spread(80, 3), plain(9, 30, 2, (0x3000,), 0x82, 2)), False)
    yield "from_base_empty_tiles", one(case((6, 4), (11,), plain(6, 4, 1, (0x4000,), 1, 0)), False)
    yield "from_base_rank_0", one(case((), (0,), plain(1, 1, 1, (), 31)), False)
    yield "from_base_rank_1", one(case((12,), (1, 4, 10), plain(4, 3, 3, (0x2000,), 1, 2)), False)
    yield "from_base_rank_3", one(case((2, 3, 4), (5, 21), plain(6, 4, 4, (0x5000,), 2, 1)), False)
    yield "from_base_one_column", one(case((24, 1), spread(5, 4), plain(24, 1, 1, (0x4000,), 1, 0)), False)
    yield "from_base_one_row", one(case((1, 40), spread(9, 4), plain(1, 40, 1, (0x4000,), 1, 2)), False)
    # A threshold is the first key of its class; there are classes without elements, and bytes without classes.
    edges = (0x3E80, 0x3E80, 0xBE80, 0x3E7F, 0xBE7F, 0x3E81, 0x0000, 0x8000, 0x7FFF, 0xFFFF)
    edge = plain(2, 5, 1, (0x0000, 0x3E80, 0x3E80, 0x7FFF, 0xFFFF), 5, 0, 3, 0x81, 0x80, 7)
    yield "from_base_thresholds", one(case((2, 5), (0, 2, 5, 6, 7, 8), edge, base=edges), False)
    sixteen = plain(11, 30, 4, [0x800 * i for i in range(1, 16)], *range(12), 0x80, 0x81, 0x82, 0x83)
    yield "from_base_16_classes", one(case((11, 30), spread(80, 4), sixteen), False)
    rows, columns = [i * 7 % 16 for i in range(23)], [i * 5 % 16 for i in range(50)]
    table = [[[(3 * a + b + e) % 5 for e in range(2)] for b in range(16)] for a in range(16)]
    many = BaseMatrix(5, rows, columns, (0x4000,), table)
    yield "from_base_classes_of_4_bits", one(case((23, 50), spread(90, 12), many), False)
    by_rows = BaseMatrix(3, [i % 3 % 2 for i in range(8)], (0,) * 9, (0x4000,), (((2, 0x80),), ((0, 3),)))
    by_columns = BaseMatrix(3, (0,) * 8, [i % 3 % 2 for i in range(9)], (0x4000,), (((2, 0x80), (0, 3)),))
    yield "from_base_classes_of_rows", one(case((8, 9), spread(30, 2), by_rows), False)
    yield "from_base_classes_of_columns", one(case((8, 9), spread(30, 2), by_columns), False)
    every = []
    for dtype in FROM_BASE_DTYPES:
        threshold = 40 if "float8" in dtype else 0x4000
        shifted = case((5, 8), spread(12, 3), plain(5, 8, 2, (threshold,), 0, 1), dtype)
        values = bits_values(elements(dtype, 12), dtype)
        every += [replace(shifted, name=f"ulp.{dtype}"), replace(shifted, name=f"set.{dtype}", op="SET", values=values)]
    every = [fingerprinted(t, t.base or ()) for t in sorted(every, key=lambda t: t.raw_name)]
    yield "from_base_every_dtype", File(tuple(every), canonical=False)
    added = []
    for dtype in ("bfloat16", "float16", "float32"):
        base = base_elements(64, dtype)
        index = from_base(spread(12, 5), base, plain(8, 8, 3, (0x4000,), 2, 1), None, dtype)
        added.append(beside_base(change((8, 8), index, i4_values, dtype, dtype), base))
    yield "from_base_add", File(tuple(added), canonical=False)
    tensor = case((4, 4), SMALL, SMALL_MATRIX, base=SMALL_BASE)
    yield "from_base_without_fingerprints", one(replace(tensor, base_fingerprint=None, result_fingerprint=None), False)
    yield "from_base_zstd", one(replace(tensor, index=zstd_index(tensor.index)), False)
    other = replace(change((3, 3), raw((2, 5), 9), name="a"), base_tensor=base_elements(9))
    last = replace(NOTHING, name="c", base_tensor=base_elements(16))
    yield "from_base_beside_others", File((other, replace(tensor, name="b"), last), canonical=False)


def valid_ulp_from_base() -> Valid:
    """Section 5.2."""

    def case(
        shifts: Sequence[int],
        thresholds: Sequence[int],
        *pairs: tuple[int, int],
        dtype: str = "bfloat16",
        base: Sequence[int] | None = None,
        index: Index | None = None,
        shape: tuple[int, ...] | None = None,
    ) -> File:
        shape = shape or (len(shifts),)
        index = index or all_of(len(shifts))
        base = base or base_elements(prod(shape), dtype)
        at = [base[position] for position in index.positions]
        values = ulp_from_base(inward(shifts, at, dtype), at, thresholds, pairs, None, dtype)
        return one(beside_base(Tensor(shape, index, values, dtype=dtype, op="ULP"), base), False)

    few = [1, -1, 2, -3, 1, 100, -1, -1, 900, -32000, 1, 5, -2, 1, 4, -1]
    yield "ulp_from_base", case(few, (0x4000,), (1, 0), (0, 6), base=SMALL_BASE)
    yield "ulp_from_base_one", case([-1], (), (0, 0))
    yield "ulp_from_base_all_one", case([1, -1] * 50, (0x4000,), (0, 0), (3, 2))
    yield "ulp_from_base_one_class", case(few, (), (1, 2))
    yield "ulp_from_base_largest_k_and_j", case(few, (0x2000,), (13, 62), (13, 0))
    yield "ulp_from_base_no_unused_bits", case([2] * 32, (), (0, 0), base=(0x3F80,) * 32)
    many = [1 + (i * i % 7 == 2) * (i % 19) for i in range(200)]
    pairs = [(i % 5, i % 4) for i in range(16)]
    yield "ulp_from_base_16_classes", case(many, [0x800 * i for i in range(1, 16)], *pairs)
    edges = (0x3E80, 0x3E80, 0xBE80, 0x3E7F, 0xBE7F, 0x3E81, 0x0000, 0x8000, 0x7F00, 0xFF00)
    same = (0x0000, 0x3E80, 0x3E80, 0xFFFF)
    yield "ulp_from_base_thresholds", case([2, 3, -4, 5, 1, 6, 7, -8, 9, 10], same, *[(0, 1)] * 5, base=edges)
    every = []
    for dtype in FROM_BASE_DTYPES:
        half = 1 << 8 * DTYPES[dtype][1] - 1
        shifts = [2, -1, half - 1, 1, 1 - half, -2, half // 2, 3, -1, 1, 2]
        # From zero, or from one end to near the other.
        base = (0, half, half - 1 if dtype == "float64" else 2 * half - 1, 5, half - 1, *base_elements(6, dtype))
        (tensor,) = case(shifts, (40,), (0, 3), (1, 1), dtype=dtype, base=base).tensors
        every.append(replace(tensor, name=dtype))
    yield "ulp_from_base_every_dtype", File(tuple(every), canonical=False)
    blocks = [1 + (i * i % 101 == 5) * (i * 7 % 5 + 1) for i in range(8195)]
    index = Index("ALL", tuple(range(len(blocks))), b"")
    yield "ulp_from_base_blocks", case(blocks, (50,), (4, 0), (5, 1), dtype="float8_e5m2", index=index)
    for name, index in ("raw", raw(spread(16, 9), 160)), ("rice", rice(spread(16, 9), 160)):
        yield f"ulp_from_base_in_{name}", case(few, (0x4000,), (1, 0), (0, 6), index=index, shape=(10, 16))
    index = from_base(SMALL, SMALL_BASE, SMALL_MATRIX)
    both = case(few[:7], (0x3E80, 0x4000), (0, 0), (1, 1), (2, 6), index=index, shape=(4, 4), base=SMALL_BASE)
    yield "ulp_from_base_in_from_base", both
    (tensor,) = both.tensors
    frames = replace(tensor, index=zstd_index(tensor.index), values=zstd_values(tensor.values))
    yield "ulp_from_base_zstd", one(frames, False)


def elements(dtype: str, count: int) -> list[int]:
    """Bits that a careless reader changes: all ones, all zeros, NaN with a payload, and others."""
    size = DTYPES[dtype][1]
    top = (1 << 8 * size) - 1
    return [(top, 0, top - 1, top >> 1, top // 3 * 2, 1)[i % 6] for i in range(count)]


def valid_operations() -> Valid:
    """Section 6.1 and what goes together (3.1), fingerprints."""
    dtypes = [dtype for dtype in DTYPES if dtype != "unspecified"]
    sets = [
        Tensor((4, 8), raw([5, 30], 32), bits_values(elements(dtype, 2), dtype), dtype, dtype, "SET")
        for dtype in dtypes
    ]
    yield "set_every_dtype", File(tuple(sorted(sets, key=lambda t: t.raw_name)), canonical=False)
    news = [Tensor((3,), all_of(3), bits_values(elements(dtype, 3), dtype), dtype, dtype, "NEW") for dtype in dtypes]
    yield (
        "new_every_dtype",
        File(
            tuple(
                replace(t, result_fingerprint=fingerprint(zip(range(3), t.values.bits, strict=True)))
                for t in sorted(news, key=lambda t: t.raw_name)
            )
        ),
    )
    yield "new_empty", one(Tensor((2, 0), dtype="int64", op="NEW", result_fingerprint=0))
    yield "new_scalar", one(Tensor((), all_of(1), bits_values([7], "int64"), "steps", "int64", "NEW"), False)
    yield "drop", one(Tensor((4, 8), op="DROP", dtype="uint8"))
    yield "drop_unspecified", one(Tensor((4, 8), op="DROP", dtype="unspecified"))
    yield "drop_fingerprint", one(Tensor((4, 8), op="DROP", base_fingerprint=0x0123456789ABCDEF), canonical=False)
    yield (
        "replace_every_dtype",
        File(
            tuple(
                replace(t, op="REPLACE", result_fingerprint=fingerprint(zip(range(3), t.values.bits, strict=True)))
                for t in sorted(news, key=lambda t: t.raw_name)
            )
        ),
    )
    # The base's tensor may have any shape, so its fingerprint is not that of the positions that are listed.
    yield "replace_fingerprint", one(replace(REPLACE_SAMPLE, base_fingerprint=0x0123456789ABCDEF), False)
    yield "replace_empty", one(Tensor((2, 0), dtype="int64", op="REPLACE", result_fingerprint=0))
    yield "set_nothing", one(Tensor((4, 8), op="SET", dtype="bool", result_fingerprint=0))
    yield "add_unspecified", one(change((4, 8), raw([5], 32), dtype="unspecified"))
    edge = {
        "float32": (0x00000001, 0x7F7FFFFF, 0xFF800000, 0x7FC12345, 0x80000000, 0x3F800000),
        "float16": (0x0001, 0x7BFF, 0xFC00, 0x7E55, 0x8000, 0x3C00),
        "bfloat16": (0x0001, 0x7F7F, 0xFF80, 0x7FD5, 0x8000, 0x3F80),
    }
    numbers = [2**-130, 1e38, -1.0, 5.0, 0.0, 2**-11]
    tensors = [
        fingerprinted(Tensor((6,), all_of(6), f32_values(numbers), dtype, dtype), edge[dtype]) for dtype in sorted(edge)
    ]
    yield "add_fingerprints", File(tuple(tensors))
    both = fingerprinted(change((4, 8), raw([5], 32)), [0x3F80])
    yield "base_fingerprint_alone", one(replace(both, result_fingerprint=None), canonical=False)
    yield "result_fingerprint_alone", one(replace(both, base_fingerprint=None), canonical=False)
    yield "fingerprint_of_zero", one(replace(both, base_fingerprint=0, result_fingerprint=0), canonical=False)
    values = bits_values(elements("float16", 3), "float16")
    tensor = Tensor((8,), raw([1, 2, 7], 8), values, dtype="float16", op="SET")
    yield "set_fingerprints", one(fingerprinted(tensor, [0x3C00, 0, 0xFFFF]), canonical=False)


def valid_container() -> Valid:
    """Sections 2, 3 and zstd."""
    tensor = change((64, 64), rice(spread(40, 90), 4096))
    yield "no_tensors", File()
    pairs = {
        "base": "a/b",
        "license": "",
        "sparsity": "0.01",
        "\u00e9": "\U0001f600\nsecond line\0",
        "z" * 200: "x" * 300,
    }
    yield "metadata", File((tensor,), pairs)
    yield "metadata_alone", File(metadata={"k": "v"})
    yield "metadata_byte_order", File(metadata={"\uffff": "first", "\U00010000": "last"})
    yield "extension", File((tensor,), extension=b"whatever comes", canonical=False)
    yield "extension_of_64_bytes", File((tensor,), extension=bytes(range(64)), canonical=False)
    yield "compatible_bits", File((tensor,), compatible=1 << 63 | 1, canonical=False)
    yield "minor_65535", File((tensor,), minor=0xFFFF, canonical=False)
    yield "zstd_bit_without_use", File((tensor,), header={"incompatible": 1}, canonical=False)
    names = (
        "a",
        "a.b",
        "a/b",
        "ab",
        "b" * 1024,
        "unet/conv_in.weight",
        "~",
        "\u0080",
        "\u00e9",
        "\uffff",
        "\U00010000",
    )
    tensors = tuple(change((4, 8), raw([i], 32), name=name) for i, name in enumerate(names))
    yield "names", File(tensors)
    yield "name_of_64_bytes", one(replace(tensor, name="n" * 64))
    yield (
        "twenty_tensors",
        File(tuple(change((30, i + 1), all_of(30 * i + 30), i4_values, f"layers.{i:02}.weight") for i in range(20))),
    )
    same = spread(40, 3)
    lines = struct_of((20, 30), (ROW, 4, 5, 2))
    for codec in rice, raw, bitmap:
        yield f"same_{codec.__name__}", one(change((20, 30), codec(lines.positions, 600), f32_values), canonical=False)
        yield f"same_dense_{codec.__name__}", one(change((128,), codec(same, 128), f32_values), codec is bitmap)
    yield "same_struct", one(change((20, 30), lines, f32_values))
    yield "same_bf16", one(change((20, 30), lines, bf16_values))

    rle = change((128, 128), rice([16000], 16384, 2), f32_values)
    index = zstd_index(rle.index)
    zeros = f32_values([0.0] * 206)
    yield "zstd_index", one(replace(rle, index=index), canonical=False)
    yield "zstd_values", one(replace(tensor, values=zstd_values(tensor.values)), canonical=False)
    yield (
        "zstd_both",
        one(replace(tensor, index=zstd_index(tensor.index), values=zstd_values(tensor.values)), canonical=False),
    )
    # 13 bytes for 832: exactly the largest ratio.
    yield "zstd_ratio_64", one(Tensor((206,), all_of(206), zstd_values(zeros)), canonical=False)
    repeated = f32_values([0.5, -1.25, 3.0, 0.5] * 40)
    frame = replace(repeated, frame=bytes.fromhex(ZSTD_COMPRESSED))
    yield "zstd_compressed", one(Tensor((160,), all_of(160), frame), canonical=False)
    yield "zstd_some", File((change((8,), all_of(8), name="a"), replace(rle, index=index, name="b")), canonical=False)


def valid_packed() -> Valid:
    """Section 2.3."""
    tensor = change((64, 64), rice(spread(40, 90), 4096))
    whole = len(tensor.index.section) - 8, len(tensor.values.section) - 8

    def of(tensors: tuple[Tensor, ...], leads: tuple[int, ...]) -> File:
        return File(tensors, canonical=False, leads=leads)

    yield "packed_no_tensors", of((), ())
    yield "packed_metadata", replace(of((), ()), metadata={"base": "a/b", "k": ""}, extension=b"whatever comes")
    yield "packed", replace(of((tensor,), (16, 0)), metadata={"base": "a/b"})
    yield "packed_without_leads", of((tensor,), (0, 0))
    yield "packed_wholly", of((tensor,), whole)
    frames = replace(tensor, index=zstd_index(tensor.index), values=zstd_values(tensor.values))
    yield "packed_zstd", of((frames,), (0, len(frames.values.frame or b"")))
    yield "packed_zstd_index", of((replace(tensor, index=zstd_index(tensor.index)),), (3, 5))
    empty = (Tensor((0,), name="a"), Tensor((4, 4), name="b", op="DROP"), Tensor((4, 4), name="c"))
    yield "packed_of_nothing", of(empty, (0,) * 6)
    several = tuple(change((3, i + 1), all_of(3 * i + 3), i4_values, f"layers.{i}.weight") for i in range(5))
    yield "packed_five_tensors", of(several, (0, 8) * 5)
    yield "packed_compatible_bits", replace(of((tensor,), (16, 0)), compatible=1 << 63 | 1)


# --- invalid files ---

Invalid = Iterator[tuple[str, str, bytes]]

SAMPLE = change((4, 4), EXAMPLE.index)
SET_SAMPLE = Tensor((4, 4), EXAMPLE.index, bits_values((1, 2, 3), "int32"), dtype="int32", op="SET")
NEW_SAMPLE = Tensor((3,), all_of(3), bits_values((1, 2, 3), "int32"), dtype="int32", op="NEW")
REPLACE_SAMPLE = replace(NEW_SAMPLE, op="REPLACE")
NOTHING = Tensor((4, 4))


def bytes_of(*tensors: Tensor, **header: int | bytes) -> bytes:
    """A file with these fields in its header."""
    return build(File(tensors, header=header)).data


def recorded(tensor: Tensor = SAMPLE, /, **record: int) -> bytes:
    """A file of one tensor with these fields in its record."""
    return bytes_of(replace(tensor, record=record))


def indexed(index: Index, *, at: int = 0, new: bytes = b"", shape: tuple[int, ...] = (4, 4)) -> bytes:
    """A file of one tensor with these positions, the section changed at `at`."""
    changed = replace(index, section=patched(index.section, at, new))
    return bytes_of(change(shape, changed))


def valued(values: Values, at: int = 0, new: bytes = b"") -> bytes:
    """A file of one tensor with these values, the section changed at `at`."""
    count = len(values.bits)
    op, dtype = {"BITS": ("SET", "int8"), "ULP": ("ULP", "int8")}.get(values.codec, ("ADD", "bfloat16"))
    changed = replace(values, section=patched(values.section, at, new))
    return bytes_of(Tensor((count,), all_of(count), changed, op=op, dtype=dtype))


def damaged(file: File, place: str, at: int = 0, behind: bool = False) -> bytes:
    """The file with one bit changed in a section, or in the padding `behind` it; no checksum is made right."""
    built = build(file)
    start, end = built.places[place]
    where = end + at if behind else start + at
    return patched(built.data, where, bytes((built.data[where] ^ 1,)))


def invalid_header() -> Invalid:
    """Section 2.1."""
    good = bytes_of(SAMPLE)
    yield "empty", "bad_magic", b""
    yield "magic_cut", "bad_magic", good[:7]
    yield "magic_of_another_kind", "bad_magic", patched(good, 0, b"\x89PNG")
    yield "magic_after_line_end_conversion", "bad_magic", good[:4] + b"\n" + good[6:]
    yield "magic_alone", "truncated", good[:8]
    yield "header_cut", "truncated", good[:127]
    yield "major_0", "unsupported_version", bytes_of(SAMPLE, major=0)
    yield "major_2", "unsupported_version", bytes_of(SAMPLE, major=2)
    yield "major_2_before_checksum", "unsupported_version", patched(good, 8, b"\2")
    yield "header_crc", "header_checksum", patched(good, 124, bytes((good[124] ^ 1,)))
    yield "header_crc_minor", "header_checksum", patched(good, 10, b"\1")
    yield "header_crc_before_feature", "header_checksum", patched(good, 16, b"\2")
    yield "feature_bit_1", "unknown_feature", bytes_of(SAMPLE, incompatible=2)
    yield "feature_bit_63", "unknown_feature", bytes_of(SAMPLE, incompatible=1 << 63 | 1)
    yield "feature_before_reserved", "unknown_feature", bytes_of(SAMPLE, incompatible=2, zero=b"\1")
    yield "header_reserved_first", "reserved_not_zero", bytes_of(SAMPLE, zero=b"\1")
    yield "header_reserved_last", "reserved_not_zero", bytes_of(SAMPLE, zero=bytes(11) + b"\x80")
    yield "file_cut_by_1", "truncated", good[:-1]
    yield "file_cut_to_header", "truncated", good[:128]
    yield "file_size_max", "truncated", bytes_of(SAMPLE, file_size=U64)
    yield "file_longer_by_1", "trailing_data", good + b"\0"
    yield "file_longer_by_64", "trailing_data", good + bytes(64)
    yield "file_size_0", "trailing_data", bytes_of(SAMPLE, file_size=0)
    yield "file_size_before_limits", "truncated", bytes_of(SAMPLE, file_size=U64, tensor_count=(1 << 20) + 1)
    for name, limit in (
        ("tensor_count", 1 << 20),
        ("names_size", 64 << 20),
        ("metadata_size", 16 << 20),
        ("extension_size", 64 << 20),
    ):
        yield f"{name}_over_limit", "limit_exceeded", bytes_of(SAMPLE, **{name: limit + 1})
        yield f"{name}_at_limit", "section_layout", bytes_of(SAMPLE, **{name: limit})
        if name != "tensor_count":
            yield f"{name}_max", "limit_exceeded", bytes_of(SAMPLE, **{name: U64})


def invalid_file_sections() -> Invalid:
    """Section 2.2."""
    yield "file_size_without_sections", "section_layout", bytes_of(SAMPLE, file_size=128)[:128]
    yield "one_tensor_too_many", "section_layout", bytes_of(Tensor((0,)), tensor_count=3)
    file = File((SAMPLE,), {"key": "value"}, b"extension")
    for place in "TABLE", "NAMES", "METADATA", "EXTENSION":
        crc = f"{place.lower()}_crc"
        yield crc, "section_checksum", damaged(file, place)
        yield f"{place.lower()}_padding", "padding_not_zero", damaged(file, place, behind=True)
        yield (
            f"{place.lower()}_padding_last",
            "padding_not_zero",
            damaged(file, place, {"TABLE": 31, "NAMES": 62, "METADATA": 47, "EXTENSION": 54}[place], behind=True),
        )
        empty = build(replace(File(), header={crc: 1})).data
        yield f"{crc}_of_nothing", "section_checksum", empty
    yield (
        "table_padding_before_names_crc",
        "padding_not_zero",
        patched(damaged(file, "TABLE", behind=True), build(file).places["NAMES"][0], b"W"),
    )
    yield (
        "names_crc_before_metadata_order",
        "section_checksum",
        damaged(replace(file, metadata=metadata_pair(b"", b"")), "NAMES"),
    )
    pair = metadata_pair
    for name, section in (
        ("head_cut", pair(b"a", b"1") + b"\1\0\0\0\1\0\0"),
        ("key_cut", struct.pack("<II", 2, 0) + b"a"),
        ("value_cut", struct.pack("<II", 1, 2) + b"a1"),
        ("key_size_max", struct.pack("<II", 0xFFFFFFFF, 1) + b"a1"),
        ("sizes_wrap", struct.pack("<II", 0xFFFFFFFF, 3) + b"a1"),
        ("key_empty", pair(b"", b"1")),
        ("key_empty_last", pair(b"a", b"1") + pair(b"", b"1")),
        ("keys_equal", pair(b"a", b"1") + pair(b"a", b"1")),
        ("keys_swapped", pair(b"b", b"1") + pair(b"a", b"1")),
        ("key_prefix_last", pair(b"ab", b"1") + pair(b"a", b"1")),
        ("key_not_utf8", pair(b"\xff", b"1")),
        ("value_not_utf8", pair(b"a", b"\xc3")),
        ("value_overlong", pair(b"a", b"\xc0\x80")),
        ("value_surrogate", pair(b"a", b"\xed\xa0\x80")),
        ("value_above_unicode", pair(b"a", b"\xf4\x90\x80\x80")),
        ("zeros_behind", pair(b"a", b"1") + bytes(8)),
    ):
        yield f"metadata_{name}", "bad_metadata", build(File((SAMPLE,), section)).data
    yield "metadata_before_table", "bad_metadata", build(File((replace(SAMPLE, record={"dtype": 99}),), b"x")).data


def invalid_packed() -> Invalid:
    """Section 2.3, in the order of its checks; and that what a packed file stands for is checked as any file is."""
    a, b = (replace(SAMPLE, name=name) for name in "ab")
    plain, leads = bytes_of(a, b), (16, 0, 16, 0)
    index, values = len(SAMPLE.index.section), len(SAMPLE.values.section)

    def of(record: Fields, number: int = 0, **header: int | bytes) -> bytes:
        return packed(plain, leads, Control({number: record}), **header)

    good = of({})
    stored, decoded = struct.unpack_from("<II", good, 112)

    def zero(stored: int = stored, decoded: int = decoded, last: int = 0) -> bytes:
        return struct.pack("<III", stored, decoded, last)

    yield "packed_reserved_last", "reserved_not_zero", of({}, zero=zero(last=1 << 31))
    yield "packed_metadata_crc", "reserved_not_zero", of({}, metadata_crc=1)
    yield "packed_extension_crc", "reserved_not_zero", of({}, extension_crc=1)
    yield "packed_cut", "truncated", good[:-1]
    yield "packed_cut_to_header", "truncated", good[:128]
    yield "packed_longer", "trailing_data", good + b"\0"
    yield "packed_too_many_tensors", "limit_exceeded", of({}, tensor_count=(1 << 20) + 1)
    yield "packed_control_beyond_file", "section_layout", of({}, zero=zero(stored=len(good) - 127))
    yield "packed_control_size_max", "section_layout", of({}, zero=zero((1 << 32) - 1, (1 << 32) - 1))
    yield "packed_control_crc", "section_checksum", patched(good, 140, bytes((good[140] ^ 1,)))
    yield "packed_rest_crc", "section_checksum", patched(good, len(good) - 1, bytes((good[-1] ^ 1,)))
    yield "packed_control_crc_before_ratio", "section_checksum", of({}, table_crc=0, zero=zero(decoded=(1 << 32) - 1))
    yield "packed_ratio", "zstd_ratio", of({}, zero=zero(decoded=64 * stored + 1))
    yield "packed_without_control", "zstd_ratio", packed(plain, leads, Control(frame=b""))
    yield "packed_empty_control", "bad_zstd", packed(bytes_of(), (), Control(frame=b""), zero=bytes(12))
    yield "packed_table_beyond_control", "bad_size", of({}, tensor_count=3)
    yield "packed_names_beyond_control", "bad_size", of({}, names_size=64 << 20)
    yield "packed_other_content_size", "bad_zstd", of({}, zero=zero(decoded=decoded + 1))
    yield "packed_no_frame", "bad_zstd", packed(plain, leads, Control(frame=b"no frame" * 60))
    yield "packed_frame_and_more", "bad_zstd", packed(plain, leads, Control(frame=good[128 : 128 + stored] + b"\0"))
    yield "packed_name_offset", "reserved_not_zero", of({"name_offset": 1}, 1)
    for which in "index", "values":
        yield f"packed_{which}_crc_in_record", "reserved_not_zero", of({f"{which}_crc": 1})
        yield f"packed_{which}_decoded", "reserved_not_zero", of({f"{which}_decoded": index})
        yield f"packed_{which}_lead_over_size", "bad_size", of({f"{which}_offset": U64})
        yield f"packed_{which}_size_max", "section_layout", of({f"{which}_stored": U64})
        yield f"packed_{which}_size_0", "bad_size", of({f"{which}_stored": 0, f"{which}_offset": 1})
    yield "packed_lead_into_tail", "bad_size", of({"index_offset": index - 7})
    yield "packed_size_below_tail", "bad_size", of({"index_stored": 7, "index_offset": 0})
    yield "packed_leads_end_early", "bad_size", of({"values_offset": 1, "values_stored": values + 1}, 1)
    yield "packed_leads_are_more", "bad_size", packed(plain, leads, Control(leads=bytes(33)))
    yield "packed_rest_ends_early", "section_layout", of({"values_stored": values + 1}, 1)
    yield "packed_rest_is_more", "section_layout", of({"values_stored": values - 1}, 1)
    yield "packed_sizes_overflow", "section_layout", of({"index_stored": 1 << 63, "values_stored": 1 << 63})
    yield (
        "packed_first_record_decides",
        "bad_size",
        packed(plain, leads, Control({0: {"index_offset": U64}, 1: {"name_offset": 1}})),
    )
    yield (
        "packed_zstd_flag_without_bit",
        "bad_combination",
        packed(plain, (16, 0, 16, 0), Control({0: {"flags": 4, "index_stored": index - 8, "index_decoded": index}})),
    )
    # What it stands for.
    yield "packed_names_out_of_order", "name_order", packed(bytes_of(b, a), leads)
    yield "packed_names_too_short", "name_layout", packed(bytes_of(a), leads[:2], Control({0: {"name_size": 2}}))
    yield (
        "packed_size_of_index",
        "bad_size",
        packed(bytes_of(a), (16, 0), Control({0: {"index_stored": index + 4}}, rest=bytes(index - 20 + values - 8))),
    )
    yield "packed_bad_metadata", "bad_metadata", packed(build(File((a,), b"\0" * 7)).data, leads[:2])
    yield "packed_digest", "digest_mismatch", packed(bytes_of(a, digest=bytes(32)), leads[:2])
    bad = replace(a, index=replace(a.index, section=patched(a.index.section, 0, b"\x20")))
    yield "packed_bad_index", "bad_index", packed(bytes_of(bad), leads[:2])


def invalid_names() -> Invalid:
    """Section 3, checks 1 to 3, and the names' end."""
    a, b = (replace(NOTHING, name=name) for name in "ab")
    yield "name_offset_first", "name_layout", recorded(NOTHING, name_offset=1)
    yield "name_offset_gap", "name_layout", build(File((a, replace(b, record={"name_offset": 2})), names=b"a-b")).data
    yield "name_offset_overlap", "name_layout", bytes_of(a, replace(b, record={"name_offset": 0}))
    yield "name_offset_max", "name_layout", bytes_of(a, replace(b, record={"name_offset": (1 << 32) - 1}))
    yield "name_size_over_section", "name_layout", recorded(NOTHING, name_size=2)
    yield "name_layout_before_bad_name", "name_layout", build(File((NOTHING,), names=b"", header={})).data
    yield "names_left_over", "name_layout", build(File((NOTHING,), names=b"wx")).data
    yield "names_without_tensors", "name_layout", build(File(names=b"w")).data
    yield "names_left_over_before_layout", "name_layout", build(File((NOTHING,), names=b"wx", tail=bytes(64))).data
    for name, raw_name in (
        ("empty", b""),
        ("of_1025_bytes", b"n" * 1025),
        ("not_utf8", b"a\xff"),
        ("utf8_cut", b"a\xe2\x82"),
        ("overlong", b"a\xc1\xa1"),
        ("overlong_of_three_bytes", b"a\xe0\x80\xaf"),
        ("surrogate", b"\xed\xa0\x80"),
        ("above_unicode", b"\xf4\x90\x80\x80"),
        ("with_nul", b"a\0"),
        ("with_newline", b"a\nb"),
        ("with_0x1f", b"\x1f"),
        ("with_0x7f", b"a\x7f"),
    ):
        yield f"name_{name}", "bad_name", bytes_of(replace(NOTHING, name=raw_name))
    yield "name_twice", "duplicate_name", bytes_of(a, a)
    yield "names_swapped", "name_order", bytes_of(b, a)
    yield "names_not_in_byte_order", "name_order", bytes_of(replace(a, name="\U00010000"), replace(a, name="\uffff"))
    yield "name_prefix_last", "name_order", bytes_of(replace(a, name="aa"), a)
    yield "name_before_record", "bad_name", bytes_of(replace(NOTHING, name=b"\n", record={"zero": 1}))


def invalid_ids_and_shapes() -> Invalid:
    """Section 3, checks 4 to 7."""
    yield "record_reserved", "reserved_not_zero", recorded(zero=1)
    yield "record_reserved_high", "reserved_not_zero", recorded(zero=1 << 31)
    for bit in 4, 7:
        yield f"flag_{bit}", "reserved_not_zero", recorded(flags=1 << bit)
    yield "record_reserved_before_dtype", "reserved_not_zero", recorded(flags=0x10, dtype=99)
    # Published vectors do not change, so REGISTRY.md never assigns the ids that they hold as unknown ones.  A new
    # vector takes 255.  The reserved ids are here once each, for the version that defines one to take out.
    for what, ids in (
        ("dtype", (20, 255)),
        ("op", (5, 255)),
        ("index_codec", (6, 8, 9, 12, 255)),
        ("value_codec", (9, 255)),
    ):
        for id in ids:
            yield f"{what}_{id}", f"unknown_{what}", recorded(**{what: id})
    yield "dtype_before_op", "unknown_dtype", recorded(dtype=20, op=5, index_codec=12, value_codec=9)
    yield "op_before_index_codec", "unknown_op", recorded(op=5, index_codec=12, value_codec=9)
    yield "index_codec_before_value_codec", "unknown_index_codec", recorded(index_codec=12, value_codec=9)
    yield "value_codec_before_shape", "unknown_value_codec", recorded(value_codec=9, rank=9)
    yield "rank_9", "bad_shape", recorded(rank=9)
    yield "rank_255", "bad_shape", recorded(rank=255)
    yield "dim_behind_rank", "bad_shape", recorded(dim2=1)
    yield "last_dim_behind_rank", "bad_shape", recorded(dim7=1)
    yield "dim_over_limit", "bad_shape", recorded(dim0=MAX_NUMEL + 1, dim1=1)
    yield "dim_over_limit_beside_zero", "bad_shape", recorded(NOTHING, dim0=0, dim1=MAX_NUMEL + 1)
    yield "numel_over_limit", "bad_shape", recorded(dim0=1 << 28, dim1=(1 << 28) + 1)
    yield "numel_wraps_to_zero", "bad_shape", recorded(NOTHING, dim0=1 << 32, dim1=1 << 32)
    yield "numel_wraps_to_16", "bad_shape", bytes_of(change((1 << 32, 1 << 32, 16), EXAMPLE.index))
    yield "shape_before_count", "bad_shape", recorded(rank=9, nnz=17)
    yield "nnz_over_numel", "bad_count", recorded(nnz=17)
    yield "nnz_max", "bad_count", recorded(nnz=U64)
    yield "nnz_of_empty_tensor", "bad_count", recorded(dim0=0)
    yield "count_before_combination", "bad_count", recorded(nnz=17, value_codec=0)


def invalid_combinations() -> Invalid:
    """Section 3, checks 8 and 9; 3.1."""
    ids, reason = DTYPES, "bad_combination"
    yield "nnz_0_with_index_codec", reason, recorded(NOTHING, index_codec=INDEX_CODECS["RAW"])
    yield "nnz_0_with_all", reason, recorded(NOTHING, index_codec=INDEX_CODECS["ALL"])
    yield "nnz_0_with_value_codec", reason, recorded(NOTHING, value_codec=VALUE_CODECS["F32"])
    yield "nnz_without_index_codec", reason, bytes_of(replace(SAMPLE, index=replace(NO_INDEX, positions=(3, 4, 9))))
    yield "nnz_without_value_codec", reason, bytes_of(replace(SAMPLE, values=NO_VALUES))
    yield "all_of_too_few", reason, bytes_of(change((4,), all_of(3)))
    for dtype in DTYPES:
        if dtype not in ("float32", "float16", "bfloat16", "unspecified"):
            yield f"add_to_{dtype}", reason, recorded(dtype=ids[dtype][0])
    yield "add_nothing_to_int32", reason, recorded(NOTHING, dtype=ids["int32"][0])
    yield "add_bits", reason, bytes_of(replace(SET_SAMPLE, op="ADD", dtype="float32"))
    yield "set_unspecified", reason, recorded(SET_SAMPLE, dtype=0)
    yield "set_nothing_unspecified", reason, recorded(NOTHING, op=OPS["SET"], dtype=0)
    yield "new_unspecified", reason, recorded(NEW_SAMPLE, dtype=0)
    for codec, id in VALUE_CODECS.items():
        if codec not in ("NONE", "BITS"):
            yield f"set_{codec.lower()}", reason, recorded(SET_SAMPLE, value_codec=id)
            yield f"new_{codec.lower()}", reason, recorded(NEW_SAMPLE, value_codec=id)
    ulp = Tensor((4, 4), EXAMPLE.index, ulp_values((1, -2, 3), 8), dtype="int64", op="ULP")
    yield "ulp_unspecified", reason, recorded(ulp, dtype=0)
    yield "ulp_of_complex64", reason, recorded(ulp, dtype=ids["complex64"][0])
    yield "ulp_in_bits", reason, recorded(replace(SET_SAMPLE, op="ULP"))
    yield "add_in_ulp", reason, recorded(ulp, op=OPS["ADD"], dtype=ids["float32"][0])
    yield "new_of_a_part", reason, bytes_of(replace(NEW_SAMPLE, shape=(4, 4), index=EXAMPLE.index))
    yield "new_of_nothing", reason, bytes_of(Tensor((4,), op="NEW"))
    yield "new_in_raw", reason, bytes_of(replace(NEW_SAMPLE, index=raw((0, 1, 2), 3)))
    yield "replace_unspecified", reason, recorded(REPLACE_SAMPLE, dtype=0)
    yield "replace_f32", reason, recorded(REPLACE_SAMPLE, value_codec=VALUE_CODECS["F32"])
    yield "replace_of_a_part", reason, bytes_of(replace(REPLACE_SAMPLE, shape=(4, 4), index=EXAMPLE.index))
    yield "replace_of_nothing", reason, bytes_of(Tensor((4,), op="REPLACE"))
    yield "replace_in_raw", reason, bytes_of(replace(REPLACE_SAMPLE, index=raw((0, 1, 2), 3)))
    yield "drop_with_positions", reason, recorded(SET_SAMPLE, op=OPS["DROP"])
    unspecified = replace(SAMPLE, dtype="unspecified")
    for name, tensor in (
        ("base_fingerprint_of_unspecified", replace(unspecified, base_fingerprint=1)),
        ("result_fingerprint_of_unspecified", replace(unspecified, result_fingerprint=1)),
        ("drop_base_fingerprint_of_unspecified", Tensor((4,), dtype="unspecified", op="DROP", base_fingerprint=1)),
        ("base_fingerprint_of_new", replace(NEW_SAMPLE, base_fingerprint=1)),
        ("result_fingerprint_of_drop", Tensor((4,), op="DROP", result_fingerprint=1)),
        ("result_fingerprint_0_of_drop", Tensor((4,), op="DROP", result_fingerprint=0)),
    ):
        yield name, reason, bytes_of(tensor)
    yield "base_fingerprint_without_flag", "reserved_not_zero", recorded(base_fingerprint=1)
    yield "result_fingerprint_without_flag", "reserved_not_zero", recorded(result_fingerprint=1 << 63)
    yield "combination_before_fingerprint", reason, recorded(value_codec=0, base_fingerprint=1)
    yield "fingerprint_before_layout", "reserved_not_zero", recorded(base_fingerprint=1, index_offset=0)


def invalid_layout() -> Invalid:
    """Section 3, check 10, and the end of the last section; 3.2."""
    good = build(one(SAMPLE))
    index_at, values_at = good.places["INDEX 0"][0], good.places["VALUES 0"][0]
    for which, at in ("index", index_at), ("values", values_at):
        for name, offset in ("off_by_64", at + 64), ("unaligned", at + 4), ("max", U64 - 63), ("0", 0):
            yield f"{which}_offset_{name}", "section_layout", recorded(**{f"{which}_offset": offset})
        for name, size in ("beyond_file", len(good.data)), ("wraps", U64 - at + 1), ("max", U64):
            fields = {f"{which}_stored": size, f"{which}_decoded": size}
            yield f"{which}_size_{name}", "section_layout", recorded(**fields)
        yield f"{which}_decoded_not_stored", "section_layout", recorded(**{f"{which}_decoded": 44})
        yield f"{which}_padding", "padding_not_zero", damaged(one(SAMPLE), f"{which.upper()} 0", behind=True)
        yield f"{which}_crc", "section_checksum", damaged(one(SAMPLE), f"{which.upper()} 0")
        yield f"{which}_crc_of_nothing", "section_checksum", recorded(NOTHING, **{f"{which}_crc": 1})
        yield (
            f"{which}_zstd_without_feature",
            "bad_combination",
            bytes_of(
                replace(
                    SAMPLE,
                    index=zstd_index(SAMPLE.index) if which == "index" else SAMPLE.index,
                    values=zstd_values(SAMPLE.values) if which == "values" else SAMPLE.values,
                ),
                incompatible=0,
            ),
        )
    yield "values_offset_of_nothing", "section_layout", recorded(NOTHING, values_offset=0)
    yield "index_zstd_empty", "bad_combination", bytes_of(replace(SAMPLE, index=zstd_index(SAMPLE.index, b"")))
    yield "values_zstd_empty", "bad_combination", bytes_of(replace(SAMPLE, values=zstd_values(SAMPLE.values, b"")))
    for tensor in Tensor((0,)), change((3,), all_of(3)):
        for what, frame in ("empty", b""), ("of_nothing", zstd_frame(b"")):
            name = f"{tensor.index.codec.lower()}_zstd_{what}"
            yield name, "bad_combination", bytes_of(replace(tensor, index=zstd_index(tensor.index, frame)))
    yield (
        "zstd_before_crc_of_nothing",
        "bad_combination",
        bytes_of(replace(SAMPLE, index=zstd_index(SAMPLE.index, b""), record={"index_crc": 1})),
    )
    yield (
        "crc_of_nothing_before_size",
        "section_checksum",
        bytes_of(replace(SAMPLE, index=replace(SAMPLE.index, section=b""), record={"index_crc": 1})),
    )
    zeros = f32_values([0.0] * 207)
    packed = Tensor((207,), all_of(207), zstd_values(zeros))
    yield "zstd_ratio", "zstd_ratio", bytes_of(packed)
    yield "zstd_ratio_max", "zstd_ratio", bytes_of(replace(packed, record={"values_decoded": U64}))
    yield (
        "zstd_ratio_index",
        "zstd_ratio",
        bytes_of(replace(SAMPLE, index=zstd_index(replace(SAMPLE.index, section=bytes(1 << 20))))),
    )
    yield "sections_end_early", "section_layout", build(File((SAMPLE,), tail=bytes(64))).data
    yield "sections_end_early_without_tensors", "section_layout", build(File(tail=bytes(64))).data
    yield "layout_before_size", "section_layout", recorded(index_stored=44, values_offset=0, values_decoded=1)
    yield (
        "index_size_before_values_layout",
        "bad_size",
        bytes_of(replace(SAMPLE, index=replace(SAMPLE.index, section=bytes(20)), record={"values_offset": 0})),
    )
    yield (
        "index_padding_before_values_layout",
        "padding_not_zero",
        damaged(one(replace(SAMPLE, record={"values_offset": 0})), "INDEX 0", behind=True),
    )

    entries = struct_section(*[(ROW, 2 * i + i % 2, 1, 1) for i in range(257)])
    wide = 1 << 32
    for name, shape, index in (
        ("none", (4, 4), replace(NO_INDEX, section=bytes(8))),
        ("all", (16,), replace(all_of(16), section=bytes(8))),
        ("rice", (4, 4), replace(SAMPLE.index, section=bytes(20))),
        ("rice_empty", (4, 4), replace(SAMPLE.index, section=b"")),
        ("raw_short", (4, 4), replace(raw((1, 2), 16), section=bytes(12))),
        ("raw_long", (4, 4), replace(raw((1, 2), 16), section=bytes(20))),
        ("raw_narrow_words", (wide,), replace(raw((1, 2), 16))),
        ("raw_wide_words", (wide - 1,), raw((1, 2), wide)),
        ("bitmap_short", (64,), replace(bitmap((1, 2), 64), section=bytes(16))),
        ("bitmap_long", (64,), replace(bitmap((1, 2), 64), section=bytes(24))),
        ("bitmap_without_directory", (2049,), replace(bitmap((1, 2), 2049), section=bytes(4 + 260 + 8))),
        ("struct_without_entries", (4, 4), Index("STRUCT", (0, 1, 2, 3), SLACK)),
        ("struct_uneven", (4, 4), Index("STRUCT", (0, 1, 2, 3), bytes(44))),
        ("struct_short", (4, 4), Index("STRUCT", (0, 1, 2, 3), bytes(4))),
        ("struct_257_entries", (515, 1), Index("STRUCT", tuple(range(257)), entries)),
    ):
        values = change(shape, index).values if index.positions else NO_VALUES
        yield f"size_{name}", "bad_size", bytes_of(Tensor(shape, index, values))
    for codec in FLOAT_CODECS:
        for count in 1, 129:
            values = codec(halves(count))
            for name, section in ("short", values.section[:-4]), ("long", values.section + bytes(4)):
                tensor = Tensor((count,), all_of(count), replace(values, section=section))
                yield f"size_{values.codec.lower()}_{count}_{name}", "bad_size", bytes_of(tensor)
    bits = replace(SET_SAMPLE, values=replace(SET_SAMPLE.values, section=bytes(24)))
    yield "size_bits", "bad_size", bytes_of(bits)
    yield "size_bits_of_another_dtype", "bad_size", recorded(SET_SAMPLE, dtype=DTYPES["int64"][0])
    yield "size_no_values", "bad_size", bytes_of(replace(NOTHING, values=replace(NO_VALUES, section=bytes(8))))


def invalid_zstd() -> Invalid:
    """Section 4, zstd."""
    section = EXAMPLE.index.section
    frame = zstd_frame(section)
    skippable = bytes.fromhex("502a4d18") + struct.pack("<I", 4) + bytes(4)
    for name, stored in (
        ("garbage", b"not a frame"),
        ("cut", frame[:-1]),
        ("head_alone", frame[:9]),
        ("byte_behind", frame + b"\0"),
        ("frame_behind", frame + zstd_frame(b"")),
        ("skippable_frame_behind", frame + skippable),
        ("skippable_frame_first", skippable + frame),
        ("skippable_frame_alone", skippable),
        ("too_short", zstd_frame(section[:-4])),
        ("too_long", zstd_frame(section + bytes(4))),
        ("without_size", zstd_frame(section, states_size=False)),
        ("longer_than_it_states", patched(zstd_frame(section + bytes(4)), 5, bytes((len(section),)))),
        ("states_other_size", patched(frame, 5, b"\x29")),
        ("reserved_block_type", patched(frame, 9, bytes((frame[9] | 6,)))),
        ("of_another_dictionary", ZSTD_MAGIC + b"\xa1\7" + frame[5:]),
    ):
        yield f"zstd_{name}", "bad_zstd", bytes_of(replace(SAMPLE, index=zstd_index(SAMPLE.index, stored)))
    repeated = f32_values([0.5, -1.25, 3.0, 0.5] * 40)
    wrong = patched(bytes.fromhex(ZSTD_COMPRESSED), -1, b"\0")
    yield "zstd_values_checksum", "bad_zstd", bytes_of(Tensor((160,), all_of(160), replace(repeated, frame=wrong)))
    file = one(replace(SAMPLE, index=zstd_index(SAMPLE.index, b"not a frame")))
    yield "zstd_crc_before_frame", "section_checksum", damaged(file, "INDEX 0")
    yield (
        "zstd_frame_before_codec",
        "bad_zstd",
        bytes_of(
            replace(SAMPLE, index=zstd_index(replace(SAMPLE.index, section=patched(section, 0, b"\x20")), frame[:-1]))
        ),
    )
    yield "zstd_unavailable", "zstd_unavailable", bytes_of(replace(SAMPLE, index=zstd_index(SAMPLE.index)))


def invalid_rice() -> Invalid:
    """Section 4.2.  In EXAMPLE.index, low is at 24, unary at 28 and slack at 32."""
    index = EXAMPLE.index

    def outside(*positions: int, k: int = 1, numel: int = 16) -> Index:
        return rice(positions, numel, k)

    for k in 32, 64, 255:
        yield f"rice_k_{k}", "bad_index", indexed(index, at=0, new=bytes((k,)))
    for at in 1, 7:
        yield f"rice_head_byte_{at}", "bad_index", indexed(index, at=at, new=b"\1")
    for name, unary_bits in ("0", 0), ("33", 33), ("2049", 2049), ("max", U64), ("2_to_the_63", 1 << 63):
        yield f"rice_unary_bits_{name}", "bad_size", indexed(index, at=8, new=unsigned([unary_bits], 8))
    yield "rice_k_does_not_fit_size", "bad_size", indexed(index, at=0, new=b"\x0b")
    yield "rice_k_before_size", "bad_index", indexed(index, at=0, new=b"\x20\0\0\0\0\0\0\0\xff")
    nothing = Index("RICE", (3,), struct.pack("<B7xQ", 0, 0) + SLACK)
    yield "rice_without_unary_bits", "bad_index", indexed(nothing)
    yield "rice_too_few_ones", "bad_index", indexed(index, at=28, new=b"\x24")
    yield "rice_too_many_ones", "bad_index", indexed(index, at=28, new=b"\x27")
    yield "rice_zero_behind_last", "bad_index", indexed(index, at=8, new=b"\7")
    yield "rice_one_behind_last", "bad_index", indexed(index, at=28, new=b"\x46")
    yield "rice_ones_before_range", "bad_index", indexed(replace(outside(3, 4, 16), positions=(3, 4)))
    yield "rice_position_by_low_bits", "position_range", indexed(outside(3, 4, 16))
    yield "rice_position_by_quotients", "position_range", indexed(outside(3, 4, 40))
    yield "rice_position_at_numel", "position_range", indexed(outside(16, k=0))
    yield "rice_position_of_scalar", "position_range", indexed(outside(1, k=0, numel=1), shape=())
    far = rice((3, 4, 1 << 40), 16, 31)
    yield "rice_position_past_32_bits", "position_range", indexed(far)
    yield "rice_range_before_directory", "position_range", indexed(outside(3, 4, 16), at=16, new=b"\1")
    yield "rice_base", "bad_directory", indexed(index, at=16, new=b"\1")
    yield "rice_rank", "bad_directory", indexed(index, at=20, new=b"\1")
    yield "rice_base_and_rank_max", "bad_directory", indexed(index, at=16, new=b"\xff" * 8)
    yield "rice_directory_before_padding", "bad_directory", indexed(index, at=16, new=b"\1" + bytes(8) + b"\x40")
    blocks = rice((5, 5000, 9999), 10000, 0)
    for block in 1, 4:
        for at, name in (0, "base"), (4, "rank"):
            where = 16 + 8 * block + at
            new = bytes((blocks.section[where] ^ 1,))
            yield f"rice_{name}_of_block_{block}", "bad_directory", indexed(blocks, at=where, new=new, shape=(10000,))
    wide = rice((5, 1 << 33), 1 << 34, 22)
    for at, name in (7, "base"), (15, "rank"):
        changed = indexed(wide, at=16 + 16 + at, new=b"\x80", shape=(1 << 34,))
        yield f"rice_wide_{name}_high_bit", "bad_directory", changed
    yield "rice_unused_low_bit", "padding_not_zero", indexed(index, at=24, new=b"\x09")
    yield "rice_unused_low_bit_31", "padding_not_zero", indexed(index, at=27, new=b"\x80")
    yield "rice_unused_unary_bit", "padding_not_zero", indexed(index, at=28, new=b"\x66")
    yield "rice_unused_unary_bit_31", "padding_not_zero", indexed(index, at=31, new=b"\x80")
    yield "rice_slack_first", "padding_not_zero", indexed(index, at=32, new=b"\1")
    yield "rice_slack_last", "padding_not_zero", indexed(index, at=-1, new=b"\x80")


def invalid_raw_and_bitmap() -> Invalid:
    """Sections 4.3 and 4.4."""
    for name, positions in ("equal", (3, 3, 9)), ("decreasing", (3, 9, 4)), ("decreasing_first", (9, 3, 4)):
        yield f"raw_{name}", "position_order", indexed(raw(positions, 16))
    yield "raw_order_before_range", "position_order", indexed(raw((3, 99, 4), 16))
    yield "raw_at_numel", "position_range", indexed(raw((3, 4, 16), 16))
    yield "raw_max", "position_range", indexed(raw((3, 4, (1 << 32) - 1), 16))
    wide = 1 << 33
    for name, position in ("at_numel", wide), ("sign_bit", 1 << 63), ("max", U64):
        yield f"raw_wide_{name}", "position_range", indexed(raw((3, position), wide), shape=(wide,))
    yield "raw_wide_order_by_high_half", "position_order", indexed(raw((wide // 2, 5), wide), shape=(wide,))
    yield "raw_range_before_slack", "position_range", indexed(raw((3, 4, 16), 16), at=-1, new=b"\1")
    yield "raw_slack_first", "padding_not_zero", indexed(raw((3, 4, 9), 16), at=-8, new=b"\1")
    yield "raw_slack_last", "padding_not_zero", indexed(raw((3, 4, 9), 16), at=-1, new=b"\x80")

    index = bitmap((3, 4, 9), 16)
    yield "bitmap_too_few_ones", "bad_index", indexed(index, at=4, new=b"\x08")
    yield "bitmap_too_many_ones", "bad_index", indexed(index, at=4, new=b"\x19")
    yield "bitmap_one_behind_numel_counts_not", "bad_index", indexed(index, at=4, new=b"\x08\2\1")
    yield "bitmap_rank", "bad_directory", indexed(index, at=0, new=b"\1")
    yield "bitmap_ones_before_rank", "bad_index", indexed(index, at=0, new=b"\1\0\0\0\x19")
    blocks = bitmap((3, 2047, 2048, 4099), 4100)
    for block in 1, 2:
        new = bytes((blocks.section[4 * block] ^ 1,))
        changed = indexed(blocks, at=4 * block, new=new, shape=(4100,))
        yield f"bitmap_rank_of_block_{block}", "bad_directory", changed
    yield "bitmap_rank_before_bits", "bad_directory", indexed(index, at=0, new=b"\1\0\0\0\x18\2\1")
    yield "bitmap_bit_at_numel", "padding_not_zero", indexed(index, at=6, new=b"\1")
    yield "bitmap_last_unused_bit", "padding_not_zero", indexed(index, at=7, new=b"\x80")
    yield "bitmap_slack_first", "padding_not_zero", indexed(index, at=-8, new=b"\1")
    yield "bitmap_slack_last", "padding_not_zero", indexed(index, at=-1, new=b"\x80")


def invalid_struct() -> Invalid:
    """Section 4.5."""
    shape = (4, 6)
    row = struct_of(shape, (ROW, 1, 1, 1))
    huge = 1 << 63

    def lines(count: int, *entries: Entry, shape: tuple[int, ...] = shape) -> bytes:
        return indexed(Index("STRUCT", tuple(range(count)), struct_section(*entries)), shape=shape)

    for name, entry in (
        ("kind_3", (3, 1, 1, 1)),
        ("kind_max", (U64, 1, 1, 1)),
        ("kind_past_32_bits", (1 << 32, 1, 1, 1)),
        ("step_0", (ROW, 1, 0, 1)),
        ("count_0", (ROW, 1, 1, 0)),
        ("row_negative", (ROW, -1, 1, 1)),
        ("row_beyond", (ROW, 4, 1, 1)),
        ("last_row_beyond", (ROW, 1, 3, 2)),
        ("column_negative", (COLUMN, -1, 1, 1)),
        ("column_beyond", (COLUMN, 6, 1, 1)),
        ("diagonal_below", (DIAGONAL, -4, 1, 1)),
        ("diagonal_above", (DIAGONAL, 6, 1, 1)),
        ("last_diagonal_above", (DIAGONAL, -3, 3, 4)),
        ("start_least", (DIAGONAL, -huge, 1, 1)),
        ("start_largest", (ROW, huge - 1, 1, 1)),
        ("last_line_wraps", (ROW, 1, huge, 3)),
        ("last_line_wraps_by_count", (ROW, 0, 1, U64)),
        ("last_line_wraps_by_both", (ROW, 3, U64, U64)),
        ("least_start_wraps", (DIAGONAL, -huge, huge, 2)),
    ):
        yield f"struct_{name}", "bad_index", lines(6, entry)
    for name, entries in (
        ("same_line_twice", [(ROW, 1, 1, 1), (ROW, 1, 1, 1)]),
        ("lines_decrease", [(ROW, 2, 1, 1), (ROW, 1, 1, 1)]),
        ("runs_interleave", [(ROW, 0, 2, 2), (ROW, 1, 2, 1)]),
        ("kinds_decrease", [(COLUMN, 1, 1, 1), (ROW, 1, 1, 1)]),
        ("diagonals_decrease", [(DIAGONAL, -1, 1, 1), (DIAGONAL, -2, 1, 1)]),
    ):
        yield f"struct_{name}", "position_order", lines(20, *entries)
    yield "struct_entry_before_order", "bad_index", lines(20, (ROW, 2, 1, 1), (ROW, 1, 0, 1))
    yield "struct_order_before_elements", "position_order", lines(6, (ROW, 1, 1, 1), (ROW, 1, 1, 1))
    yield "struct_elements_before_next_entry", "bad_index", lines(6, (ROW, 1, 1, 2), (ROW, 0, 1, 1))
    yield "struct_more_than_n_in_one_entry", "bad_index", lines(11, (ROW, 1, 1, 2))
    yield "struct_more_than_n_in_one_kind", "bad_index", lines(11, (ROW, 1, 1, 1), (ROW, 3, 1, 1))
    yield "struct_diagonals_more_than_n", "bad_index", lines(4, (DIAGONAL, 0, 1, 1), (DIAGONAL, 5, 1, 1))
    yield "struct_union_larger", "bad_index", lines(8, (ROW, 1, 1, 1), (COLUMN, 0, 1, 1))
    yield "struct_union_smaller", "bad_index", lines(10, (ROW, 1, 1, 1), (COLUMN, 0, 1, 1))
    vast = (1 << 28, 1 << 28)
    for name, kind in ("rows", ROW), ("columns", COLUMN), ("diagonals", DIAGONAL):
        yield f"struct_vast_{name}", "bad_index", lines(6, (kind, 0, 1, 1 << 28), shape=vast)
        yield f"struct_vast_line_of_{name}", "bad_index", lines(6, (kind, 0, 1, 1), shape=vast)
    yield "struct_slack_first", "padding_not_zero", indexed(row, at=-8, new=b"\1", shape=shape)
    yield "struct_slack_last", "padding_not_zero", indexed(row, at=-1, new=b"\x80", shape=shape)


def invalid_tiled() -> Invalid:
    """Section 4.6."""
    matrix = Matrix(2, (0, 1, 0, 1), (0, 0, 1, 1), ((0, 1), (1, 2)))
    positions = (0, 1, 3, 6, 9, 15)

    def case(outside: Mapping[int, int] | None = None, /, **parts: int | bytes) -> bytes:
        return indexed(tiled(positions, matrix, outside, **parts))

    for bits in 0, 5, 255:
        yield f"tiled_row_bits_{bits}", "bad_index", case(row_bits=bits)
        yield f"tiled_column_bits_{bits}", "bad_index", case(column_bits=bits)
    yield "tiled_head_not_zero", "bad_index", case(zero=1)
    yield "tiled_head_not_zero_high", "bad_index", case(zero=1 << 15)
    yield "tiled_without_rows", "bad_index", case(tile_rows=0)
    yield "tiled_tile_of_too_many_rows", "bad_index", case(tile_rows=5)
    yield "tiled_without_columns", "bad_index", case(columns=0)
    yield "tiled_columns_do_not_divide", "bad_index", case(columns=3)
    yield "tiled_more_columns_than_elements", "bad_index", case(columns=32)
    for name, columns, rows in ("columns", 1 << 18, 1), ("elements", 1 << 16, 3), ("overflow", 1 << 63, 2):
        data = tiled(positions, matrix, columns=columns, tile_rows=rows)
        yield f"tiled_tile_of_too_many_{name}", "bad_index", indexed(data, shape=(4, 1 << 18))
    yield "tiled_section_too_short_for_rows", "bad_size", indexed(tiled(positions, matrix), shape=(1 << 20, 4))
    yield "tiled_table_ends_beyond", "bad_size", case(row_bits=4, column_bits=4)
    yield "tiled_head_before_table", "bad_index", case(table=b"\0\x01\x01\x20", columns=3)
    yield "tiled_k", "bad_index", case(table=b"\0\x01\x01\x20")
    yield "tiled_k_before_width", "bad_index", case(table=b"\0\x01\x01\xff", widths=b"\xff" * 4)
    yield "tiled_width", "bad_index", case(widths=b"\x14\2\2\1")
    yield "tiled_width_before_size", "bad_index", case(widths=b"\4\x14\2\1", unary_bits=1 << 20)
    yield (
        "tiled_fields_end_beyond",
        "bad_size",
        indexed(tiled((0, 1), replace(matrix, tile_rows=1), widths=b"\x13" * 4)),
    )
    for bits in 1 << 10, (1 << 64) - 1:
        yield f"tiled_unary_bits_{bits}", "bad_size", case(unary_bits=bits)
    yield "tiled_size_before_counts", "bad_size", case(sizes=b"\0" * 4, unary_bits=64)
    yield "tiled_longer", "bad_size", case(slack=bytes(12))
    right = tiled(positions, matrix)
    yield "tiled_counts_below_n", "bad_index", indexed(replace(right, positions=(*positions, 14)))
    yield "tiled_counts_above_n", "bad_index", indexed(replace(right, positions=positions[:-1]))
    yield "tiled_unary_bits_below_sizes", "bad_index", case(unary_bits=6)
    yield "tiled_unary_bits_above_sizes", "bad_index", case(unary_bits=8)

    # The unary bits, first bit first: 1111 011; the sizes of the tiles, 4 and 3, are fields of 3 bits.
    yield "tiled_too_few_ones", "bad_index", case(unary=b"\x6e\0\0\0")
    yield "tiled_too_many_ones", "bad_index", case(unary=b"\x7f\0\0\0")
    yield "tiled_ones_of_the_next_tile", "bad_index", case(sizes=b"\x13\0\0\0")
    yield "tiled_tile_ends_with_zero", "bad_index", case(sizes=b"\x15\0\0\0")
    yield "tiled_last_tile_ends_with_zero", "bad_index", case(sizes=b"\x24\0\0\0", unary_bits=8)
    lone = tiled((0,), replace(matrix, k=((0, 0), (0, 0))), sizes=b"\5\0\0\0", widths=b"\2\1\0\0", unary_bits=2)
    yield "tiled_bits_of_an_empty_tile", "bad_index", indexed(lone)
    yield "tiled_order_by_low_bits", "position_range", case({15: 2})
    yield "tiled_order_by_zeros", "position_range", case({9: 2})
    yield "tiled_order_in_the_next_tile", "position_range", case({1: 4})
    low = replace(matrix, tile_rows=3)
    yield (
        "tiled_order_beyond_a_lower_tile",
        "position_range",
        indexed(tiled((12,), replace(low, k=((3, 3),) * 2), {12: 4})),
    )
    far = replace(matrix, k=((31, 31), (31, 31)))
    for name, number in ("low_bits", (1 << 31) - 1), ("zeros", 1 << 36):
        yield f"tiled_far_order_by_{name}", "position_range", indexed(tiled((0,), far, {0: number}))
    yield "tiled_range_before_next_tile", "position_range", case({6: 2}, unary=b"\x7f\0\0\0")
    yield "tiled_ones_before_range_of_next_tile", "bad_index", case({15: 2}, unary=b"\x6e\0\0\0")
    yield "tiled_range_before_unused_bits", "position_range", case({15: 2}, row_classes=b"\x1a\0\0\0")

    two = tiled(positions, replace(matrix, k=((0, 1), (1, 1))), widths=b"\3\2\2\1")
    yield "tiled_padding_of_widths", "padding_not_zero", indexed(two)
    for name, new in (
        ("row_classes", b"\x1a\0\0\0"),
        ("column_classes", b"\x0c\0\0\x80"),
        ("sizes", b"\x5c\0\0\0"),
        ("counts", b"\6\0\0\x80\1\0\0\0\3\0\0\0"),
        ("last_counts", b"\6\0\0\0\1\0\0\0\7\0\0\0"),
        ("low", b"\x29\0\0\0"),
        ("unary", b"\xef\0\0\0"),
        ("last_unary", b"\x6f\0\0\x80"),
        ("slack", b"\1" + bytes(7)),
        ("last_slack", bytes(7) + b"\x80"),
    ):
        yield f"tiled_unused_{name}", "padding_not_zero", case(**{name.removeprefix("last_"): new})


def invalid_seeded() -> Invalid:
    """Section 4.8."""
    all_cells, some, most = seeded(16, 7, 5), seeded(16, 7, 9, (1, 2, 6), 1), seeded(16, 7, 5, (0, 1, 3), 1)

    def headed(cells: int, index: Index = all_cells, numel: int = 16) -> bytes:
        return indexed(index, at=8, new=struct.pack("<Q", cells), shape=(numel,))

    for name, cells in ("0", 0), ("below_n", 4), ("above_numel", 17), ("above_numel_high", 5 + (1 << 32)), ("max", U64):
        yield f"seeded_cells_{name}", "bad_index", headed(cells)
    yield "seeded_too_many_cells", "bad_index", headed(1 << 32, some, 1 << 33)
    yield "seeded_cell_too_large", "bad_index", headed(5, all_cells, 5 * (1 << 32) + 1)
    yield "seeded_one_cell_too_large", "bad_index", indexed(seeded(16, 7, 1), shape=(MAX_NUMEL,))
    yield "seeded_cells_before_size", "bad_index", headed(17, seeded(16, 7, 5, tail=bytes(12)))
    yield "seeded_all_cells_longer", "bad_size", indexed(seeded(16, 7, 5, tail=bytes(12)))
    yield "seeded_all_cells_with_a_list", "bad_size", headed(3, most)
    yield "seeded_without_list", "bad_size", headed(6)
    for size in 12, 16, 20:
        yield f"seeded_list_of_{size}_bytes", "bad_size", headed(6, seeded(16, 7, 5, tail=b"\xff" * size))

    # The list: k at 16, the number of unary bits at 24, a directory of one entry at 32, low at 40, unary at 44.
    for name, index in ("list", some), ("others", most):
        for k in 32, 255:
            yield f"seeded_{name}_k_{k}", "bad_index", indexed(index, at=16, new=bytes((k,)))
        yield f"seeded_{name}_head_not_zero", "bad_index", indexed(index, at=23, new=b"\1")
        yield f"seeded_{name}_longer", "bad_size", indexed(replace(index, section=index.section + bytes(4)))
        yield f"seeded_{name}_unary_bits_max", "bad_size", indexed(index, at=24, new=b"\xff" * 8)
        yield f"seeded_{name}_one_less", "bad_index", indexed(index, at=44, new=b"\0")
        yield f"seeded_{name}_base", "bad_directory", indexed(index, at=32, new=b"\1")
        yield f"seeded_{name}_rank", "bad_directory", indexed(index, at=36, new=b"\1")
        for part, at in ("low", 43), ("unary", 47), ("slack", -8), ("last_slack", -1):
            yield f"seeded_{name}_unused_{part}", "padding_not_zero", indexed(index, at=at, new=b"\x80")
    yield "seeded_list_of_the_others", "bad_index", indexed(replace(some, section=seeded(16, 7, 9, range(5)).section))
    outside = seeded(16, 7, 5, (0, 1, 3), tail=rice((2, 5), 5).section)
    yield "seeded_list_range", "position_range", headed(6, some)
    yield "seeded_others_range", "position_range", indexed(outside)
    yield "seeded_range_before_directory", "position_range", indexed(outside, at=32, new=b"\1")
    yield "seeded_slack_first", "padding_not_zero", indexed(all_cells, at=-8, new=b"\1")
    yield "seeded_slack_last", "padding_not_zero", indexed(all_cells, at=-1, new=b"\x80")


def invalid_values() -> Invalid:
    """Section 5."""
    numbers = halves(129)
    codecs = {
        **{codec.__name__.removesuffix("_values"): codec(numbers) for codec in FLOAT_CODECS},
        "bits": bits_values([7] * 129, "int8"),
    }
    for name, values in codecs.items():
        yield f"{name}_slack_first", "padding_not_zero", valued(values, -8, b"\1")
        yield f"{name}_slack_last", "padding_not_zero", valued(values, -1, b"\x80")
    bits = {name: len(values.section) - 9 for name, values in codecs.items()}
    yield "f16_padding", "padding_not_zero", valued(codecs["f16"], bits["f16"], b"\1")
    yield "bf16_padding", "padding_not_zero", valued(codecs["bf16"], bits["bf16"] - 1, b"\1")
    yield "bits_padding", "padding_not_zero", valued(codecs["bits"], 129, b"\1")
    yield "bits_padding_last", "padding_not_zero", valued(codecs["bits"], 131, b"\1")
    yield "i8_padding", "padding_not_zero", valued(codecs["i8"], 4 + 129, b"\1")
    yield "i4_padding", "padding_not_zero", valued(codecs["i4"], 8 + 65, b"\1")
    yield (
        "i4_unused_nibble",
        "padding_not_zero",
        valued(codecs["i4"], 8 + 64, bytes((codecs["i4"].section[72] | 0x10,))),
    )
    yield "sign_unused_bit", "padding_not_zero", valued(codecs["sign"], 4 + 16, b"\2")
    yield "sign_last_unused_bit", "padding_not_zero", valued(codecs["sign"], 4 + 19, b"\x80")
    for codec, values in ("i8", i8_values(halves(3))), ("sign", sign_values(halves(3))):
        yield f"{codec}_padding_of_parameters", "padding_not_zero", valued(values, 2, b"\1")
    infinite = {"f32": 0x7F800000, "f16": 0x7C00, "bf16": 0x7F80}
    for codec, infinity in infinite.items():
        size = 4 if codec == "f32" else 2
        for name, pattern in (
            ("infinity", infinity),
            ("minus_infinity", infinity | 1 << (8 * size - 1)),
            ("nan", infinity + 1),
            ("quiet_nan", (2 << (8 * size - 1)) - 1),
        ):
            yield f"{codec}_{name}", "bad_value", valued(codecs[codec], 128 * size, unsigned([pattern], size))
    parameters = {
        "infinite": 0x7F80,
        "nan": 0x7F81,
        "minus_nan": 0xFFC0,
        "negative": 0xBF80,
        "minus_zero": 0x8000,
    }
    for codec, at, name in ("i8", 2, "scale"), ("i4", 4, "lo"), ("i4", 6, "step"), ("sign", 2, "lo"):
        for what, pattern in parameters.items():
            yield f"{codec}_{name}_{what}", "bad_value", valued(codecs[codec], at, unsigned([pattern], 2))
    yield "i8_scale_too_large", "bad_value", valued(codecs["i8"], 2, unsigned([0x7C00], 2))
    yield "i4_step_too_large", "bad_value", valued(codecs["i4"], 4, unsigned([0, 0x7F00], 2))
    yield "i4_sum_too_large", "bad_value", valued(codecs["i4"], 4, unsigned([0x7F7F, 0x7B00], 2))
    yield "value_before_padding", "bad_value", valued(codecs["i8"], 2, b"\x80\xff" + bytes(129) + b"\1")


#: The first quotients of 50 listed shifts of a block, and nothing else of it; then a block of one, with k = 13.
ENDS_BEYOND = (1 << 50) - 1 | (1 | 1 << 14) << 50


def invalid_ulp() -> Invalid:
    """Section 5.1."""
    good = ulp_values((1, -1, 2, -3, 1, 100, -1), 1, k=1, j=0)
    two = ulp_values([1] * 8191 + [2] + [1, -2, 5], 1, k=3, j=0)
    # 24 bytes of head, 8 of the directory, 4 of the signs, then the stream.
    bits, stream = good.section[8], 36
    assert bits == 4 + 3 + 10 + 7  # the four parts

    def streamed(shifts: Sequence[int], at: int, flip: int) -> bytes:
        values = ulp_values(shifts, 1, k=1, j=0)
        byte = stream + at // 8
        return valued(values, byte, bytes((values.section[byte] ^ flip << at % 8,)))

    yield "ulp_k_14", "bad_value", valued(good, 0, b"\x0e")
    yield "ulp_j_63", "bad_value", valued(good, 1, b"\x3f")
    yield "ulp_head_byte", "bad_value", valued(good, 7, b"\1")
    yield "ulp_bits_more_words", "bad_size", valued(good, 8, bytes((bits + 32,)))
    yield "ulp_bits_wrap", "bad_size", valued(good, 8, unsigned([U64], 8))
    yield "ulp_bits_wide", "bad_size", valued(good, 12, b"\1")
    yield "ulp_section_short", "bad_size", bytes_of(
        Tensor((7,), all_of(7), replace(good, section=good.section[:43]), op="ULP", dtype="int8")
    )  # fmt: skip
    yield "ulp_directory_first_bit", "bad_directory", valued(good, 24, b"\1")
    yield "ulp_directory_first_before", "bad_directory", valued(good, 28, b"\1")
    yield "ulp_listed_over_n", "bad_directory", valued(good, 16, b"\x08")
    end, second = (int.from_bytes(two.section[at : at + 4], "little") for at in (8, 32))
    yield "ulp_directory_beyond_bits", "bad_directory", valued(two, 32, unsigned([end + 1], 4))
    yield "ulp_directory_beyond_listed", "bad_directory", valued(two, 36, unsigned([4], 4))
    yield "ulp_directory_bit", "bad_value", valued(two, 32, unsigned([second + 1], 4))
    yield "ulp_directory_before", "bad_value", valued(two, 36, unsigned([2], 4))
    yield "ulp_bits_without_shifts", "bad_value", valued(good, 16, b"\0")
    yield "ulp_listed_too_few", "bad_value", valued(good, 16, b"\2")
    yield "ulp_listed_too_many", "bad_value", valued(good, 16, b"\4")
    yield "ulp_bits_too_few", "bad_value", valued(good, 8, bytes((bits - 1,)))
    yield "ulp_bits_too_many", "bad_value", valued(good, 8, bytes((bits + 1,)))
    yield "ulp_no_ones", "bad_value", valued(good, stream, bytes(4))
    yield "ulp_rank_outside", "bad_value", streamed((1, 1, 1, 1, 1, 1, 2), 4, 1)
    yield "ulp_too_large", "bad_value", valued(replace(ulp_values((128,), 2), bits=(128,)))
    yield "ulp_width_64", "bad_value", valued(replace(ulp_values((1 << 65,), 8, j=0), bits=(1,)))
    # The low bits of the first block end beyond the last one.
    beyond = bytes((13, 0)) + bytes(6) + unsigned([65, 51], 8) + unsigned([0, 0, 50, 50], 4)
    beyond += bitmap_of([], 8193) + bit_words(ENDS_BEYOND, 65) + SLACK
    yield "ulp_low_bits_beyond_all_blocks", "bad_value", valued(Values("ULP", (1,) * 8193, beyond))
    yield "ulp_unused_sign", "padding_not_zero", valued(good, 32, bytes((good.section[32] | 0x80,)))
    yield "ulp_last_unused_sign", "padding_not_zero", valued(good, 35, b"\x80")
    yield "ulp_unused_bit", "padding_not_zero", valued(two, len(two.section) - 9, b"\x80")
    yield "ulp_slack_first", "padding_not_zero", valued(good, -8, b"\1")
    yield "ulp_slack_last", "padding_not_zero", valued(good, -1, b"\x80")


BASE_SAMPLE = beside_base(
    Tensor((4, 4), from_base(SMALL, SMALL_BASE, SMALL_MATRIX), ulp_values((1, -1, 2, -3, 1, 5, -1)), op="ULP"),
    SMALL_BASE,
)
ULP_FROM_BASE_SAMPLE = replace(
    BASE_SAMPLE,
    index=raw(SMALL, 16),
    values=ulp_from_base((1, -1, 2, -3, 1, 5, -1), BASE_SAMPLE.base or (), (), ((1, 0),)),
)
#: Name, reason, file, base.
InvalidWithBase = Iterator[tuple[str, str, bytes, bytes]]


def flip(at: int, bits: int) -> Callable[[bytes], bytes]:
    """Flips bits of a byte of a part."""
    return lambda part: patched(part, at, bytes((part[at] ^ bits,)))


def invalid_without_base() -> Invalid:
    """Sections 4.7 and 5.2: what is refused before a base is asked for, and that it is asked for."""
    ids, reason = DTYPES, "bad_combination"
    index = INDEX_CODECS["FROM_BASE"]
    for dtype in "bool", "int16", "float8_e8m0fnu", "complex64":
        yield f"from_base_of_{dtype}", reason, recorded(SET_SAMPLE, dtype=ids[dtype][0], index_codec=index)
    yield "from_base_of_unspecified", reason, recorded(dtype=0, index_codec=index)
    yield "new_in_from_base", reason, recorded(NEW_SAMPLE, dtype=ids["float32"][0], index_codec=index)
    for dtype in "int16", "uint16":
        yield f"ulp_from_base_of_{dtype}", reason, recorded(ULP_FROM_BASE_SAMPLE, dtype=ids[dtype][0])
    yield "add_in_ulp_from_base", reason, recorded(ULP_FROM_BASE_SAMPLE, op=OPS["ADD"])
    yield "set_in_ulp_from_base", reason, recorded(ULP_FROM_BASE_SAMPLE, op=OPS["SET"])
    for size in 8, 39:
        cut = replace(BASE_SAMPLE.index, section=BASE_SAMPLE.index.section[:size])
        yield f"size_from_base_{size}", "bad_size", bytes_of(replace(BASE_SAMPLE, index=cut))
    cut_values = replace(ULP_FROM_BASE_SAMPLE.values, section=ULP_FROM_BASE_SAMPLE.values.section[:35])
    yield "size_ulp_from_base_35", "bad_size", bytes_of(replace(ULP_FROM_BASE_SAMPLE, values=cut_values))
    yield "from_base_crc_before_base", "section_checksum", recorded(BASE_SAMPLE, index_crc=1)
    frame = zstd_index(BASE_SAMPLE.index, b"no frame")
    yield "from_base_zstd_before_base", "bad_zstd", bytes_of(replace(BASE_SAMPLE, index=frame))
    yield "from_base_without_base", "base_needed", bytes_of(BASE_SAMPLE)
    yield "ulp_from_base_without_base", "base_needed", bytes_of(ULP_FROM_BASE_SAMPLE)
    wrong = replace(BASE_SAMPLE.index, section=patched(BASE_SAMPLE.index.section, 0, b"\xff"))
    yield "base_before_index", "base_needed", bytes_of(replace(BASE_SAMPLE, index=wrong))
    wrong_values = replace(
        ULP_FROM_BASE_SAMPLE.values, section=patched(ULP_FROM_BASE_SAMPLE.values.section, 0, b"\xff")
    )
    yield "base_before_values", "base_needed", bytes_of(replace(ULP_FROM_BASE_SAMPLE, values=wrong_values))
    yield "base_before_values_crc", "base_needed", recorded(BASE_SAMPLE, values_crc=1)
    yield "index_before_base", "position_order", bytes_of(replace(ULP_FROM_BASE_SAMPLE, index=raw(SMALL[::-1], 16)))
    yield "base_before_digest", "base_needed", bytes_of(BASE_SAMPLE, digest=bytes(32))


def invalid_from_base() -> InvalidWithBase:
    """Section 4.7."""

    def given(index: Index, base: Sequence[int] = SMALL_BASE, nnz: int | None = None) -> tuple[bytes, bytes]:
        positions = index.positions if nnz is None else tuple(range(nnz))
        values = ulp_values([1] * len(positions))
        tensor = Tensor((4, 4), replace(index, positions=positions), values, op="ULP", base_tensor=tuple(base))
        return bytes_of(tensor), one(tensor).base

    def case(outside: Mapping[int, int] | None = None, /, **parts: object) -> tuple[bytes, bytes]:
        return given(from_base(SMALL, SMALL_BASE, SMALL_MATRIX, outside, **parts))

    def cut(index: Index, size: int) -> tuple[bytes, bytes]:
        return given(replace(index, section=index.section[:size]))

    for bits in 5, 255:
        yield f"from_base_row_bits_{bits}", "bad_index", *case(row_bits=bits)
        yield f"from_base_column_bits_{bits}", "bad_index", *case(column_bits=bits)
    for classes in 0, 17, 255:
        yield f"from_base_classes_{classes}", "bad_index", *case(classes=classes)
    yield "from_base_head_not_zero", "bad_index", *case(zero=1)
    yield "from_base_without_rows", "bad_index", *case(tile_rows=0)
    yield "from_base_tile_of_too_many_rows", "bad_index", *case(tile_rows=5)
    yield "from_base_without_columns", "bad_index", *case(columns=0)
    yield "from_base_columns_do_not_divide", "bad_index", *case(columns=3)
    yield "from_base_more_columns_than_elements", "bad_index", *case(columns=32)
    yield "from_base_columns_overflow", "bad_index", *case(columns=1 << 63)
    small = from_base(SMALL, SMALL_BASE, replace(SMALL_MATRIX, thresholds=(), table=(((1,),),)))
    yield (
        "from_base_thresholds_end_beyond",
        "bad_size",
        *cut(replace(small, section=patched(small.section, 2, b"\x10")), 40),
    )
    ten = from_base(SMALL, SMALL_BASE, replace(SMALL_MATRIX, thresholds=(9, *range(8)), table=(((1,) * 10,),)))
    yield "from_base_padding_of_thresholds_ends_beyond", "bad_size", *cut(ten, 43)
    yield "from_base_thresholds_decrease", "bad_index", *case(thresholds=unsigned((0x4000, 0x3FFF), 2))
    yield "from_base_thresholds_before_table", "bad_index", *case(thresholds=unsigned((2, 1), 2), row_bits=4)
    yield "from_base_table_ends_beyond", "bad_size", *case(row_bits=4, column_bits=4)
    yield "from_base_head_before_table", "bad_index", *case(table=b"\x80\0\x21\0", columns=3)
    for bit in 5, 6:
        yield f"from_base_bit_{bit}_of_the_table", "bad_index", *case(table=bytes((0x80, 0, 1 | 1 << bit, 0)))
    yield "from_base_table_before_width", "bad_index", *case(table=b"\x80\0\x41\0", widths=b"\xff" * 4)
    wide = from_base(SMALL, SMALL_BASE, replace(SMALL_MATRIX, thresholds=range(7), table=((range(8),),)))
    yield "from_base_widths_end_beyond", "bad_size", *cut(wide, 54)
    yield "from_base_width", "bad_index", *case(widths=b"\x17\2\2\2")
    yield "from_base_width_before_size", "bad_index", *case(widths=b"\3\x17\2\2", unary_bits=1 << 20)
    lines = from_base(SMALL, SMALL_BASE, BaseMatrix(1, range(16), (0,), (), [[(0,)]] * 16))
    yield "from_base_row_classes_end_beyond", "bad_size", *cut(lines, 48)
    lines = from_base(SMALL, SMALL_BASE, BaseMatrix(1, (0,), range(16), (), [[(0,)] * 16]))
    yield "from_base_column_classes_end_beyond", "bad_size", *cut(lines, 48)
    yield "from_base_sizes_end_beyond", "bad_size", *case(columns=1, tile_rows=1, widths=b"\x16" * 4)
    yield "from_base_counts_end_beyond", "bad_size", *case(columns=1, tile_rows=1, widths=b"\3\x16\x16\x16")
    for bits in 1 << 10, (1 << 64) - 1:
        yield f"from_base_unary_bits_{bits}", "bad_size", *case(unary_bits=bits)
    yield "from_base_size_before_sizes", "bad_size", *case(sizes=b"\0" * 4, unary_bits=64)
    yield "from_base_longer", "bad_size", *case(slack=bytes(12))
    yield "from_base_not_a_multiple_of_4", "bad_size", *case(slack=bytes(9))
    yield "from_base_unary_bits_below_sizes", "bad_index", *case(unary_bits=7)
    yield "from_base_unary_bits_above_sizes", "bad_index", *case(unary_bits=9)

    # The unary bits, first bit first: 01001 101; the sizes of the tiles, 5 and 3, are fields of 3 bits.
    yield "from_base_too_few_ones", "bad_index", *case(unary=flip(0, 2))
    yield "from_base_too_many_ones", "bad_index", *case(unary=flip(0, 1))
    yield "from_base_ones_of_the_next_tile", "bad_index", *case(sizes=b"\x16\0\0\0")
    zero = from_base((1, 3, 4, 8, 13, 14, 15), SMALL_BASE, SMALL_MATRIX, sizes=b"\x1e\0\0\0")
    yield "from_base_tile_ends_with_zero", "bad_index", *given(zero)
    yield "from_base_last_tile_ends_with_zero", "bad_index", *case(sizes=b"\x25\0\0\0", unary_bits=9)
    alone = replace(SMALL_MATRIX, thresholds=(), table=(((0,),),))
    lone = from_base((0,), SMALL_BASE, alone, sizes=b"\3\0\0\0", unary_bits=2)
    yield "from_base_bits_of_an_empty_tile", "bad_index", *given(lone)
    # In the group of the byte 0x01 there are 3 elements of tile 1; position 11 is the second of those in tile 1.
    yield "from_base_number_by_low_bits", "wrong_base", *case({11: 3})
    yield "from_base_number_by_zeros", "wrong_base", *case({11: 4})
    yield "from_base_number_in_a_turned_group", "wrong_base", *case({6: 3})
    far = replace(SMALL_MATRIX, thresholds=(), table=(((31,),),))
    for name, number in ("low_bits", (1 << 31) - 1), ("zeros", 1 << 36):
        yield (
            f"from_base_far_number_by_{name}",
            "wrong_base",
            *given(from_base((0,), SMALL_BASE, far, {0: number})),
        )
    yield "from_base_number_before_next_tile", "wrong_base", *case({6: 3}, unary=flip(0, 0x80))
    yield "from_base_ones_before_number_of_next_tile", "bad_index", *case({11: 3}, unary=flip(0, 1))
    yield "from_base_number_before_unused_bits", "wrong_base", *case({11: 3}, slack=b"\1" + bytes(7))
    yield "from_base_too_few_nonzeros", "wrong_base", *given(from_base(SMALL, SMALL_BASE, SMALL_MATRIX), nnz=8)
    yield "from_base_too_many_nonzeros", "wrong_base", *given(from_base(SMALL, SMALL_BASE, SMALL_MATRIX), nnz=6)
    unused = from_base(SMALL, SMALL_BASE, SMALL_MATRIX, slack=b"\1" + bytes(7))
    yield "from_base_unused_bits_before_nonzeros", "padding_not_zero", *given(unused, nnz=6)

    odd = replace(SMALL_MATRIX, thresholds=(0x4000,), row_classes=(0, 1, 1, 0), column_classes=(1, 0, 0, 1))
    odd = replace(odd, table=(((0, 1), (0, 1)), ((2, 1), (1, 2))))
    names = {name: flip(-1, 0x80) for name in ("thresholds", "row_classes", "column_classes", "sizes", "low", "unary")}
    for name, spoil in (*names.items(), *((f"counts_{i}", flip(4 * i + 3, 0x80)) for i in range(3))):
        changed = from_base(SMALL, SMALL_BASE, odd, **{name.rstrip("_012"): spoil})
        yield f"from_base_unused_{name}", "padding_not_zero", *given(changed)
    yield "from_base_unused_table", "padding_not_zero", *case(table=b"\x80\0\1\1")
    five = replace(SMALL_MATRIX, thresholds=(1, 2, 3, 4), table=(((1, 2, 3, 4, 5),),))
    spoilt = from_base(SMALL, SMALL_BASE, five, widths=flip(-1, 1))
    yield "from_base_unused_widths", "padding_not_zero", *given(spoilt)
    yield "from_base_slack", "padding_not_zero", *case(slack=b"\1" + bytes(7))
    yield "from_base_last_slack", "padding_not_zero", *case(slack=bytes(7) + b"\x80")


def invalid_ulp_from_base() -> InvalidWithBase:
    """Section 5.2."""
    shifts = [1, -1, 2, -3, 1, 100, -1, -1, 900, -32000, 1, 5, -2, 1, 4, -1]

    def given(values: Values, dtype: str = "bfloat16", base: Sequence[int] = SMALL_BASE) -> tuple[bytes, bytes]:
        count = len(values.bits)
        tensor = Tensor((count,), all_of(count), values, dtype=dtype, op="ULP", base_tensor=tuple(base)[:count])
        return bytes_of(tensor), one(tensor).base

    def made(shifts: Sequence[int], outside: Mapping[int, int] | None = None, /, **parts: object) -> Values:
        base = SMALL_BASE[: len(shifts)]
        return ulp_from_base(shifts, base, (0x3E80,), ((1, 0), (0, 6)), outside, **parts)

    def case(outside: Mapping[int, int] | None = None, /, **parts: object) -> tuple[bytes, bytes]:
        return given(made(shifts, outside, **parts))

    def cut(values: Values, size: int) -> tuple[bytes, bytes]:
        return given(replace(values, section=values.section[:size]))

    def zeros(part: bytes) -> bytes:
        return bytes(len(part))

    for classes in 0, 17, 255:
        yield f"ulp_from_base_classes_{classes}", "bad_value", *case(classes=classes)
    for width in 15, 255:
        yield f"ulp_from_base_counts_of_{width}_bits", "bad_value", *case(width=width)
    yield "ulp_from_base_head_not_zero", "bad_value", *case(zero=1)
    yield "ulp_from_base_head_not_zero_high", "bad_value", *case(zeros=1 << 31)
    ones = [1] * 16
    none = ulp_from_base(ones, SMALL_BASE, (), ((0, 0),), classes=16)
    yield "ulp_from_base_thresholds_end_beyond", "bad_size", *given(none)
    twelve = ulp_from_base(ones, SMALL_BASE, (9, *range(10)), ((0, 0),) * 12)
    yield "ulp_from_base_padding_of_thresholds_ends_beyond", "bad_size", *cut(twelve, 39)
    two = (0x4000, 0x3FFF)
    decreasing = ulp_from_base(shifts, SMALL_BASE, two, ((0, 0),) * 3, slack=bytes(12))
    yield "ulp_from_base_thresholds_decrease", "bad_value", *given(decreasing)
    eight = ulp_from_base(ones, SMALL_BASE, range(7), ((0, 0),) * 8)
    yield "ulp_from_base_parameters_end_beyond", "bad_size", *cut(eight, 44)
    yield "ulp_from_base_k_14", "bad_value", *case(parameters=b"\1\0\x0e\6")
    yield "ulp_from_base_j_63", "bad_value", *case(parameters=b"\1\x3f\0\6")
    yield "ulp_from_base_parameters_before_size", "bad_value", *case(parameters=b"\1\0\0\xff", slack=bytes(12))
    sixteen = ulp_from_base(shifts, SMALL_BASE, range(15), ((0, 0),) * 16)
    yield "ulp_from_base_counts_end_beyond", "bad_size", *cut(sixteen, 100)
    yield "ulp_from_base_counts_of_0_bits", "bad_size", *case(width=0)
    good = made(shifts)
    (bits,) = struct.unpack_from("<Q", good.section, 8)
    yield "ulp_from_base_bits_more_words", "bad_size", *case(bits=bits + 32)
    yield "ulp_from_base_bits_max", "bad_size", *case(bits=U64)
    yield "ulp_from_base_bits_wide", "bad_size", *case(bits=bits + (1 << 32))
    yield "ulp_from_base_longer", "bad_size", *case(slack=bytes(12))
    yield "ulp_from_base_not_a_multiple_of_4", "bad_size", *case(slack=bytes(9))
    yield "ulp_from_base_directory_first", "bad_directory", *case(directory=b"\1\0\0\0")
    yield "ulp_from_base_directory_before_counts", "bad_directory", *case(directory=b"\1\0\0\0", counts=b"\xff" * 8)

    # By classes of its keys, the base has 7 elements in class 0, at the positions 1, 4, 6, 8, 10, 13 and 15.
    yield "ulp_from_base_lists_more_than_there_are", "wrong_base", *case(width=4, counts=flip(0, 8))
    yield "ulp_from_base_counts_before_stream", "wrong_base", *case(width=4, counts=flip(0, 8), stream=zeros)
    yield "ulp_from_base_lists_too_few", "bad_value", *case(counts=flip(0, 1))
    yield "ulp_from_base_bits_too_few", "bad_value", *case(bits=bits - 1)
    yield "ulp_from_base_bits_too_many", "bad_value", *case(bits=bits + 1)
    yield "ulp_from_base_no_ones", "bad_value", *case(stream=zeros)
    yield "ulp_from_base_bits_without_shifts", "bad_value", *given(made(ones, bits=1, stream=bytes(4)))
    deep = ulp_from_base([1 << 65], (0,), (), ((0, 0),), None, "float64")
    yield "ulp_from_base_width_64", "bad_value", *given(replace(deep, bits=(1,)), "float64")
    yield "ulp_from_base_number_by_low_bits", "wrong_base", *given(made([1] * 15 + [2], {15: 7}))
    yield "ulp_from_base_number_by_zeros", "wrong_base", *given(made([1] * 15 + [2], {15: 8}))
    yield "ulp_from_base_number_of_the_other_class", "wrong_base", *given(made([1] * 14 + [2, 1], {14: 9}))
    yield "ulp_from_base_too_large", "bad_value", *given(made([1] * 15 + [1 << 15]))
    yield "ulp_from_base_number_before_too_large", "wrong_base", *given(made([1 << 15, *ones[:14], 2], {15: 7}))
    yield (
        "ulp_from_base_number_before_unused_bits",
        "wrong_base",
        *given(made([*ones[:15], 2], {15: 7}, slack=b"\1" * 8)),
    )
    yield "ulp_from_base_too_large_before_unused_bits", "bad_value", *given(made([1 << 15], slack=b"\1" * 8))

    # Each check is made for all blocks before the next.
    base = (0x10, 0x60) * 8193
    first, second = [2] + [1] * 8191, [1, 1, 2]

    def blocks(shifts: Sequence[int], outside: Mapping[int, int], **parts: object) -> tuple[bytes, bytes]:
        of_shifts = base[: len(shifts)]
        values = ulp_from_base(shifts, of_shifts, (0x40,), ((4, 0), (0, 0)), outside, "float8_e5m2", **parts)
        return given(values, "float8_e5m2", of_shifts)

    decreases = unsigned([0, 6, 5], 4)
    yield "ulp_from_base_directory_decreases", "bad_directory", *blocks(first * 2 + [2], {}, directory=decreases)
    beyond = unsigned([0, 1 << 20], 4)
    yield "ulp_from_base_directory_beyond_bits", "bad_directory", *blocks(first + second, {}, directory=beyond)
    yield "ulp_from_base_directory_of_no_block", "bad_value", *blocks(first + second, {}, directory=bytes(8))
    # The second block has two elements of class 0; S has a bit more than both streams.
    lists = {"width": 2, "counts": b"\x0d" + bytes(7), "stream": flip(0, 1)}
    yield "ulp_from_base_lists_before_other_streams", "wrong_base", *blocks(first + second, {}, **lists)
    short = {"bits": 65, "directory": unsigned([0, 50], 4), "stream": bit_words(ENDS_BEYOND, 65)}
    far = blocks([2, 1] * 50 + [1] * 8092 + [2], {}, parameters=b"\x0d\0\0\0", **short)
    yield "ulp_from_base_low_bits_beyond_all_blocks", "bad_value", *far
    far = blocks(first + second, {0: 4096}, bits=257 + 4 + 1 + 6 + 1)
    yield "ulp_from_base_stream_before_other_numbers", "bad_value", *far
    yield "ulp_from_base_number_before_other_magnitudes", "wrong_base", *blocks([128, *first[1:], *second], {8194: 2})

    six = ulp_from_base(shifts, SMALL_BASE, (0x3E80,), ((1, 0), (0, 6)), thresholds=flip(-1, 0x80))
    yield "ulp_from_base_unused_thresholds", "padding_not_zero", *given(six)
    three = ulp_from_base(shifts, SMALL_BASE, (0x3E80, 0x4000), ((0, 0),) * 3, parameters=flip(-1, 1))
    yield "ulp_from_base_unused_parameters", "padding_not_zero", *given(three)
    for name, spoil in (
        ("counts_0", flip(3, 0x80)),
        ("counts_1", flip(7, 0x80)),
        ("signs", flip(2, 1)),
        ("last_signs", flip(-1, 0x80)),
        ("stream", flip(-1, 0x80)),
        ("slack", flip(0, 1)),
        ("last_slack", flip(-1, 0x80)),
    ):
        changed = made(shifts, **{name.removeprefix("last_").rstrip("_01"): spoil})
        yield f"ulp_from_base_unused_{name}", "padding_not_zero", *given(changed)


def wrong_base() -> InvalidWithBase:
    """Section 7: the digest tells."""
    other = replace(BASE_SAMPLE, base_tensor=(*SMALL_BASE[1::-1], *SMALL_BASE[2:]))
    yield "from_base_of_another_base", "wrong_base", bytes_of(other), one(other).base
    at = tuple(SMALL_BASE[position] for position in SMALL)
    values = ulp_from_base((1, -1, 2, -3, 1, 5, -1), at, (0x3E80,), ((1, 0), (0, 0)))
    right = replace(ULP_FROM_BASE_SAMPLE, values=values)
    for name, tensor in ("from_base", BASE_SAMPLE), ("ulp_from_base", right):
        yield f"{name}_with_another_digest", "wrong_base", bytes_of(tensor, digest=bytes(32)), one(tensor).base
    swapped = list(SMALL_BASE)
    swapped[3], swapped[4] = SMALL_BASE[4], SMALL_BASE[3]
    moved_ = replace(right, base_tensor=tuple(swapped))
    yield "ulp_from_base_of_another_base", "wrong_base", bytes_of(moved_), one(moved_).base
    file = File((replace(SAMPLE, name="a", base_tensor=(0,) * 16), other))
    yield "from_base_of_another_base_beside_others", "wrong_base", build(file).data, file.base


def invalid_contents() -> Invalid:
    """Section 7, and which of several faults decides."""
    yield "digest", "digest_mismatch", bytes_of(SAMPLE, digest=bytes(32))
    yield "digest_of_no_tensors", "digest_mismatch", bytes_of(digest=b"\1")
    bad_index = replace(SAMPLE.index, section=patched(SAMPLE.index.section, 0, b"\x20"))
    bad_values = replace(SAMPLE.values, section=patched(SAMPLE.values.section, 0, b"\x80\x7f"))
    a, b = (replace(SAMPLE, name=name) for name in "ab")
    yield "index_before_values", "bad_index", bytes_of(replace(SAMPLE, index=bad_index, values=bad_values))
    yield "index_before_values_crc", "bad_index", bytes_of(replace(SAMPLE, index=bad_index, record={"values_crc": 0}))
    yield (
        "first_tensor_before_second",
        "bad_value",
        bytes_of(replace(a, values=bad_values), replace(b, index=bad_index)),
    )
    yield "second_tensor", "bad_index", bytes_of(a, replace(b, index=bad_index))
    yield "table_before_contents", "unknown_op", bytes_of(replace(a, index=bad_index), replace(b, record={"op": 9}))
    yield "contents_before_digest", "bad_value", bytes_of(replace(SAMPLE, values=bad_values), digest=bytes(32))


# --- writing them ---

VALID = (
    *(
        valid_rice,
        valid_other_positions,
        valid_tiled,
        valid_seeded,
        valid_values,
        valid_ulp,
        valid_operations,
        valid_container,
        valid_packed,
    ),
)
INVALID = (
    *(
        invalid_header,
        invalid_file_sections,
        invalid_packed,
        invalid_names,
        invalid_ids_and_shapes,
        invalid_combinations,
    ),
    *(invalid_layout, invalid_zstd, invalid_rice, invalid_raw_and_bitmap, invalid_struct, invalid_tiled),
    *(invalid_seeded, invalid_values, invalid_ulp, invalid_without_base, invalid_contents),
)
VALID_WITH_BASE = (valid_from_base, valid_ulp_from_base)
INVALID_WITH_BASE = (invalid_from_base, invalid_ulp_from_base, wrong_base)


def valid_files() -> dict[str, File]:
    """Name -> file."""
    return _unique((name, file) for cases in VALID for name, file in cases())


def invalid_files() -> dict[str, tuple[str, bytes]]:
    """Name -> (reason, bytes)."""
    return _unique((name, (reason, data)) for cases in INVALID for name, reason, data in cases())


def valid_files_with_base() -> dict[str, File]:
    """Name -> file, which has its base."""
    return _unique((name, file) for cases in VALID_WITH_BASE for name, file in cases())


def invalid_files_with_base() -> dict[str, tuple[str, bytes, bytes]]:
    """Name -> (reason, bytes, the base's)."""
    return _unique((name, (why, data, base)) for cases in INVALID_WITH_BASE for name, why, data, base in cases())


def _unique(pairs: Iterator[tuple[str, T]]) -> dict[str, T]:
    found: dict[str, T] = {}
    for name, value in pairs:
        assert name not in found, f"two vectors are called {name}"
        found[name] = value
    return found


def to_json(value: object, indent: str = "") -> str:
    """JSON with a line for each entry of an object; lists of numbers stay on one."""
    deeper = indent + "  "
    if isinstance(value, dict) and value:
        lines = [f"{deeper}{json.dumps(key)}: {to_json(entry, deeper)}" for key, entry in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, list) and value:
        return "[" + ", ".join(to_json(entry, indent) for entry in value) + "]"
    return json.dumps(value)


def corpus() -> dict[str, bytes]:
    """Path below `vectors` -> bytes."""
    files: dict[str, bytes] = {}
    for name, file in sorted(valid_files().items()):
        files[f"valid/{name}.shd"] = build(file).data
        files[f"valid/{name}.json"] = (to_json(file.expected()) + "\n").encode()
    refused = dict(sorted(invalid_files().items()))
    files |= {f"invalid/{name}.shd": data for name, (_, data) in refused.items()}
    reasons = {name: reason for name, (reason, _) in refused.items()}
    files["invalid/reasons.json"] = (to_json(reasons) + "\n").encode()
    for name, file in sorted(valid_files_with_base().items()):
        files[f"with_base/{name}.shd"] = build(file).data
        files[f"with_base/{name}.base"] = file.base
        files[f"with_base/{name}.json"] = (to_json(file.expected()) + "\n").encode()
    refused_with_base = dict(sorted(invalid_files_with_base().items()))
    for name, (_, data, base) in refused_with_base.items():
        assert f"with_base/{name}.shd" not in files, f"two vectors are called {name}"
        files |= {f"with_base/{name}.shd": data, f"with_base/{name}.base": base}
    reasons = {name: reason for name, (reason, *_) in refused_with_base.items()}
    files["with_base/reasons.json"] = (to_json(reasons) + "\n").encode()
    return files


def differences(files: Mapping[str, bytes], folder: Path) -> list[str]:
    """A line for each file that is not as it should be."""
    there = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.glob("*/*")}
    return [
        *(f"{path}: missing" for path in files.keys() - there.keys()),
        *(f"{path}: not made by this script" for path in there.keys() - files.keys()),
        *(f"{path}: differs" for path in files.keys() & there.keys() if files[path] != there[path]),
    ]


def write(files: Mapping[str, bytes], folder: Path) -> None:
    """Makes the folder's files these and no others."""
    for path in folder.glob("*/*"):
        if path.relative_to(folder).as_posix() not in files:
            path.unlink()
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def main(arguments: Sequence[str]) -> int:
    """The command line; the exit code."""
    parser = argparse.ArgumentParser(description="Makes the conformance vectors.")
    parser.add_argument("--check", action="store_true", help="compare with the files there; write nothing")
    files = corpus()
    if parser.parse_args(arguments).check:
        problems = sorted(differences(files, VECTORS))
        print("\n".join(problems) or f"{len(files)} files are as they should be")
        return 1 if problems else 0
    write(files, VECTORS)
    print(f"{len(files)} files, {sum(map(len, files.values())):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
