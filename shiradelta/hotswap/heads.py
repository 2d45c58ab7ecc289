"""Heads of sections of FROM_BASE and ULP_FROM_BASE of many tensors, taken apart at once (FORMAT.md, 4.7 and 5.2).

What sections say of each of their tiles and blocks is left to the device (`lists_there`).
None is returned where anything is wrong, or so unusual that it is not read in this way.  The codecs tell which.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shiradelta.format import registry
from shiradelta.format.arithmetic import Positions
from shiradelta.format.codecs.ulp_stream import MOST_J, MOST_K
from shiradelta.hotswap.pool import Pool, padded, words_of
from shiradelta.util.arrays import exclusive, within

#: Beyond some tiles, they have at least so many elements on the whole, so that what is made of each takes little.
_FEW, _TILE = 64, 1 << 16
_SLACK_BITS = 8 * registry.SLACK
_MOST_THRESHOLDS = registry.MAX_BASE_CLASSES - 1


class TiledSections(NamedTuple):
    """Sections of FROM_BASE.  Offsets are bytes from the section's start; all numbers are int64.

    Attributes:
        row_bits: [tensors], of a class of rows.
        column_bits: [tensors].
        classes: [tensors], of elements.
        tile_rows: [tensors].
        columns: [tensors].
        tiles: [tensors].
        thresholds: int32 [tensors, 15]; those that a tensor does not have are above all keys.
        cells: uint8, the group of each class of row, column and element, of one tensor after the other.
        cell_counts: [tensors], how many of `cells` each tensor has.
        groups: [tensors], how many groups there are.
        ks: [all groups], of one tensor after the other.
        turned: bool [all groups].
        row_at: [tensors], where classes of rows are.
        column_at: [tensors].
        part_at: [all parts], of one tensor after the other: where the tiles' unary sizes are, then their counts of each
            group.
        part_width: [all parts], bits of a field.
        low_at: [tensors].
        unary_at: [tensors].
        unary_total: [tensors], all unary bits.
    """

    row_bits: Positions
    column_bits: Positions
    classes: Positions
    tile_rows: Positions
    columns: Positions
    tiles: Positions
    thresholds: npt.NDArray[np.int32]
    cells: npt.NDArray[np.uint8]
    cell_counts: Positions
    groups: Positions
    ks: Positions
    turned: npt.NDArray[np.bool_]
    row_at: Positions
    column_at: Positions
    part_at: Positions
    part_width: Positions
    low_at: Positions
    unary_at: Positions
    unary_total: Positions

    @classmethod
    def of(cls, pool: Pool, starts: Positions, sizes: Positions, numels: Positions) -> TiledSections | None:
        """Those that start there in a pool."""
        head = pool.rows(starts, registry.FROM_BASE_HEAD.size)
        row_bits, column_bits, classes, reserved = head[:, :4].T.astype(np.int64)
        tile_rows = head[:, 4:8].copy().view("<u4")[:, 0].astype(np.int64)
        columns, unary_total = head[:, 8:].copy().view("<u8").T
        fits = (np.maximum(row_bits, column_bits) <= registry.MAX_CLASS_BITS) & (reserved == 0) & (tile_rows > 0)
        fits &= sizes % 4 == 0
        fits &= (classes > 0) & (classes <= registry.MAX_BASE_CLASSES)
        fits &= (columns > 0) & (columns <= registry.MAX_BASE_TILE) & (unary_total <= 8 * sizes.astype(np.uint64))
        if not fits.all():
            return None
        columns, unary_total = columns.astype(np.int64), unary_total.astype(np.int64)
        rows = numels // columns
        fits = (numels % columns == 0) & (tile_rows <= rows) & (tile_rows * columns <= registry.MAX_BASE_TILE)
        tiles = -(-rows // tile_rows)
        if not np.all(fits & ((tiles - _FEW) * _TILE <= numels)):
            return None
        at = starts + registry.FROM_BASE_HEAD.size
        thresholds, sound = _thresholds(pool, at, classes)
        at = at + padded(2 * (classes - 1))
        cell_counts = classes << (row_bits + column_bits)
        table = pool.numbers(at, cell_counts)
        sound &= not np.any(table & 0x60) and pool.are_zero(8 * (at + cell_counts), 8 * (at + padded(cell_counts)))
        at = at + padded(cell_counts)
        tensor = np.repeat(np.arange(starts.size), cell_counts)
        used = np.zeros((starts.size, 256), np.bool_)
        used[tensor, table] = True
        groups, number = used.sum(1), np.cumsum(used, axis=1) - 1
        kinds = np.nonzero(used)[1]
        widths = pool.numbers(at, 1 + groups).astype(np.int64)
        sound &= not np.any(widths > registry.MAX_BASE_TILE_FIELD)
        sound &= pool.are_zero(8 * (at + 1 + groups), 8 * (at + padded(1 + groups)))
        if not sound:
            return None
        row_at = at + padded(1 + groups)
        column_at = row_at + words_of(rows * row_bits)
        at = column_at + words_of(columns * column_bits)
        sound &= _ends(pool, row_at, rows * row_bits) and _ends(pool, column_at, columns * column_bits)
        # Each tensor has a part of sizes, and one of counts for each group.
        of_part = np.repeat(np.arange(starts.size), 1 + groups)
        bits = tiles[of_part] * widths
        before = exclusive(words_of(bits))
        part_at = at[of_part] + before - before[exclusive(1 + groups)][of_part]
        sound &= _ends(pool, part_at, bits)
        low_at = at + np.bincount(of_part, words_of(bits), starts.size).astype(np.int64)
        end = starts + sizes - registry.SLACK
        unary_at = end - words_of(unary_total)
        sound &= not np.any(unary_at < low_at) and _ends(pool, unary_at, unary_total)
        if not (sound and pool.are_zero(8 * end, 8 * end + _SLACK_BITS)):
            return None
        ks = (kinds & (registry.TURNED - 1)).astype(np.int64)
        return cls(
            row_bits,
            column_bits,
            classes,
            tile_rows,
            columns,
            tiles,
            thresholds,
            number[tensor, table].astype(np.uint8),
            cell_counts,
            groups,
            ks,
            kinds >= registry.TURNED,
            row_at - starts,
            column_at - starts,
            part_at - starts[of_part],
            widths,
            low_at - starts,
            unary_at - starts,
            unary_total,
        )


class ClassedSections(NamedTuple):
    """Sections of ULP_FROM_BASE.  Offsets are bytes from the section's start; all numbers are int64.

    Attributes:
        counts: [tensors], nonzeros.
        blocks: [tensors].
        classes: [tensors].
        thresholds: int32 [tensors, 15]; those that a tensor does not have are above all keys.
        ks: [all classes], of one tensor after the other.
        js: [all classes].
        list_at: [all classes], where the blocks' counts of what is listed are.
        list_width: [tensors], bits of a count.
        directory_at: [tensors].
        bits: [tensors], of the stream.
        signs_at: [tensors].
        stream_at: [tensors].
        stream_size: [tensors], bytes of whole words.
    """

    counts: Positions
    blocks: Positions
    classes: Positions
    thresholds: npt.NDArray[np.int32]
    ks: Positions
    js: Positions
    list_at: Positions
    list_width: Positions
    directory_at: Positions
    bits: Positions
    signs_at: Positions
    stream_at: Positions
    stream_size: Positions

    @classmethod
    def of(cls, pool: Pool, starts: Positions, sizes: Positions, counts: Positions) -> ClassedSections | None:
        """Those that start there in a pool, of tensors with so many nonzeros, at least one."""
        head = pool.rows(starts, registry.ULP_FROM_BASE_HEAD.size)
        classes, width = head[:, :2].T.astype(np.int64)
        bits = head[:, 8:].copy().view("<u8")[:, 0]
        fits = (classes > 0) & (classes <= registry.MAX_BASE_CLASSES) & (width <= registry.ULP_BLOCK.bit_length())
        fits &= (head[:, 2:8] == 0).all(1) & (bits <= 8 * sizes.astype(np.uint64)) & (bits <= 0xFFFFFFFF)
        if not fits.all():
            return None
        bits, blocks = bits.astype(np.int64), -(-counts // registry.ULP_BLOCK)
        at = starts + registry.ULP_FROM_BASE_HEAD.size
        thresholds, sound = _thresholds(pool, at, classes)
        at = at + padded(2 * (classes - 1))
        ks, js = pool.numbers(at, 2 * classes).reshape(-1, 2).T.astype(np.int64)
        sound &= not (np.any(ks > MOST_K) or np.any(js > MOST_J))
        sound &= pool.are_zero(8 * (at + 2 * classes), 8 * (at + padded(2 * classes)))
        at = at + padded(2 * classes)
        part_size = words_of(blocks * width)
        directory_at = at + classes * part_size
        signs_at = directory_at + 4 * blocks
        stream_at = signs_at + words_of(counts)
        end = stream_at + words_of(bits)
        if not (sound and np.array_equal(end + registry.SLACK, starts + sizes)):
            return None
        of_part = np.repeat(np.arange(starts.size), classes)
        part_at = at[of_part] + within(classes) * part_size[of_part]
        sound &= _ends(pool, part_at, (blocks * width)[of_part])
        sound &= _ends(pool, signs_at, counts) and _ends(pool, stream_at, bits)
        if not (sound and pool.are_zero(8 * end, 8 * end + _SLACK_BITS)):
            return None
        offsets = directory_at - starts, bits, signs_at - starts, stream_at - starts, words_of(bits)
        return cls(counts, blocks, classes, thresholds, ks, js, part_at - starts[of_part], width, *offsets)


def _thresholds(pool: Pool, at: Positions, classes: Positions) -> tuple[npt.NDArray[np.int32], bool]:
    """(those of each tensor, whether they do not decrease and are padded with zeros)."""
    found = pool.rows(at, 2 * _MOST_THRESHOLDS).view("<u2").astype(np.int32)
    numbers, count = np.arange(_MOST_THRESHOLDS), classes[:, None] - 1
    is_padding = (numbers == count) & (count % 2 == 1)
    sound = not found[is_padding].any()
    found = np.where(numbers < count, found, 1 << 16).astype(np.int32)
    return found, sound and not np.any(found[:, 1:] < found[:, :-1])


def _ends(pool: Pool, at: Positions, bits: Positions) -> bool:
    """Whether the last word of each part has no unused bits that are set."""
    return pool.are_zero(8 * at + bits, 8 * (at + words_of(bits)))
