"""The in-memory model: what it takes, what it refuses, what it gives."""

from __future__ import annotations

import numpy as np
import pytest

import shiradelta as sd
from shiradelta.errors import DeltaError, ShiraDeltaError
from shiradelta.format.delta import check_shape, matrix_shape


def delta(**changed) -> sd.TensorDelta:
    """An ordinary one with something changed."""
    return sd.TensorDelta(**({"shape": (3, 4), "positions": [1, 5, 11], "values": [0.5, -1.0, 2.0]} | changed))


def test_it_gives_what_it_was_made_of():
    tensor = delta(dtype="float16")
    assert (tensor.shape, tensor.dtype, tensor.op, tensor.nnz, tensor.numel) == ((3, 4), "float16", "add", 3, 12)
    assert tensor.positions().dtype == np.int64
    assert tensor.positions().tolist() == [1, 5, 11]
    assert tensor.values().dtype == np.float32
    assert tensor.values().tolist() == [0.5, -1.0, 2.0]
    assert tensor.bits().tolist() == [0x3F000000, 0xBF800000, 0x40000000]


def test_dense_and_scipy_agree():
    tensor = delta()
    dense = [[0, 0.5, 0, 0], [0, -1, 0, 0], [0, 0, 0, 2]]
    assert tensor.to_dense().tolist() == dense
    assert tensor.to_scipy().toarray().tolist() == dense
    assert delta(shape=(), positions=[0], values=[3.0]).to_scipy().toarray().tolist() == [3.0]


def test_scipy_takes_any_rank():
    tensor = delta(shape=(2, 3, 2), positions=[0, 7, 11])
    assert np.array_equal(tensor.to_scipy().toarray(), tensor.to_dense())


def test_it_cannot_be_changed():
    source = np.array([0.5, -1.0, 2.0], np.float32)
    tensor = delta(values=source)
    source[0] = 7
    assert tensor.values()[0] == 0.5
    for array in tensor.positions(), tensor.values(), tensor.bits():
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    with pytest.raises(AttributeError):
        tensor.shape = (12,)


def test_explicit_zeros_are_kept():
    tensor = delta(values=[0.0, -0.0, 0.0])
    assert tensor.nnz == 3
    assert tensor.bits().tolist() == [0, 1 << 31, 0]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"positions": [1, 5, 12]}, "outside"),
        ({"positions": [1, 5, 5]}, "strictly increasing"),
        ({"positions": [5, 1, 11]}, "strictly increasing"),
        ({"positions": [-1, 1, 11]}, "strictly increasing"),
        ({"positions": np.array([1, 5, (1 << 64) - 1], np.uint64)}, "strictly increasing"),
        ({"positions": [1.0, 5.0, 11.0]}, "integers"),
        ({"positions": [[1, 5, 11]]}, "one dimension"),
        ({"positions": [1, 5]}, "3 values for 2 positions"),
        ({"positions": None}, "3 values for 12 positions"),
        ({"values": [0.5, np.nan, 2.0]}, "value 1 is nan"),
        ({"values": [0.5, 1.0, np.inf]}, "value 2 is inf"),
        ({"values": [1e39, 1.0, 1.0]}, "value 0 is inf"),
        ({"shape": (1,) * 9}, "8 dimensions"),
        ({"shape": (1 << 28, (1 << 28) + 1)}, "2\\^56"),
        ({"shape": (0, (1 << 56) + 1)}, "2\\^56"),
        ({"shape": (-1,)}, "out of range"),
        ({"dtype": "int4"}, "dtype 'int4' is unknown"),
        ({"op": "xor"}, "operation 'xor' is unknown"),
        ({"dtype": "int32"}, "use set"),
        ({"dtype": "float64"}, "use set"),
        ({"op": "set"}, "give their dtype"),
        ({"op": "new", "positions": None}, "give their dtype"),
        ({"base_bits": np.zeros(3, np.uint16)}, "base needs its dtype"),
        ({"base_fingerprint": 7}, "base needs its dtype"),
        ({"op": "new", "dtype": "bfloat16"}, "whole tensor"),
        ({"op": "replace", "dtype": "bfloat16"}, "whole tensor"),
        (
            {
                "shape": (3,),
                "op": "replace",
                "dtype": "bfloat16",
                "positions": None,
                "values": np.zeros(3, np.uint16),
                "base_bits": np.zeros(3, np.uint16),
            },
            "give base_fingerprint",
        ),
        ({"op": "set", "dtype": "bfloat16", "values": np.zeros(3, np.float32)}, "2 bytes per element"),
        ({"dtype": "bfloat16", "base_bits": np.zeros(2, np.uint16)}, "2 base elements for 3 positions"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(changed, says):
    with pytest.raises(DeltaError, match=says) as caught:
        delta(**changed)
    assert isinstance(caught.value, ShiraDeltaError)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        ("bfloat16", np.array([0x7FC1, 0x8000, 1], np.uint16)),
        ("float8_e4m3fn", np.array([0xFF, 0x80, 1], np.uint8)),
        ("bool", np.array([True, False, True])),
        ("int64", np.array([-1, 0, 1 << 40])),
        ("complex64", np.array([1j, 0, np.nan], np.complex64)),
        ("float64", np.array([np.nan, np.inf, -0.0])),
    ],
)
def test_set_keeps_every_bit(dtype, values):
    tensor = delta(op="set", dtype=dtype, values=values)
    assert tensor.bits().tobytes() == values.tobytes()
    assert tensor.bits().dtype.kind == "u"


