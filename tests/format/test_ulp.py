"""The operation ULP: elements move along the order of their dtype, exactly (FORMAT.md, 5.1 and 6.1)."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import shiradelta as sd
from shiradelta.errors import DeltaError, FormatError
from shiradelta.format import arithmetic
from shiradelta.format.codecs import ULP
from shiradelta.format.codecs.ulp import BLOCK
from shiradelta.format.registry import DTYPE_OF_NAME, ORDERED, Order
from tests import reference

dtypes = pytest.mark.parametrize("dtype", ORDERED)
NUMBERS = {"float32": np.float32, "float16": np.float16, "float64": np.float64}


@dtypes
def test_the_order_of_a_dtype_is_one_to_one_and_its_own_inverse(dtype):
    size = DTYPE_OF_NAME[dtype].size
    step = max(1, (1 << 8 * size) // 65536)
    bits = np.arange(65536 if size > 1 else 256, dtype=np.uint64) * np.uint64(step)
    bits = bits.astype(f"<u{size}")
    order = arithmetic.ordered(bits, dtype)
    assert np.unique(order).size == bits.size
    assert np.array_equal(arithmetic.ordered(order.view(bits.dtype), dtype).view(bits.dtype), bits)
    assert [int(x) for x in order[:300]] == [reference.decoder.ordered(int(x), dtype) for x in bits[:300]]


@pytest.mark.parametrize("dtype", NUMBERS)
def test_the_order_grows_with_the_element(dtype):
    numbers = np.array([-np.inf, -2.5, -1e-5, -0.0, 0.0, 1e-5, 2.5, np.inf], NUMBERS[dtype])
    order = arithmetic.ordered(numbers.view(f"<u{numbers.itemsize}"), dtype)
    assert np.all(np.diff(order.astype(object)) > 0)
    assert order[4] - order[3] == 1


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(dtype, marks=[] if dtype in ("float32", "bfloat16", "int8", "uint64") else pytest.mark.slow)
        for dtype in ORDERED
    ],
)
@given(seed=st.integers(0, 2**32))
def test_any_two_elements_are_a_shift_apart_or_too_far(dtype, seed):
    size = DTYPE_OF_NAME[dtype].size
    old, new = np.random.default_rng(seed).integers(0, 256, (2, 40 * size), np.uint8).view(f"<u{size}")
    for a, b in zip(old[:, None], new[:, None], strict=True):
        shifts = arithmetic.shifts_between(a, b, dtype)
        distance = int(arithmetic.ordered(b, dtype)[0]) - int(arithmetic.ordered(a, dtype)[0])
        if abs(distance) < 1 << (8 * size - 1):
            assert int(shifts[0]) == distance
            assert np.array_equal(arithmetic.shift(a, dtype, shifts), b)
        else:
            assert shifts is None


@dtypes
def test_leaving_the_range_is_refused(dtype):
    size = DTYPE_OF_NAME[dtype].size
    ends = {Order.SIGNED: ((1 << 8 * size - 1) - 1, 1 << 8 * size - 1), Order.UNSIGNED: ((1 << 8 * size) - 1, 0)}
    top, bottom = ends.get(ORDERED[dtype], ((1 << 8 * size - 1) - 1, (1 << 8 * size) - 1))
    for bits, by in (top, 1), (bottom, -1):
        with pytest.raises(DeltaError, match="leave the range of its dtype; give the base"):
            arithmetic.shift(np.array([0, bits], f"<u{size}"), dtype, np.array([0, by], f"<i{size}"))
        arithmetic.shift(np.array([bits], f"<u{size}"), dtype, np.array([-by], f"<i{size}"))


def test_a_dtype_without_an_order_is_refused():
    with pytest.raises(DeltaError, match=r"complex64.*no order.*use set"):
        sd.TensorDelta((2,), [0], [1], "complex64", "ulp")
    with pytest.raises(DeltaError, match=r"complex64.*no order"):
        arithmetic.ordered(np.zeros(1, np.uint64), "complex64")


@pytest.mark.parametrize(
    ("values", "why"),
    [([1.0], "whole numbers"), ([0], "a shift is 0"), ([-32768], "beyond 32767"), ([40000], "beyond 32767")],
)
def test_what_is_no_shift_is_refused(values, why):
    with pytest.raises(DeltaError, match=why):
        sd.TensorDelta((2,), [0], values, "bfloat16", "ulp")


def shifts_of(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    most = (1 << 8 * size - 1) - 1
    magnitudes = np.minimum(rng.geometric(0.85, count), most)
    few = rng.random(count) < 0.01
    magnitudes[few] = np.minimum(2.0 ** rng.uniform(0, 8 * size - 1, few.sum()), most).astype(np.int64)
    magnitudes = np.clip(magnitudes, 1, most)
    return (magnitudes * rng.choice([-1, 1], count)).astype(f"<i{size}").view(f"<u{size}")


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("count", [1, BLOCK - 1, BLOCK, 2 * BLOCK + 5])
def test_blocks_decode_by_themselves(size, count):
    rng = np.random.default_rng(count)
    shifts = shifts_of(rng, count, size)
    section = np.frombuffer(ULP.encode(shifts), np.uint8)
    ULP.check(section, count, size)
    assert ULP.encoded_size(shifts) == ULP.encoded_size(shifts, enough=section.size - 1) == section.size
    assert section.size <= ULP.encoded_size(shifts, enough=1 << 40) < 1 << 40
    for start, stop in ((0, count), (count // 3, count // 2), (count - 1, count)):
        assert np.array_equal(ULP.decode(section, count, size, start, stop), shifts[start:stop])


@given(seed=st.integers(0, 2**32), bits=st.integers(1, 4))
def test_a_changed_section_is_refused_or_decodes_to_what_is_written_as_it_is(seed, bits):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 300))
    section = np.frombuffer(ULP.encode(shifts_of(rng, count, 2)), np.uint8).copy()
    for at in rng.integers(0, section.size, bits):
        section[at] ^= 1 << rng.integers(8)
    with suppress(FormatError):
        ULP.check(section, count, 2)
        found = ULP.decode(section, count, 2, 0, count)
        again = np.frombuffer(ULP.encode(found), np.uint8)
        assert again.size <= section.size
        assert np.array_equal(ULP.decode(again, count, 2, 0, count), found)


def test_a_file_of_it_is_of_minor_1_and_tells_the_result(tmp_path: Path):
    base = np.array([0x3F80, 0x8000, 0xFF80], np.uint16)
    delta = sd.TensorDelta((4,), [0, 1, 3], [-1, 1, 2], "bfloat16", "ulp", base_bits=base)
    sd.save_delta(tmp_path / "x.shd", {"w": delta})
    with sd.open_delta(tmp_path / "x.shd") as opened:
        opened.verify()
        assert opened.version == "1.1"
        result = np.array([0x3F7F, 0x0000, 0xFF7E], np.uint16)
        assert opened["w"].result_fingerprint == arithmetic.fingerprint(np.array([0, 1, 3]), result)
        assert opened["w"].payload().tolist() == [-1, 1, 2]
        with pytest.raises(DeltaError, match=r"ulp has no values; read its bits\(\)"):
            opened["w"].values()


def test_a_base_that_would_leave_the_range_is_refused_when_it_is_written(tmp_path: Path):
    base = np.array([0x7FFF], np.uint16)
    delta = sd.TensorDelta((4,), [0], [1], "bfloat16", "ulp", base_bits=base)
    with pytest.raises(DeltaError, match="range of its dtype"):
        sd.save_delta(tmp_path / "x.shd", {"w": delta})
    assert not (tmp_path / "x.shd").exists()
