"""Files that are read with their base only, on live weights: every backend decodes them where the weights are."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import shiradelta as sd
from shiradelta.errors import FormatError, LimitError
from shiradelta.format.codecs import FROM_BASE
from shiradelta.format.codecs.from_base_classes import BaseGrid
from shiradelta.hotswap.choose import LIVE_BACKENDS
from shiradelta.hotswap.from_base import TorchFromBase
from shiradelta.io.context import write_on_base
from tests.swapping import BACKENDS, DEVICE, adapter, bits, why_not

CODECS = [pytest.param(TorchFromBase(), id="torch")]
if why_not(LIVE_BACKENDS["triton"]) is None:
    from shiradelta.hotswap.triton.from_base import TritonFromBase

    CODECS.append(pytest.param(TritonFromBase(), id="triton"))
Weights = dict[str, torch.Tensor]
SHAPES = {"square": (160, 96), "tall": (900, 50), "flat": (5000,)}


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


def check_same(swap: sd.HotSwap, model: dict[str, torch.Tensor], plain: bytes, on_base: bytes) -> dict[str, np.ndarray]:
    """Both forms of a file give the same bits, which are returned, and come off bit for bit."""
    before, found = {name: bits(tensor) for name, tensor in model.items()}, []
    for name, data in ("plain", plain), ("on base", on_base):
        swap.load(name, data)
        swap.switch(name)
        found.append({name: bits(tensor) for name, tensor in model.items()})
        swap.revert()
        assert all(np.array_equal(bits(tensor), before[name]) for name, tensor in model.items())
    assert all(np.array_equal(found[0][name], found[1][name]) for name in model)
    return found[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["ulp", "set"])
@pytest.mark.parametrize("form", [torch.clone, in_strides])
def test_it_does_what_the_plain_form_does(backend: str, op: str, form: Callable[[torch.Tensor], torch.Tensor]):
    model = weights_of(torch.bfloat16, form)
    plain, on_base = step(model, op)
    assert len(on_base) < len(plain)
    before = {name: bits(tensor) for name, tensor in model.items()}
    patched = check_same(sd.HotSwap(model, backend=backend), model, plain, on_base)
    assert not np.array_equal(patched["tall"], before["tall"])


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


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("codec", CODECS)
def test_sections_are_read_and_refused_as_by_numpy(codec: TorchFromBase, size: int):
    """Several tiles of several blocks, with all kinds of classes, and damaged ones."""
    rng, seen, shape = np.random.default_rng(size), set(), (9, 700)
    for widths in (0, 0), (2, 3):
        base = rng.integers(0, 256, math.prod(shape) * size, np.uint8).view(f"<u{size}")
        there = torch.from_numpy(base.view(f"<i{size}" if size > 1 else base.dtype)).to(DEVICE)
        cells = rng.choice(np.array([2, 3, 5, 0x82, 4], np.uint8), (1 << widths[0], 1 << widths[1], 6))
        cuts = np.sort(rng.integers(0, 1 << min(8 * size - 1, 15), 5)).astype(np.uint16)
        lines = [rng.integers(0, 1 << width, count, np.uint8) for width, count in zip(widths, shape, strict=True)]
        grid = BaseGrid(shape[1], 4, lines[0], widths[0], lines[1], widths[1], cuts, cells)
        positions = np.flatnonzero(rng.random(base.size) < 0.1)
        section = np.frombuffer(FROM_BASE.encode_in(positions, grid, base), np.uint8)
        for room in None, codec.room(section, base.size):
            assert codec.decode(section, positions.size, shape, there, room).tolist() == positions.tolist()
        for number in range(16):
            damaged, nnz = section.copy(), positions.size - (number == 0)
            damaged[rng.integers(rng.choice([64, damaged.size]))] ^= number and 1 << rng.integers(8)
            right = said(lambda: FROM_BASE.decode_on(damaged, nnz, shape, base))  # noqa: B023
            assert said(lambda: codec.decode(damaged, nnz, shape, there)) == right  # noqa: B023
            seen.add(right if isinstance(right, str) else "")
    assert seen >= {"bad_index", "wrong_base"}


def said(decode: Callable[[], np.ndarray | torch.Tensor]) -> list[int] | str:
    """What a decoder finds, or its reason."""
    try:
        return decode().tolist()
    except FormatError as error:
        return error.reason


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("from_disk", [True, False])
def test_it_is_read_with_what_is_beneath_active_adapters(backend: str, from_disk: bool, tmp_path: Path):
    """Two adapters that overlap are active, and the file was made for the base, or for what is there with them."""
    model = weights_of(torch.bfloat16, torch.clone)
    plain, on_base = step(model, "ulp")
    rng, added = np.random.default_rng(5), []
    for _ in range(2):
        values = {name: np.arange(0, tensor.numel(), rng.integers(2, 5)) for name, tensor in model.items()}
        added.append(
            adapter(
                {
                    name: sd.TensorDelta(
                        tuple(model[name].shape), at, rng.standard_normal(at.size).astype(np.float32), "bfloat16"
                    )
                    for name, at in values.items()
                }
            )
        )
    before = {name: bits(tensor) for name, tensor in model.items()}
    swap = sd.HotSwap(model, backend=backend)
    swap.load("plain", plain)
    for number, data in enumerate(added):
        swap.load(str(number), data)
    swap.switch({"0": 1.0, "1": 0.5})
    there = {name: bits(tensor) for name, tensor in model.items()}
    source: Any = on_base
    if from_disk:
        source = tmp_path / "step.shd"
        source.write_bytes(on_base)
    swap.load("on base", source)
    assert all(np.array_equal(bits(tensor), there[name]) for name, tensor in model.items())
    found = []
    for name in "plain", "on base":
        swap.switch(name)
        found.append({other: bits(tensor) for other, tensor in model.items()})
    assert all(np.array_equal(found[0][name], found[1][name]) for name in model)
    swap.switch({"0": 1.0, "1": 0.5})
    _, next_step = step(model, "ulp")
    swap.load("next", next_step)
    swap.revert()
    assert all(np.array_equal(bits(tensor), before[name]) for name, tensor in model.items())
    with pytest.raises(FormatError, match="take out the adapters"):
        swap.load("neither", next_step)