def test_set_takes_elements_of_any_byte_order():
    swapped = delta(op="set", dtype="bfloat16", values=np.array([0x3F80, 1, 2], ">u2"))
    assert swapped.bits().tolist() == [0x3F80, 1, 2]


def test_values_of_set_are_float32_only_where_that_is_exact():
    bits = np.array([0x3F80, 0, 0xC000], np.uint16)
    assert delta(op="set", dtype="bfloat16", values=bits).values().tolist() == [1.0, 0.0, -2.0]
    with pytest.raises(DeltaError, match="int16"):
        delta(op="set", dtype="int16", values=np.array([1, 2, 3], np.int16)).values()


def test_new_and_drop_are_about_whole_tensors():
    new = sd.TensorDelta((2, 2), None, np.arange(4, dtype=np.uint16), "bfloat16", "new")
    assert new.positions().tolist() == [0, 1, 2, 3]
    assert new.all_positions
    drop = sd.TensorDelta((2, 2), [1], [5.0], op="drop")
    assert (drop.nnz, drop.all_positions) == (0, False)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 1 << 56, 1 << 56)])
def test_zero_sized_tensors_are_allowed(shape):
    tensor = sd.TensorDelta(shape, [], [])
    assert (tensor.nnz, tensor.numel) == (0, 0)


@pytest.mark.parametrize("numel", [(1 << 31) + 5, (1 << 32) + 5, 1 << 56])
def test_positions_past_32_bits(numel):
    positions = [0, (1 << 31) - 1, 1 << 31, numel - 1]
    tensor = sd.TensorDelta((numel,), positions, [1.0, 2.0, 3.0, 4.0])
    assert tensor.positions().tolist() == positions
    with pytest.raises(DeltaError, match="outside"):
        sd.TensorDelta((numel,), [numel], [1.0])


@pytest.mark.parametrize(
    ("shape", "matrix"), [((), (1, 1)), ((7,), (1, 7)), ((3, 4), (3, 4)), ((3, 4, 5), (3, 20)), ((3, 0), (3, 0))]
)
def test_matrix_shape(shape, matrix):
    assert matrix_shape(shape) == matrix
    assert check_shape(shape) == matrix[0] * matrix[1]


def test_repr_says_what_it_is():
    assert repr(delta()) == "<TensorDelta add 3x4 unspecified, 3 of 12>"
    scalar = delta(shape=(), positions=[0], values=[1.0], dtype="bfloat16")
    assert repr(scalar) == "<TensorDelta add scalar bfloat16, 1 of 1>"
