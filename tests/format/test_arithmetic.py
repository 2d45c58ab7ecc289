"""The arithmetic of FORMAT.md, section 6, against exact rational numbers and against torch."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shiradelta.errors import DeltaError
from shiradelta.format import arithmetic

#: name -> (bits of the fraction, smallest exponent, largest exponent, NumPy's unsigned integer, the quiet NaN)
FLOATS = {
    "float32": (23, -126, 127, np.uint32, 0x7FC00000),
    "bfloat16": (7, -126, 127, np.uint16, 0x7FC0),
    "float16": (10, -14, 15, np.uint16, 0x7E00),
}
EDGES = [
    *(0.0, -0.0, 1.0, -1.0, 65504.0, 65519.99, 65520.0, -65520.0, 3.4028235e38, 3.3961775e38, 3.39e38),
    *(1.00390625, 1.01171875, 1.0048828125, 2.0**-24, 2.0**-25, 2.0**-25 * 1.01, 2.0**-133, 2.0**-134, 2.0**-149),
    *(2.0**-134 * 1.5, 2.0**-126, 2.0**-14, 6.1e-5, -1e-40, 0.1, -3.14159),
]

float32s = st.floats(width=32, allow_nan=False, allow_infinity=False)
dtypes = pytest.mark.parametrize("dtype", FLOATS)


def exact(bits: int, dtype: str) -> Fraction:
    """The number that a finite float's bits stand for."""
    fraction, least, _, kind, _ = FLOATS[dtype]
    width = 8 * kind().itemsize
    exponent = bits >> fraction & (1 << (width - 1 - fraction)) - 1
    significand = (bits & (1 << fraction) - 1) | (1 << fraction if exponent else 0)
    number = Fraction(significand) * Fraction(2) ** (max(exponent, 1) - 1 + least - fraction)
    return -number if bits >> (width - 1) else number


def nearest(number: Fraction, dtype: str, minus_zero: bool = False) -> int:
    """The bits of the float nearest to a number, ties to even, overflow to infinity."""
    fraction, least, largest, kind, _ = FLOATS[dtype]
    width = 8 * kind().itemsize
    sign = (number < 0 or (number == 0 and minus_zero)) << (width - 1)
    size, exponent = abs(number), least
    while exponent <= largest and size >= Fraction(2) ** (exponent + 1):
        exponent += 1
    steps = round(size / Fraction(2) ** (exponent - fraction))  # Python rounds a half to even
    # A carry runs into the exponent's bits, from a denormal to a normal number and into infinity too.
    bits = steps + ((exponent - least) << fraction)
    return sign | min(bits, (largest - least + 2) << fraction)


def bits_of(numbers: list[float]) -> list[int]:
    return np.array(numbers, np.float32).view(np.uint32).tolist()


def rounded(numbers: list[float], dtype: str) -> list[int]:
    return arithmetic.from_float32(np.array(numbers, np.float32), dtype).tolist()


@dtypes
def test_edges_are_rounded_to_nearest_even(dtype):
    expected = [nearest(exact(bits, "float32"), dtype, bits == 1 << 31) for bits in bits_of(EDGES)]
    assert rounded(EDGES, dtype) == expected


@dtypes
@given(number=float32s)
def test_any_number_is_rounded_to_nearest_even(dtype, number):
    (bits,) = bits_of([number])
    assert rounded([number], dtype) == [nearest(exact(bits, "float32"), dtype, bits == 1 << 31)]


@dtypes
def test_every_16_bit_float_and_its_neighbourhood_agree_with_torch(dtype):
    torch = pytest.importorskip("torch")
    upper = np.arange(1 << 16, dtype=np.uint32)
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x0FFF, 0x1000, 0x1001, 0x3000], np.uint32)
    numbers = ((upper[:, None] << 16) | low).reshape(-1).view(np.float32)
    numbers = numbers[~np.isnan(numbers)]
    view = {"float32": torch.int32, "bfloat16": torch.int16, "float16": torch.int16}[dtype]
    theirs = torch.from_numpy(numbers.copy()).to(getattr(torch, dtype)).view(view).numpy().view(FLOATS[dtype][3])
    assert np.array_equal(arithmetic.from_float32(numbers, dtype), theirs)


@dtypes
def test_nan_becomes_the_quiet_nan_and_infinity_stays(dtype):
    fraction, least, largest, kind, quiet = FLOATS[dtype]
    infinity = (largest - least + 2) << fraction
    nans = np.array([0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF, 0x7FC00000], np.uint32).view(np.float32)
    assert arithmetic.from_float32(nans, dtype).tolist() == [quiet] * 5
    top = 8 * kind().itemsize - 1
    assert rounded([np.inf, -np.inf], dtype) == [infinity, infinity | 1 << top]


@dtypes
def test_widening_is_exact(dtype):
    kind = FLOATS[dtype][3]
    bits = np.arange(0, 1 << 16, 7, dtype=kind) if kind is np.uint16 else np.array(bits_of(EDGES), kind)
    wide = arithmetic.to_float32(bits, dtype)
    finite = np.isfinite(wide)
    back = [exact(int(b), "float32") for b in wide.view(np.uint32)[finite]]
    assert back == [exact(int(b), dtype) for b in bits[finite]]


