"""Any order of loads, switches, failures and reverts, against a plain dictionary of arrays."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shiradelta import HotSwap
from shiradelta.errors import DeltaError, TargetError
from shiradelta.format.codecs import VALUE_OPTIONS
from tests.swapping import adapter, bits, formula, random_delta, weights

SHAPES = {"w": (9, 11), "v": (40,)}
ADDS = list(VALUE_OPTIONS)
COUNT = len(ADDS) + 2
SETS = {str(i) for i in range(len(ADDS), COUNT)}
NAMES = st.sampled_from([str(i) for i in range(COUNT)])
STRENGTHS = st.floats(-4, 4, width=32)


def made(number: int, dtype: str) -> bytes:
    """The last two set elements, the others add, one for each value codec."""
    op = "add" if number < len(ADDS) else "set"
    tensors = {
        name: random_delta(shape, 6 + 3 * number, 7 * number + i, dtype, op)
        for i, (name, shape) in enumerate(SHAPES.items())
        if number != 2 or name == "w"
    }
    return adapter(tensors, ADDS[number % len(ADDS)])


FILES = {dtype: {str(i): made(i, dtype) for i in range(COUNT)} for dtype in ("bfloat16", "float16", "float32")}


class Switching(RuleBasedStateMachine):
    """The session, and beside it the base and what is on it."""

    @initialize(dtype=st.sampled_from(list(FILES)), backend=st.sampled_from(["auto", "numpy", "torch"]))
    def start(self, dtype: str, backend: str) -> None:
        self.dtype = dtype
        self.tensors = {
            name: weights(shape, dtype, i, special=True).cpu() for i, (name, shape) in enumerate(SHAPES.items())
        }
        self.base = {name: bits(tensor) for name, tensor in self.tensors.items()}
        self.swap = HotSwap(self.tensors, backend=backend)
        self.loaded: set[str] = set()
        self.active: dict[str, float] = {}

    @rule(name=NAMES)
    def load(self, name: str) -> None:
        if name in self.loaded:
            with pytest.raises(DeltaError):
                self.swap.load(name, FILES[self.dtype][name])
        else:
            self.swap.load(name, FILES[self.dtype][name])
            self.loaded.add(name)

    @rule(name=NAMES)
    def unload(self, name: str) -> None:
        if name in self.loaded and name not in self.active:
            self.swap.unload(name)
            self.loaded.remove(name)
        else:
            with pytest.raises(DeltaError):
                self.swap.unload(name)

    @rule(wanted=st.dictionaries(NAMES, STRENGTHS, max_size=3))
    def switch(self, wanted: dict[str, float]) -> None:
        wanted = {name: 1.0 if name in SETS else strength for name, strength in wanted.items()}
        if set(wanted) <= self.loaded and not set(wanted).issuperset(SETS):
            assert self.swap.switch(wanted).active == wanted
            self.active = wanted
        else:
            with pytest.raises(DeltaError):
                self.swap.switch(wanted)

    @rule(name=NAMES)
    def inside_a_block(self, name: str) -> None:
        if name in self.loaded:
            with self.swap.applied(name):
                self.compare({name: 1.0})

    @rule()
    def revert(self) -> None:
        self.swap.revert()
        self.active = {}

    @precondition(lambda self: self.loaded)
    @rule(seed=st.integers(1, 99), counted=st.booleans(), noticed=st.booleans())
    def write_from_outside(self, seed: int, counted: bool, noticed: bool) -> None:
        """A new base, while anything is active."""
        for i, (name, tensor) in enumerate(self.tensors.items()):
            (tensor if counted else tensor.data).copy_(weights(SHAPES[name], self.dtype, seed + i, special=True))
        now = {name: bits(tensor) for name, tensor in self.tensors.items()}
        for call in (self.swap.revert, lambda: self.swap.switch(self.active)) if noticed else ():
            with pytest.raises(TargetError, match="changed from outside"):
                call()
        self.swap.rebase()
        self.base, self.active = now, {}

    @precondition(lambda self: self.loaded)
    @rule(data=st.data(), at=st.integers(1, 4))
    def fail(self, data: st.DataObject, at: int) -> None:
        """The at-th write does half its work and raises."""
        name = data.draw(st.sampled_from(sorted(self.loaded)))
        backend = self.swap._devices._backends["cpu"]
        write, calls = type(backend).write, 0

        def failing(target: object, positions: object, new: object) -> None:
            nonlocal calls
            calls += 1
            if calls == at:
                write(backend, target, positions[: len(positions) // 2], new[: len(positions) // 2])
                raise MemoryError
            write(backend, target, positions, new)

        backend.write = failing
        try:
            with suppress(MemoryError):
                self.swap.switch(name)
                self.active = {name: 1.0}
        finally:
            del backend.write

    @invariant()
    def is_the_formula(self) -> None:
        if hasattr(self, "swap"):
            assert self.swap.active == self.active
            self.compare(self.active)

    def compare(self, active: dict[str, float]) -> None:
        files = [(FILES[self.dtype][name], strength) for name, strength in active.items()]
        for name, tensor in self.tensors.items():
            assert np.array_equal(bits(tensor), formula(self.base[name], self.dtype, files, name)), name

    def teardown(self) -> None:
        if hasattr(self, "swap"):
            self.swap.revert()
            self.compare({})


TestSwitching = Switching.TestCase
TestSwitching.settings = settings(stateful_step_count=15)
