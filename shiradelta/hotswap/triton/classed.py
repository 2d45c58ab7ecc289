"""The base's elements in tiles, and the group of each: the table of kernels, and what they read (FORMAT.md, 4.7).

Elements of a tile are in groups, and a group of a tile is a cell.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from shiradelta.format.codecs.base_classes import KEYS
from shiradelta.hotswap.triton.elements import pointer
from shiradelta.hotswap.triton.positions import INT32, UINT8

#: Elements of a program; of a strip, which counts are of; of a part of a strip, which a thread counts, in 8 bits for a
#: group; and of a row of a part, in 4 bits.
BLOCK, STRIP, PART = 4096, 1024, 32
ROW = tl.constexpr(8)
#: Groups whose counts of parts are together.
TOGETHER = tl.constexpr(8)
#: Elements and bytes of which sizes and addresses of tiles mostly are multiples; a kernel for these is faster.
ALIGNMENT = tl.constexpr(16)
ALL_KEYS = tl.constexpr(KEYS)

#: The columns of a tile's row, all int64.
COLUMNS = (
    "base",  # address of its first element
    "size",  # elements
    "program",  # number of the program of its first block
    "strips",  # how many it has
    "counts",  # number of its first count
    "groups",  # how many there are
    "cell",  # number of its first cell: a cell is a group of a tile
    "parts",  # number of the parts of its first strip
    "start",  # number of its first element
    "position",  # of its first element, in the tensor
    "buckets",  # address of the buckets of keys, which tell classes; without lines, groups
    "ones",  # address of int64 [16 groups, buckets]: a one in the place of the group; 0 if there are lines or cuts
    "cells",  # with lines: address of the group of each class of row, of column and of element
    "class_count",
    "column_classes",
    "columns",
    "row",  # its first one
    "row_fields",  # address of the classes of the tensor's rows, in words
    "row_width",  # bits of each
    "column_fields",
    "column_width",
    "turned",  # address of a byte for each group: 1 where what is listed is no nonzero
)
(
    AT_BASE,
    AT_SIZE,
    AT_PROGRAM,
    AT_STRIPS,
    AT_COUNTS,
    AT_GROUPS,
    AT_CELL,
    AT_PARTS,
    AT_START,
    AT_POSITION,
    AT_BUCKETS,
    AT_ONES,
    AT_CELLS,
    AT_CLASS_COUNT,
    AT_COLUMN_CLASSES,
    AT_COLUMNS,
    AT_ROW,
    AT_ROW_FIELDS,
    AT_ROW_WIDTH,
    AT_COLUMN_FIELDS,
    AT_COLUMN_WIDTH,
    AT_TURNED,
) = map(tl.constexpr, range(len(COLUMNS)))
WIDTH = tl.constexpr(len(COLUMNS))


@triton.jit
def block_of(tiles, tile_of, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """(row of its tile, its number in the tile, the first of its elements in the tile, how many the tile has)."""
    row = tiles + tl.load(tile_of + tl.program_id(0)).to(tl.int64) * WIDTH
    block, size = tl.program_id(0) - tl.load(row + AT_PROGRAM).to(tl.int32), tl.load(row + AT_SIZE).to(tl.int32)
    if ALIGNED:  # so that a thread has the elements of a row
        size = tl.multiple_of(size, ALIGNMENT)
    return row, block, block * BLOCK, size


@triton.jit
def field_of(row, fields, width, number, inside):
    """The class of each line, from fields of a width."""
    bits = tl.load(row + width)
    at = number.to(tl.int64) * bits
    word = tl.load(row + fields).to(INT32) + (at >> 5)
    low = tl.load(word, mask=inside, other=0).to(tl.int64) & 0xFFFFFFFF
    high = tl.load(word + 1, mask=inside & ((at & 31) + bits > 32), other=0).to(tl.int64)
    return (((low | (high << 32)) >> (at & 31)) & ((1 << bits) - 1)).to(tl.int32)


@triton.jit
def element_of(row, within, inside, SIZE: tl.constexpr, ALIGNED: tl.constexpr):
    """The bits of elements."""
    base = pointer(tl.load(row + AT_BASE), SIZE)
    if ALIGNED == 1:
        base = tl.multiple_of(base, ALIGNMENT)
    if ALIGNED == 2:  # a row for each line of elements
        base = tl.multiple_of(base, (ALIGNMENT, ALIGNMENT))
    return tl.load(base + within, mask=inside, other=0)


@triton.jit
def key_of(row, within, inside, SIZE: tl.constexpr, ALIGNED: tl.constexpr):
    """The key of each element."""
    top: tl.constexpr = 8 * SIZE - 16 if SIZE > 2 else 0
    keys: tl.constexpr = 0x7FFF if SIZE > 1 else 0x7F
    return (element_of(row, within, inside, SIZE, ALIGNED) >> top).to(tl.int32) & keys


@triton.jit
def group_of(
    row, within, inside, shift, SIZE: tl.constexpr, LINES: tl.constexpr, ONES: tl.constexpr, ALIGNED: tl.constexpr
):
    """The group of each element, 255 where there is none; `shift` is that of `Buckets`."""
    key = key_of(row, within, inside, SIZE, ALIGNED)
    bucket = tl.load(tl.load(row + AT_BUCKETS).to(INT32) + (key >> shift), mask=inside, other=-1)
    group = (bucket if ONES else tl.where(key < (bucket >> 16), bucket, bucket >> 8)) & 0xFF
    if LINES:
        columns = tl.load(row + AT_COLUMNS).to(tl.int32)
        line = tl.load(row + AT_ROW) + within // columns
        of_row = field_of(row, AT_ROW_FIELDS, AT_ROW_WIDTH, line, inside)
        of_column = field_of(row, AT_COLUMN_FIELDS, AT_COLUMN_WIDTH, within % columns, inside)
        cell = of_row * tl.load(row + AT_COLUMN_CLASSES).to(tl.int32) + of_column
        cell = cell * tl.load(row + AT_CLASS_COUNT).to(tl.int32) + group
        group = tl.load(tl.load(row + AT_CELLS).to(UINT8) + cell, mask=inside, other=255).to(tl.int32)
    return group