@dtypes
@given(data=st.data(), value=float32s)
def test_add_rounds_the_sum_and_then_the_element(dtype, data, value):
    fraction, least, largest, kind, _ = FLOATS[dtype]
    infinity = (largest - least + 2) << fraction
    sign = data.draw(st.sampled_from([0, 1 << (8 * kind().itemsize - 1)]))
    weight = sign | data.draw(st.integers(0, infinity - 1))
    bits = arithmetic.add(np.array([weight], kind), dtype, np.array([value], np.float32))
    both_minus = sign > 0 and math.copysign(1, value) < 0
    total = nearest(exact(weight, dtype) + Fraction(value), "float32", both_minus)
    finite = total & 0x7F800000 != 0x7F800000
    expected = nearest(exact(total, "float32"), dtype, total == 1 << 31) if finite else infinity | sign
    assert bits.tolist() == [expected]


@dtypes
def test_a_nan_weight_is_left_with_its_payload(dtype):
    quiet, kind = FLOATS[dtype][4], FLOATS[dtype][3]
    payload = np.array([quiet | 0x15, quiet & ~(quiet & -quiet) | 1, quiet], kind)
    assert np.array_equal(arithmetic.add(payload, dtype, np.ones(3, np.float32)), payload)


@dtypes
def test_infinities_of_opposite_sign_give_the_quiet_nan(dtype):
    weight = arithmetic.from_float32(np.array([np.inf], np.float32), dtype)
    result = arithmetic.add(weight, dtype, np.array([-np.inf], np.float32))
    assert result.tolist() == [FLOATS[dtype][4]]


def test_a_fused_multiply_add_would_differ():
    # alpha v = 1 + 2^-11 + 2^-24: the product rounds down to 1 + 2^-11, which a fused operation would keep.
    alpha = np.float32(1 + 2**-12)
    values = np.array([alpha], np.float32)
    fused = nearest(Fraction(float(alpha)) ** 2 - 1, "float32")
    weight = np.array(bits_of([-1.0]), np.uint32)
    result = arithmetic.add(weight, "float32", arithmetic.scaled(values, float(alpha)))
    assert result.tolist() == bits_of([2**-11])
    assert result.tolist() != [fused]


def test_two_roundings_of_a_16_bit_sum_are_kept():
    # 1 + 2^-9 is a tie of bf16 and goes down; the exact sum 1 + 2^-8 (1/2 + tiny) alone would go up.
    weight, tiny = np.array([0x3F80], np.uint16), np.float32(2**-8 * (1 + 2**-20))
    exact_sum = nearest(1 + Fraction(float(tiny)), "bfloat16")
    assert arithmetic.add(weight, "bfloat16", np.array([tiny])).tolist() == [0x3F80] != [exact_sum]


def test_strength_is_rounded_to_float32_first():
    values = np.array([3.0, 1e-3], np.float32)
    assert np.array_equal(arithmetic.scaled(values, 0.1), values * np.float32(0.1))
    assert arithmetic.scaled(values, 1 + 1e-12) is values


@pytest.mark.parametrize("strength", [0.5, np.float32(0.5), np.float64(2), 3, math.nextafter(2.0**128 - 2.0**103, 0)])
def test_strengths_of_every_type_up_to_the_largest(strength):
    alpha = arithmetic.alpha_of(strength)
    assert type(alpha) is np.float32
    assert alpha == np.array([strength], np.float64).astype(np.float32)[0]


@pytest.mark.parametrize(
    "strength",
    [float("nan"), float("inf"), -float("inf"), 1e39, np.float32("inf"), 2.0**128 - 2.0**103, 10**400, "x", None],
)
def test_strength_must_be_finite_as_float32(strength):
    with pytest.raises(DeltaError, match="finite"):
        arithmetic.scaled(np.ones(1, np.float32), strength)


def test_denormals_and_overflow_of_scaling_are_kept():
    values = np.array([2.0**-126, 3e38], np.float32)
    assert arithmetic.scaled(values, 2**-23).view(np.uint32)[0] == 1
    assert np.isinf(arithmetic.scaled(values, 2.0)[1])


def test_other_dtypes_have_no_float32_values():
    with pytest.raises(DeltaError, match="float64"):
        arithmetic.to_float32(np.zeros(1, np.uint64), "float64")


@given(st.lists(st.tuples(st.integers(0, (1 << 56) - 1), st.integers(0, (1 << 64) - 1)), max_size=20), st.randoms())
def test_fingerprint_does_not_depend_on_the_order(pairs, rng):
    def of(some):
        positions = np.array([position for position, _ in some], np.int64)
        return arithmetic.fingerprint(positions, np.array([bits for _, bits in some], np.uint64))

    shuffled = rng.sample(pairs, len(pairs))
    assert of(shuffled) == of(pairs) == sum(of([pair]) for pair in pairs) % (1 << 64)


def test_float32_is_rounded_only_to_the_dtypes_that_can_be_added_to():
    with pytest.raises(DeltaError, match="float32 is not rounded to float64 elements; take float32, bfloat16, float16"):
        arithmetic.from_float32(np.ones(2, np.float32), "float64")
