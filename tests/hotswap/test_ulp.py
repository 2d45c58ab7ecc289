"""Lossless deltas on live models: the bits of the next checkpoint on every backend, and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import shiradelta as sd
from shiradelta import HotSwap
from shiradelta.errors import BaseMismatchError, DeltaError
from shiradelta.format import arithmetic
from shiradelta.hotswap.choose import LIVE_BACKENDS
from tests.swapping import BACKENDS_IN_TIME, DEVICE, adapter, bits, formula, random_delta, weights, why_not

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

SHAPE = (50, 30)


def shifts(seed: int, base: np.ndarray | None = None, nnz: int = 300, dtype: str = "bfloat16") -> sd.TensorDelta:
    rng = np.random.default_rng(seed)
    positions = np.sort(rng.choice(SHAPE[0] * SHAPE[1], nnz, replace=False))
    values = rng.integers(1, 40, nnz) * rng.choice([-1, 1], nnz)
    return sd.TensorDelta(SHAPE, positions, values, dtype, "ulp", None if base is None else base[positions])


def moved(before: np.ndarray, dtype: str, *deltas: sd.TensorDelta) -> np.ndarray:
    after = before.copy()
    for delta in deltas:
        after[delta.positions()] = arithmetic.shift(after[delta.positions()], dtype, delta.bits())
    return after


@pytest.mark.parametrize("backend", BACKENDS_IN_TIME)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("contiguous", [True, False])
def test_a_step_goes_on_and_off(backend: str, dtype: str, contiguous: bool):
    weight = weights(SHAPE, dtype, special=False)
    weight = weight if contiguous else weight.t().contiguous().t()
    before = bits(weight)
    swap = HotSwap({"w": weight}, backend=backend)
    delta = shifts(1, before, dtype=dtype)
    swap.load("a", adapter({"w": delta}))
    swap.switch("a")
    assert np.array_equal(bits(weight), moved(before, dtype, delta))
    assert swap.changed() == delta.nnz
    with pytest.raises(DeltaError, match="ulp has strength 1 only"):
        swap.switch("a", 0.5)
    swap.revert()
    assert np.array_equal(bits(weight), before)


@pytest.mark.parametrize("backend", BACKENDS_IN_TIME)
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.float8_e5m2])
def test_elements_of_other_kinds(backend: str, dtype: torch.dtype):
    weight = (torch.arange(60).view(6, 10) % 50 + 60).to(dtype).to(DEVICE)
    before, name = bits(weight), str(dtype).removeprefix("torch.")
    delta = sd.TensorDelta((6, 10), [0, 7, 59], [3, -5, 1], name, "ulp", base_bits=before[[0, 7, 59]])
    swap = HotSwap({"w": weight}, backend=backend)
    swap.load("a", adapter({"w": delta}))
    swap.switch("a")
    assert np.array_equal(bits(weight), moved(before, name, delta))
    swap.revert()
    assert np.array_equal(bits(weight), before)


@pytest.mark.parametrize("backend", BACKENDS_IN_TIME)
def test_steps_follow_each_other_and_go_under_other_adapters(backend: str):
    weight = weights(SHAPE, "bfloat16")
    before = bits(weight)
    swap = HotSwap({"w": weight}, backend=backend)
    first = shifts(1, before)
    second = shifts(2, moved(before, "bfloat16", first))
    added = random_delta(SHAPE, 200, 5)
    files = {"first": adapter({"w": first}), "added": adapter({"w": added})}
    for name, data in files.items():
        swap.load(name, data)
    swap.switch("first")
    assert swap.load("second", adapter({"w": second})).beneath == {"first": 1.0}
    swap.switch("second")
    assert np.array_equal(bits(weight), moved(before, "bfloat16", first, second))
    swap.switch({"first": 1.0, "added": 0.5})
    expected = formula(moved(before, "bfloat16", first), "bfloat16", [(files["added"], 0.5)])
    assert np.array_equal(bits(weight), expected)
    swap.revert()
    assert np.array_equal(bits(weight), before)


@pytest.mark.parametrize("backend", BACKENDS_IN_TIME)
def test_moves_add_up_and_do_not_meet_a_set(backend: str):
    weight = weights(SHAPE, "bfloat16")
    before = bits(weight)
    swap = HotSwap({"w": weight}, backend=backend)
    one, other = shifts(1, before), shifts(2, before)
    assert np.intersect1d(one.positions(), other.positions()).size
    at = one.positions()[:1]
    setting = sd.TensorDelta(SHAPE, at, np.array([7], np.uint16), "bfloat16", "set")
    for name, delta in {"one": one, "other": other, "set": setting}.items():
        swap.load(name, adapter({"w": delta}))
    swap.switch({"one": 1, "other": 1})
    assert np.array_equal(bits(weight), moved(before, "bfloat16", one, other))
    with pytest.raises(DeltaError, match="set the same elements"):
        swap.switch({"one": 1, "set": 1})
    swap.revert()
    assert np.array_equal(bits(weight), before)


@pytest.mark.parametrize("backend", BACKENDS_IN_TIME)
def test_leaving_the_range_leaves_all_weights_as_they_were(backend: str):
    tensors = {name: weights(SHAPE, "bfloat16", seed) for seed, name in enumerate("vw")}
    base = {name: bits(tensor) for name, tensor in tensors.items()}
    data = adapter({name: shifts(seed, base[name]) for seed, name in enumerate("vw")})
    last = shifts(1).positions()[-1]
    tensors["w"].view(torch.int16).view(-1)[last] = 0x7FFF if shifts(1).payload()[-1] > 0 else -1
    before = {name: bits(tensor) for name, tensor in tensors.items()}
    swap = HotSwap(tensors, backend=backend)
    with pytest.raises(BaseMismatchError, match="not the one that the delta was made against"):
        swap.load("a", data)
    swap.load("a", data, check=False)
    where = "an element" if backend == "triton" else "tensor 'w'"  # a kernel tells that one did, not which
    with pytest.raises(DeltaError, match=f"{where} would leave the range of its dtype"):
        swap.switch("a")
    assert swap.active == {}
    assert all(np.array_equal(bits(tensor), before[name]) for name, tensor in tensors.items())


@pytest.mark.skipif(why_not(LIVE_BACKENDS["triton"]) is not None, reason="Triton does not run here")
def test_a_launch_that_fails_after_one_that_refuses_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch):
    """The first kernel says that a shift leaves the range, and nobody gets to ask it."""
    from shiradelta.hotswap.triton.backend import TritonBackend
    from shiradelta.hotswap.triton.kernels import apply_kernel

    tensors = {dtype: weights(SHAPE, dtype, special=False) for dtype in ("bfloat16", "float16")}  # a launch for each
    before = {dtype: bits(tensor) for dtype, tensor in tensors.items()}
    steps = {name: {dtype: shifts(seed, dtype=dtype) for dtype in before} for seed, name in enumerate(("one", "two"))}
    up = {dtype: int(np.flatnonzero(some < 0x8000)[0]) for dtype, some in before.items()}
    steps["bad"] = {dtype: sd.TensorDelta(SHAPE, [at], [0x7FFF], dtype, "ulp") for dtype, at in up.items()}
    swap = HotSwap(tensors, backend="triton")
    for name, step in steps.items():
        swap.load(name, adapter(step))
    swap.switch("one")
    launch, launched = TritonBackend._launch, []

    def failing(self: TritonBackend, kernel: object, *arguments: object, **kind: object) -> None:
        launched.append(kernel)
        if launched.count(apply_kernel) == 2:
            monkeypatch.undo()
            raise MemoryError
        launch(self, kernel, *arguments, **kind)

    monkeypatch.setattr(TritonBackend, "_launch", failing)
    with pytest.raises(MemoryError):
        swap.switch("bad")
    for name in "one", "two":
        for dtype, tensor in tensors.items():
            assert np.array_equal(bits(tensor), moved(before[dtype], dtype, steps[name][dtype]))
        swap.switch("two")
    swap.revert()
    assert all(np.array_equal(bits(tensor), before[dtype]) for dtype, tensor in tensors.items())
