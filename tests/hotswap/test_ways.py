"""The ways between sets of adapters, over many blocks: from one to one, to several, to other strengths."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch

import shiradelta as sd
from shiradelta.hotswap.choose import new_backend
from tests.swapping import BACKENDS_IN_TIME, adapter, bits, formula, random_delta, weights

#: Triton's interpreter computes in NumPy.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

#: Of several blocks and several of the regions that are summed up at a time.
SHAPES = {"w": (300, 500), "v": (30, 10), "u": (70,)}
WAYS = [
    {"a": 1.0},
    {"b": 0.5},  # other positions of w; v goes back, u comes
    {"c": 1.0},  # v comes
    {"a": -2.0},  # the same positions of w
    {"a": 0.25},  # another strength
    {"d": 1.0},  # many blocks for one
    {"e": 1.0},  # one block for many
    {"a": 1.0, "b": 1.0},
    {"a": 0.1, "b": 3.0},  # other strengths of several
    {"a": 1.0, "c": -1.0},  # the same positions
    {"a": 1.0, "b": 2.0, "c": 3.0, "e": 5.0},
    {"i": 1.0, "a": 1.0},  # two codecs
    {"s": 1.0, "a": 0.5},
    {"s": 1.0, "a": 0.7},  # another strength on top of a SET
    {"s": 1.0},
    {"i": 1.0},
    {},
    {"f": 1.0, "g": 2.0},  # few positions in common
    {"a": 1.0},
    {"f": 0.5, "g": -1.0},  # a second time
    {"f": 1.5, "g": 0.1},
    {"g": 1.0},
    {"f": 1.0, "g": 2.0, "h": -3.0},
    {"f": 1.0, "g": 2.0},
    {"f": 1.0, "g": 2.0, "h": -3.0},
    {"f": 2.0, "g": 1.0, "h": 1.0},
    {},
]


def deltas(seed: int, **counts: int) -> dict[str, sd.TensorDelta]:
    return {name: random_delta(SHAPES[name], count, seed) for name, count in counts.items()}


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    a = deltas(0, w=3000, v=100)
    same = np.random.default_rng(1).normal(size=3000).astype(np.float32)
    return {
        "a": adapter(a),
        "b": adapter(deltas(2, w=2500, u=3)),
        "c": adapter({"w": sd.TensorDelta(SHAPES["w"], a["w"].positions(), same, "bfloat16"), **deltas(3, v=20)}),
        "d": adapter(deltas(4, w=15_000)),
        "e": adapter(deltas(5, w=9, u=70)),
        "f": adapter(deltas(8, w=1500, v=7)),
        "g": adapter(deltas(9, w=1600, u=5)),
        "h": adapter(deltas(10, w=1400, v=5)),
        "i": adapter(deltas(6, w=1000), "int4"),
        "s": adapter({"w": random_delta(SHAPES["w"], 1500, 7, op="set")}),
    }


@pytest.mark.parametrize("backend", BACKENDS_IN_TIME)
def test_every_way_gives_the_formula(backend: str, files: dict[str, bytes]):
    base = {name: weights(shape, "bfloat16", special=True) for name, shape in SHAPES.items()}
    before = {name: bits(tensor) for name, tensor in base.items()}
    swap = sd.HotSwap(base, backend=backend)
    for name, data in files.items():
        swap.load(name, data)
    for way in WAYS:
        swap.switch(way)
        chosen = [(files[name], strength) for name, strength in way.items()]
        for name, tensor in base.items():
            assert np.array_equal(bits(tensor), formula(before[name], "bfloat16", chosen, name)), (way, name)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_a_pair_that_fails_at_its_overlaps_leaves_the_base(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch):
    """By then the second adapter has saved, where both are, what the first has made of the base."""
    from shiradelta.hotswap.triton import backend as triton_backend

    base = {name: weights(shape, "bfloat16", special=True) for name, shape in SHAPES.items()}
    before = {name: bits(tensor) for name, tensor in base.items()}
    swap = sd.HotSwap(base, backend="triton")
    for name in "fg":
        swap.load(name, files[name])
    both = {"f": 1.0, "g": 2.0}
    for _ in range(2):
        swap.switch(both)
        swap.revert()
    shared = np.intersect1d(*(sd.open_delta(files[name])["w"].positions() for name in "fg"))
    assert len(shared) > 5
    met = []

    class Failing:
        def __getitem__(self, grid: object):
            met.append({name: bits(tensor) for name, tensor in base.items()})
            raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(triton_backend.kernels, "overlap_kernel", Failing())
        with pytest.raises(MemoryError):
            swap.switch(both)
    assert any((found["w"] != before["w"]).any() for found in met)
    assert all(np.array_equal(bits(tensor), before[name]) for name, tensor in base.items())
    swap.switch(both)
    for name, tensor in base.items():
        expected = formula(before[name], "bfloat16", [(files[one], strength) for one, strength in both.items()], name)
        assert np.array_equal(bits(tensor), expected)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_many_adapters_are_applied_one_by_one_and_corrected_where_they_meet(monkeypatch: pytest.MonkeyPatch):
    """Ten adapters, some elements of one, two, three and all of them; memory for what they share is limited."""
    from shiradelta.hotswap.triton import backend as triton_backend

    shape, rng = (30, 40), np.random.default_rng(1)
    tensor = weights(shape, "bfloat16", special=True)
    before = bits(tensor)
    places = rng.permutation(1200)
    of_all, of_three, of_two, own = places[:3], places[3:5], places[5:15], places[15:].reshape(-1, 5)
    files = {}
    for number in range(10):
        shared = [of_all, of_two[number // 2 :: 5]] + ([of_three] if number in (2, 5, 9) else [])
        positions = np.sort(np.concatenate([*shared, own[number::10].reshape(-1)]))
        values = rng.normal(size=positions.size).astype(np.float32)
        files[f"n{number}"] = adapter({"w": sd.TensorDelta(shape, positions, values, "bfloat16")}, "int8")
    swap = sd.HotSwap({"w": tensor}, backend="triton")
    for name, content in files.items():
        swap.load(name, content)
    used, kernel = [], triton_backend.kernels.overlap_kernel

    class Counted:
        def __getitem__(self, grid: tuple[int, ...]):
            used.append(grid)
            return kernel[grid]

    monkeypatch.setattr(triton_backend.kernels, "overlap_kernel", Counted())
    several, others = dict.fromkeys(files, 0.5), {name: 0.1 * i for i, name in enumerate(files, 1)}
    for wanted, times in ((several, 0), (others, 1), ({}, 1), (several, 2)):
        swap.switch(wanted)
        assert np.array_equal(bits(tensor), formula(before, "bfloat16", [(files[x], s) for x, s in wanted.items()]))
        assert used == [(3,)] * times  # one program each for two, three and ten deltas that share elements
    monkeypatch.setattr(triton_backend, "_OVERLAP", 0.001)
    for wanted in ({"n0": 1.0, "n1": 1.0}, {"n0": 2.0, "n1": 1.0}):
        swap.switch(wanted)
        assert np.array_equal(bits(tensor), formula(before, "bfloat16", [(files[x], s) for x, s in wanted.items()]))
    assert len(used) == 2


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS_IN_TIME)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_sums_in_other_dtypes(backend: str, dtype: str):
    shape = (100, 90)
    tensor = weights(shape, dtype, special=True)
    before = bits(tensor)
    data = {name: adapter({"w": random_delta(shape, 1500, i, dtype)}, "int4") for i, name in enumerate("xyz")}
    swap = sd.HotSwap({"w": tensor}, backend=backend)
    for name, content in data.items():
        swap.load(name, content)
    for wanted in ({"x": 1e-8, "y": -3e38, "z": 3e38}, {"x": 0.5, "y": 0.5, "z": 0.5}, {"z": 1.0}, {"y": 1.0}):
        swap.switch(wanted)
        assert np.array_equal(bits(tensor), formula(before, dtype, [(data[x], s) for x, s in wanted.items()]))
    swap.revert()
    assert np.array_equal(bits(tensor), before)


def test_torch_adds_only_to_dtypes_that_the_format_defines_sums_of():
    backend = new_backend("torch", "cpu")
    with pytest.raises(sd.DeltaError, match="float64 elements cannot be added to; take float32, float16, bfloat16"):
        backend.add(torch.ones(2, dtype=torch.int64), "float64", torch.ones(2))  # type: ignore[attr-defined]
