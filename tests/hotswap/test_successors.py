"""Deltas of consecutive steps on a live model: each is made for what the ones before it give (FORMAT.md, 6.4)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from shiradelta import HotSwap
from shiradelta.errors import BaseMismatchError
from tests.swapping import adapter, bits, formula, random_delta, weights

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


def test_the_next_step_becomes_a_delta_of_the_base_by_rebase():
    tensors = model()
    (first, second, third), states = chain(state(tensors))
    swap = HotSwap(tensors)
    swap.load("c0", first)
    swap.switch("c0")
    with pytest.raises(BaseMismatchError, match=r"made for what the active adapters give, not for the base; .*rebase"):
        swap.load("c1", second)
    with pytest.raises(BaseMismatchError, match=r"is not the base's, and tensor .* is not what the active adapters"):
        swap.load("c2", third)
    assert list(swap.loaded) == ["c0"]
    swap.rebase(check=False)
    swap.load("c1", second)
    swap.switch("c1")
    assert same(tensors, states[2])
    swap.revert()
    assert same(tensors, states[1])
