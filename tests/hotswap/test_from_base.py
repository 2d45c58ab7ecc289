"""Files that are read with their base only, on live weights: every backend decodes them where the weights are."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch

import shiradelta as sd
from shiradelta.errors import FormatError, LimitError
from shiradelta.io.context import write_on_base
from tests.swapping import BACKENDS, DEVICE, adapter, bits

Weights = dict[str, torch.Tensor]
SHAPES = {"square": (160, 96), "tall": (3000, 50), "flat": (20_000,)}


def weights_of(dtype: torch.dtype, form: Callable[[torch.Tensor], torch.Tensor]) -> Weights:
    torch.manual_seed(0)
    return {name: form((torch.randn(shape) * 0.02).to(dtype).to(DEVICE)) for name, shape in SHAPES.items()}


def step(base: Weights, op: str) -> tuple[bytes, bytes]:
    """(the plain file, the one that is read with its base) of a step that moves small weights, in some rows more."""
    rng, tensors = np.random.default_rng(0), {}
    for name, tensor in base.items():
        there = bits(tensor)
        small = np.abs(tensor.float().cpu().numpy().reshape(-1))
        likely = np.where(small < np.median(small), 0.3, 0.01) * np.resize([1, 0.1], there.size)
        positions = np.flatnonzero(rng.random(there.size) < likely)
        values = rng.choice([-2, -1, 1], positions.size)
        if op == "set":
            values = there[positions] + np.array(1, there.dtype)
        dtype = str(tensor.dtype).removeprefix("torch.")
        tensors[name] = sd.TensorDelta(tuple(tensor.shape), positions, values, dtype, op, there[positions])
    plain, small_form = adapter(tensors), io.BytesIO()
    with sd.open_delta(plain) as delta:
        assert write_on_base(delta, lambda record: bits(base[record.name]), small_form).needs_base
    return plain, small_form.getvalue()


def in_strides(tensor: torch.Tensor) -> torch.Tensor:
    """The same elements with gaps between rows."""
    wide = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 3, dtype=tensor.dtype, device=tensor.device)
    wide[..., : tensor.shape[-1]] = tensor
    return wide[..., : tensor.shape[-1]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["ulp", "set"])
@pytest.mark.parametrize("form", [torch.clone, in_strides])
def test_it_does_what_the_plain_form_does(backend: str, op: str, form: Callable[[torch.Tensor], torch.Tensor]):
    model = weights_of(torch.bfloat16, form)
    plain, on_base = step(model, op)
    assert len(on_base) < len(plain)
    before = {name: bits(tensor) for name, tensor in model.items()}
    swap, found = sd.HotSwap(model, backend=backend), []
    for name, data in ("plain", plain), ("on base", on_base):
        swap.load(name, data)
        swap.switch(name)
        found.append({name: bits(tensor) for name, tensor in model.items()})
        swap.revert()
        assert all(np.array_equal(bits(tensor), before[name]) for name, tensor in model.items())
    assert all(np.array_equal(found[0][name], found[1][name]) for name in model)
    assert not np.array_equal(found[0]["tall"], before["tall"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_weights_are_refused(backend: str):
    model = weights_of(torch.float32, torch.clone)
    _, on_base = step(model, "ulp")
    model["tall"][7] = 3.0
    before = {name: bits(tensor) for name, tensor in model.items()}
    swap = sd.HotSwap(model, backend=backend)
    with pytest.raises(FormatError) as caught:
        swap.load("step", on_base)
    assert (caught.value.reason, caught.value.tensor) == ("wrong_base", "tall")
    assert all(np.array_equal(bits(tensor), before[name]) for name, tensor in model.items())


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_is_within_the_limit(backend: str):
    model = weights_of(torch.float32, torch.clone)
    _, on_base = step(model, "ulp")
    with pytest.raises(LimitError, match="takes"):
        sd.HotSwap(model, backend=backend).load("step", on_base, limit=10_000)
