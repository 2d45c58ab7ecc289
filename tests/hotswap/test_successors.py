"""Deltas of consecutive steps on a live model: each is made for what the ones before it give (FORMAT.md, 6.4)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import shiradelta as sd
from shiradelta import HotSwap
from shiradelta.errors import BaseMismatchError, DeltaError
from shiradelta.hotswap.numpy import NumpyBackend
from tests.swapping import BACKENDS_IN_TIME, adapter, bits, formula, random_delta, weights

# Triton's interpreter computes in NumPy, which warns of infinities and NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

SHAPE = (40, 30)
State = dict[str, np.ndarray]


def model(special: bool = False) -> dict[str, torch.Tensor]:
    return {name: weights(SHAPE, "bfloat16", seed, special=special) for seed, name in enumerate("vw")}


def state(tensors: Any) -> State:
    return {name: bits(tensor) for name, tensor in tensors.items()}


def same(tensors: Any, expected: State) -> bool:
    return all(np.array_equal(bits(tensors[name]), expected[name]) for name in expected)


def chain(base: State, ops: str = "add add add", strength: float = 1) -> tuple[list[bytes], list[State]]:
    """(deltas, each for what the ones before give; the base, and what each gives).  The first has the strength."""
    files, states = [], [base]
    for step, op in enumerate(ops.split()):
        under = states[-1]
        deltas = {
            name: random_delta(SHAPE, 400, 10 * step + i, op=op, base=under[name].view(np.uint16))
            for i, name in enumerate(under)
        }
        files.append(adapter(deltas))
        alpha = 1 if step else strength
        states.append({name: formula(under[name], "bfloat16", [(files[-1], alpha)], name) for name in under})
    return files, states


def loaded(tensors: Any, files: list[bytes], backend: str = "auto", strength: float = 1) -> HotSwap:
    """A session with a chain c0, c1, ..., which is active."""
    swap = HotSwap(tensors, backend=backend)
    for step, data in enumerate(files):
        report = swap.load(f"c{step}", data)
        assert report.beneath == swap.active
        swap.switch({**swap.active, f"c{step}": 1 if step else strength})
    return swap


# ------------------------------------------------------------------------------------------------ bits


@pytest.mark.parametrize("ops", ["add add add", "add set add"])
@pytest.mark.parametrize("backend", BACKENDS_IN_TIME)
def test_every_step_is_applied_to_what_the_ones_before_give(backend: str, ops: str):
    tensors = model(special=True)
    files, states = chain(state(tensors), ops, 0.5)
    swap = loaded(tensors, files, backend, 0.5)
    names = [f"c{step}" for step in range(len(files))]
    for step in (3, 2, 1, 2, 0, 3, 1, 3, 0, 2, 0):
        # A successor brings what is beneath it.
        swap.switch({names[step - 1]: 1.0 if step > 1 else 0.5} if step else None)
        assert swap.active == {name: 1.0 if number else 0.5 for number, name in enumerate(names[:step])}
        assert same(tensors, states[step])
        assert swap.changed() == sum(int((states[step][name] != states[0][name]).sum()) for name in states[0])
    other = adapter({"v": random_delta(SHAPE, 300, 99), "w": random_delta(SHAPE, 300, 98)})
    swap.load("other", other)
    for wanted in ({"other": 2.0}, {"c2": 1.0}, {"c0": 1.0, "other": 1.0}, {"c1": 1.0}, {"c0": -1.0}, {"c1": 1.0}):
        swap.switch(wanted)
        if "c0" not in wanted and "other" not in wanted:
            assert same(tensors, states[1 + int(next(iter(wanted))[1])])
        else:
            pairs = [({"other": other, "c0": files[0]}[name], alpha) for name, alpha in wanted.items()]
            assert same(tensors, {name: formula(states[0][name], "bfloat16", pairs, name) for name in tensors})
    swap.revert()
    assert same(tensors, states[0])


def test_folders_give_the_same(tmp_path: Path):
    tensors = model()
    files, states = chain(state(tensors))
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    swap = HotSwap(tensors)
    for step, data in enumerate(files):
        path = tmp_path / f"c{step}.shd"
        path.write_bytes(data)
        sd.apply(tmp_path, path)
        swap.load(f"c{step}", path)
        swap.switch(f"c{step}")
        on_disk = load_file(tmp_path / "model.safetensors")
        assert same(tensors, states[step + 1])
        assert same(on_disk, states[step + 1])


# -------------------------------------------------------------------------------------------- readings


def test_a_step_that_fits_the_base_too_goes_on_top_of_the_steps_that_are_wanted_with_it():
    """A step that changes other elements than those before it."""
    tensors = model()
    files, states = chain(state(tensors), "add add")
    swap = loaded(tensors, files)
    changed = np.union1d(*(sd.open_delta(data)["w"].positions() for data in files))
    free = np.setdiff1d(np.arange(SHAPE[0] * SHAPE[1]), changed)[:9]
    apart = adapter({"w": sd.TensorDelta(SHAPE, free, np.ones(9), "bfloat16", base_bits=states[2]["w"][free])})
    assert swap.load("apart", apart).beneath == {}
    swap.switch({**swap.active, "apart": 1.0})
    top = {**states[2], "w": formula(states[2]["w"], "bfloat16", [(apart, 1)])}
    assert same(tensors, top)
    data = adapter({"w": random_delta(SHAPE, 400, 77, base=top["w"].view(np.uint16))})
    assert swap.load("next", data).beneath == {"c0": 1.0, "c1": 1.0, "apart": 1.0}
    swap.switch("next")
    swap.switch("apart", -1)
    assert same(tensors, {**states[0], "w": formula(states[0]["w"], "bfloat16", [(apart, -1)])})
    swap.switch("c1")
    with pytest.raises(DeltaError, match="'apart' is beneath 'next'"):
        swap.unload("apart")
    swap.unload("next")
    swap.revert()
    swap.unload("apart")


def test_an_unchecked_delta_is_of_the_base():
    tensors = model()
    (first, second), states = chain(state(tensors), "add add")
    swap = loaded(tensors, [first])
    assert swap.load("unchecked", second, check=False).beneath == {}
    assert swap.load("plain", adapter({"w": random_delta(SHAPE, 30, 5)})).beneath == {}
    swap.switch("unchecked")
    assert same(tensors, {name: formula(states[0][name], "bfloat16", [(second, 1)], name) for name in tensors})


def test_tensors_that_fit_different_states_are_refused():
    tensors = model()
    (first, second), states = chain(state(tensors), "add add")
    swap = loaded(tensors, [first])
    mixed = {
        name: random_delta(SHAPE, 400, 3, base=states[number][name].view(np.uint16)) for number, name in enumerate("vw")
    }
    with pytest.raises(BaseMismatchError, match="tensor 'w' is not the base's, and tensor 'v' is not what the active"):
        swap.load("mixed", adapter(mixed))
    swap.load("c1", second)


# --------------------------------------------------------------------------------------------- refusals


def test_what_a_successor_cannot_be():
    tensors = model()
    files, states = chain(state(tensors))
    swap = loaded(tensors, files[:2])
    before = swap.active
    swap.load("other", adapter({"w": random_delta(SHAPE, 30, 5)}))
    for wanted in ({"c1": 0.5}, {"c0": 0.5, "c1": 1.0}, {"c1": 1.0, "other": 1.0}, {"c1": -1.0, "other": 1.0}):
        with pytest.raises(DeltaError, match=r"'c1' was made for what 'c0' at 1 gives.*; switch to 'c1' alone"):
            swap.switch(wanted)
        assert swap.active == before
        assert same(tensors, states[2])
    with pytest.raises(BaseMismatchError, match="already holds the result"):
        swap.load("again", files[1])
    swap.switch("c0")
    with pytest.raises(BaseMismatchError, match="is not what the active adapters give; switch to the adapters that"):
        swap.load("c2", files[2])
    swap.revert()
    with pytest.raises(DeltaError, match=r"adapter 'c0' is beneath 'c1', .*; unload that first"):
        swap.unload("c0")
    swap.unload("c1")
    swap.unload("c0")


def test_two_successors_of_one_state_are_not_active_together():
    tensors = model()
    (first, second), states = chain(state(tensors), "add add")
    swap = loaded(tensors, [first])
    swap.load("c1", second)
    swap.load("fork", adapter({"w": random_delta(SHAPE, 400, 8, base=states[1]["w"].view(np.uint16))}))
    with pytest.raises(DeltaError, match="was made for what 'c0' at 1 gives"):
        swap.switch({"c1": 1.0, "fork": 1.0})
    swap.switch("fork")
    swap.switch("c1")
    assert same(tensors, states[2])


# ---------------------------------------------------------------------------------- rebase, atomicity


def test_rebase_makes_what_the_steps_give_the_base():
    tensors = model()
    files, states = chain(state(tensors))
    swap = loaded(tensors, files)
    swap.switch("c1")
    with pytest.raises(BaseMismatchError):  # c0 and c1 are no deltas of it
        swap.rebase()
    assert swap.active == {"c0": 1.0, "c1": 1.0}
    report = swap.rebase(check=False)
    assert (swap.active, report.kept) == ({}, ("v", "w"))
    assert not any(report.beneath for report in swap.loaded.values())
    swap.unload("c0")
    swap.unload("c1")
    swap.rebase()  # c2 fits it
    swap.switch("c2")
    assert same(tensors, states[3])
    swap.revert()
    assert same(tensors, states[2])


@pytest.mark.parametrize(
    ("start", "goal"),
    [
        ("c2", None),
        ("c0", "c2"),
        *(pytest.param(*way, marks=pytest.mark.slow) for way in (("c2", "other"), ("other", "c2"), ("c2", "c0"))),
    ],
)
@pytest.mark.parametrize("step", ["positions", "payload", "read", "write", "room", "add"])
def test_a_failure_anywhere_leaves_the_state_before(
    monkeypatch: pytest.MonkeyPatch, step: str, start: str, goal: str | None
):
    tensors = {name: tensor.cpu() for name, tensor in model().items()}
    files, _ = chain(state(tensors))
    swap = loaded(tensors, files, "numpy")
    swap.load("other", adapter({"w": random_delta(SHAPE, 300, 99), "v": random_delta(SHAPE, 300, 98)}))
    swap.switch(goal)
    expected = state(tensors)
    swap.switch(start)
    before, active = state(tensors), swap.active
    original = getattr(NumpyBackend, step)
    left = at = 0

    def failing(self: NumpyBackend, *arguments: Any) -> object:
        nonlocal left
        left -= 1
        if left == 0:
            if step == "write":  # half of it is written
                target, positions, new = arguments
                original(self, target, positions[: len(positions) // 2], new[: len(positions) // 2])
            raise MemoryError
        return original(self, *arguments)

    monkeypatch.setattr(NumpyBackend, step, failing)
    while True:
        at += 1
        left = at
        try:
            swap.switch(goal)
        except MemoryError:
            left = 0
            assert swap.active == active
            assert same(tensors, before)
        else:
            break
    monkeypatch.undo()
    assert same(tensors, expected)
    swap.revert()
    assert same(tensors, state(model()))
