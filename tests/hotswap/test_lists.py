"""What sections list, read for many tensors at once, against the codecs: the same numbers, or none."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from shiradelta.errors import FormatError
from shiradelta.format.codecs import FROM_BASE, ULP_FROM_BASE
from shiradelta.format.codecs.from_base import grid_and_gaps
from shiradelta.hotswap.heads import ClassedSections, TiledSections
from shiradelta.hotswap.lists_there import BlockLists, TileLists
from shiradelta.hotswap.pool import Pool
from shiradelta.util.arrays import exclusive

SHAPES = [(64, 64), (300, 700), (1, 5000), (40, 2000), (2000, 40)]


def bases() -> Iterator[tuple[np.ndarray, np.ndarray, tuple[int, int]]]:
    """(base, positions, shape) of some tensors."""
    rng = np.random.default_rng(0)
    for shape in SHAPES:
        numel = shape[0] * shape[1]
        base = (0.02 * rng.standard_normal(numel)).astype(np.float32).view(np.uint32) >> 16
        rates = 0.02 * np.exp(rng.normal(0, 1, shape)).ravel()
        yield base.astype(np.uint16), np.flatnonzero(rng.random(numel) < rates), shape


def tiled_sections() -> list[tuple[np.ndarray, int]]:
    return [(np.frombuffer(FROM_BASE.encode_on(at, shape, base), np.uint8), base.size) for base, at, shape in bases()]


def classed_sections() -> list[tuple[np.ndarray, int, np.ndarray]]:
    rng, found = np.random.default_rng(1), []
    for base, at, _ in bases():
        shifts = rng.choice([-1, 1, 2, -7], at.size, p=[0.4, 0.4, 0.1, 0.1]).astype(np.int16).view(np.uint16)
        found.append((np.frombuffer(ULP_FROM_BASE.encode_on(shifts, base[at]), np.uint8), at.size, base[at]))
    return found


def tile_lists(sections: list[np.ndarray], numels: list[int]) -> TileLists | None:
    sizes = np.array([section.size for section in sections])
    heads = TiledSections.of(*Pool.of(sections), sizes, np.array(numels))
    return heads and TileLists.of(heads, torch.from_numpy(np.concatenate(sections)), exclusive(sizes))


def counts_of(section: np.ndarray, numel: int) -> list[int]:
    """How many elements each group of each tile lists, as the codec reads it.  Raises FormatError."""
    grid, gaps = grid_and_gaps(section, numel)
    counts = np.zeros((grid.tiles, grid.numbers.size), np.int64)
    counts[:, gaps.groups] = gaps.counts
    return counts.ravel().tolist()


def damaged(section: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The section with some bytes changed, mostly of its head, and perhaps of another size."""
    found = section.copy()
    for _ in range(rng.integers(1, 4)):
        at = rng.integers(min(found.size, 64) if rng.random() < 0.7 else found.size)
        found[at] = rng.integers(256) if rng.random() < 0.5 else found[at] ^ (1 << rng.integers(8))
    if rng.random() < 0.1:
        found = found[: max(32, rng.integers(found.size) // 4 * 4)]
    if rng.random() < 0.1:
        found = np.concatenate((found, np.zeros(4 * rng.integers(1, 5), np.uint8)))
    return found.copy()


def test_tiles_of_several_sections_list_what_the_codec_reads():
    sections, numels = zip(*tiled_sections(), strict=True)
    lists = tile_lists(list(sections), list(numels))
    assert lists is not None
    assert lists.sound
    right = [count for each in zip(sections, numels, strict=True) for count in counts_of(*each)]
    assert lists.cell_counts.tolist() == right
    assert lists.counts.sum() == sum(right)
    assert lists.bits.sum() > 0


def test_damaged_tiles_list_the_same_or_are_not_sound():
    rng, made, sound, unsound = np.random.default_rng(2), tiled_sections(), 0, 0
    for _ in range(1500):
        section, numel = made[rng.integers(len(made))]
        section = damaged(section, rng)
        lists = tile_lists([section], [numel])
        try:
            right = counts_of(section, numel)
        except FormatError:
            right = None
        if lists is not None and lists.sound:
            assert lists.cell_counts.tolist() == right
            sound += 1
        else:
            unsound += lists is not None
    assert sound > 100
    assert unsound > 10


@pytest.mark.parametrize("together", [False, True])
def test_blocks_list_the_shifts_that_are_not_one(together: bool):
    made = classed_sections()
    for some in [made] if together else [[one] for one in made]:
        sections, counts, _ = (list(each) for each in zip(*some, strict=True))
        sizes = np.array([section.size for section in sections])
        heads = ClassedSections.of(*Pool.of(sections), sizes, np.array(counts))
        assert heads is not None
        lists = BlockLists.of(heads, torch.from_numpy(np.concatenate(sections)), exclusive(sizes))
        magnitudes = [ULP_FROM_BASE.decode_on(section, count, 2, base).view(np.int16) for section, count, base in some]
        assert lists.sound
        assert lists.counts.sum() == sum(np.count_nonzero(np.abs(each) != 1) for each in magnitudes)


def test_damaged_blocks_raise_nothing():
    """That shifts of damaged sections are refused is tested where they are decoded."""
    rng, made, read, sound = np.random.default_rng(3), classed_sections(), 0, 0
    for _ in range(1500):
        section, count, _ = made[rng.integers(len(made))]
        section = damaged(section, rng)
        heads = ClassedSections.of(*Pool.of([section]), np.array([section.size]), np.array([count]))
        if heads is not None:
            read += 1
            sound += bool(BlockLists.of(heads, torch.from_numpy(section), np.zeros(1, np.int64)).sound)
    assert 0 < sound < read
