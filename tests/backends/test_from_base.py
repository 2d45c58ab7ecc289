"""FROM_BASE and ULP_FROM_BASE under libshd: the same bytes, positions, shifts and reasons as the NumPy reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from shiradelta.backends.libshd.backend import backend
from shiradelta.backends.libshd.from_base import NativeFromBase, NativeUlpFromBase
from shiradelta.errors import FormatError, ShiraDeltaError
from shiradelta.format.arithmetic import Array
from shiradelta.format.codecs import FROM_BASE, ULP_FROM_BASE
from shiradelta.format.codecs.from_base_classes import BaseCounts, BaseGrid, choose
from shiradelta.format.registry import MAX_BASE_TILE, ULP_BLOCK, IndexId, ValueId

try:
    backend()
except ShiraDeltaError as error:
    pytest.skip(str(error), allow_module_level=True)

NATIVE, NATIVE_ULP = NativeFromBase(), NativeUlpFromBase()
COUNTS = BaseCounts()


def test_the_backend_has_them():
    assert type(backend().index_codecs[IndexId.FROM_BASE]) is NativeFromBase
    assert type(backend().value_codecs[ValueId.ULP_FROM_BASE]) is NativeUlpFromBase


sizes = pytest.mark.parametrize("size", [1, 2, 4, 8])


def weights(rng: np.random.Generator, count: int, size: int) -> Array:
    """Bits of weights that are about normal, or any, or all the same."""
    kind = rng.integers(4)
    if kind == 0:
        return rng.integers(0, 256, count * size, np.uint8).view(f"<u{size}")
    if kind == 1:
        return np.zeros(count, f"<u{size}")
    upper = (rng.standard_normal(count) * 0.02).astype("<f4").view("<u4") >> np.uint32(16 if size > 1 else 20)
    return upper.astype(f"<u{size}") << np.array(max(8 * size - 16, 0), f"<u{size}")


def changed(rng: np.random.Generator, base: Array, shape: tuple[int, int]) -> Array:
    """Positions, more of them among small or large weights, and in some rows and columns."""
    order = base.argsort().argsort().reshape(shape) / base.size
    share = rng.choice([0.01, 0.1, 0.6, 1.5]) * (order if rng.integers(2) else 1 - order)
    if rng.integers(2):
        share = share * np.exp(rng.standard_normal((shape[0], 1))) * np.exp(rng.standard_normal((1, shape[1])))
    listed = rng.random(shape) < share
    listed.reshape(-1)[rng.integers(base.size)] = True
    return np.flatnonzero(listed)


def damaged(rng: np.random.Generator, section: bytes, head: int) -> Array:
    """A section with some other bits, mostly at its beginning, or of another size."""
    data = np.frombuffer(section, np.uint8).copy()
    for _ in range(rng.integers(1, 4)):
        data[rng.integers(rng.choice([min(head, data.size), data.size]))] ^= 1 << rng.integers(8)
    if rng.integers(8) == 0:
        data = np.append(data, np.zeros(4, np.uint8))
    return data


def result_of(decode: Callable[..., Array], *arguments: Any) -> list[int] | str:
    try:
        return decode(*arguments).tolist()
    except FormatError as error:
        return error.reason


@sizes
def test_sections_are_the_same_bytes_and_read_alike_whatever_they_hold(size: int):
    rng, seen = np.random.default_rng(size), set()
    for _ in range(8):
        shape = int(rng.integers(1, 50)), int(rng.integers(1, 200))
        base = weights(rng, shape[0] * shape[1], size)
        positions = changed(rng, base, shape)
        section = FROM_BASE.encode_on(positions, shape, base)
        assert section is not None
        assert NATIVE.encode_on(positions, shape, base) == section
        for _ in range(10):
            data = damaged(rng, section, 80) if rng.integers(8) else np.frombuffer(section, np.uint8)
            nnz = max(positions.size + int(rng.integers(-1, 2)) * int(rng.integers(8) == 0), 1)
            found = result_of(FROM_BASE.decode_on, data, nnz, shape, base)
            assert result_of(NATIVE.decode_on, data, nnz, shape, base) == found
            seen.add(found if isinstance(found, str) else "")
    assert seen >= {"bad_index", "bad_size", "wrong_base"}


@sizes
@pytest.mark.parametrize("bits", [(0, 0), (1, 0), (0, 1), (2, 4)])
def test_tiles_of_any_classes_are_the_same(size: int, bits: tuple[int, int]):
    """Several tiles, so that each starts within a byte of the streams; with and without rows of whole words."""
    rng = np.random.default_rng(3)
    for columns in (1024, 1000):
        shape = MAX_BASE_TILE // columns // 32 + 3, columns
        base = weights(rng, shape[0] * columns, size)
        thresholds = np.sort(rng.integers(0, 1 << min(8 * size - 1, 15), 5)).astype(np.uint16)
        groups = rng.integers(0, 9, (1 << bits[0], 1 << bits[1], 6), np.uint8) | np.uint8(128) * rng.integers(
            0, 2, (1 << bits[0], 1 << bits[1], 6), np.uint8
        )
        lines = [rng.integers(0, 1 << each, count, np.uint8) for each, count in zip(bits, shape, strict=True)]
        grid = BaseGrid(columns, shape[0] // 2, lines[0], bits[0], lines[1], bits[1], thresholds, groups)
        positions = np.flatnonzero(rng.random(base.size) < 0.05)
        section = FROM_BASE.encode_in(positions, grid, base)
        assert NATIVE.encode_in(positions, grid, base) == section
        found = NATIVE.decode_on(np.frombuffer(section, np.uint8), positions.size, shape, base)
        assert np.array_equal(found, positions)


@sizes
def test_classes_are_chosen_alike(size: int):
    rng = np.random.default_rng(4)
    shape = 300, 130
    base = weights(rng, shape[0] * shape[1], size)
    thresholds = np.array([3, 3, 60, 0x3C00], np.uint16)
    lines = rng.integers(0, 4, shape[0], np.uint8), rng.integers(0, 4, shape[1], np.uint8)
    assert np.array_equal(NATIVE.counts.of_keys(base), COUNTS.of_keys(base))
    for found, right in zip(
        NATIVE.counts.of_lines(base, shape[1], thresholds), COUNTS.of_lines(base, shape[1], thresholds), strict=True
    ):
        assert np.array_equal(found, right)
    found, right = (counts.joint(base, thresholds, lines, 2) for counts in (NATIVE.counts, COUNTS))
    assert np.array_equal(found, right)
    assert choose(changed(rng, base, shape), shape, base, NATIVE.counts) is not None


@sizes
def test_shifts_are_read_alike_whatever_the_section_holds(size: int):
    rng, seen = np.random.default_rng(size), set()
    most = (1 << 8 * size - 1) - 1
    for nnz in (1, 7, 500, ULP_BLOCK, 2 * ULP_BLOCK + 5):
        base = weights(rng, nnz, size)
        magnitudes = np.minimum(rng.geometric(rng.choice([0.95, 0.5, 0.05]), nnz), most)
        shifts = (magnitudes * rng.choice([-1, 1], nnz)).astype(f"<i{size}").view(f"<u{size}")
        section = ULP_FROM_BASE.encode_on(shifts, base)
        found = NATIVE_ULP.decode_on(np.frombuffer(section, np.uint8), nnz, size, base)
        assert np.array_equal(found, shifts)
        for _ in range(12):
            data = damaged(rng, section, 120)
            other = np.roll(base, 1) if rng.integers(8) == 0 else base
            said = result_of(ULP_FROM_BASE.decode_on, data, nnz, size, other)
            assert result_of(NATIVE_ULP.decode_on, data, nnz, size, other) == said
            seen.add(said if isinstance(said, str) else "")
    assert seen >= {"bad_value", "bad_size"}
