"""What only a GPU has: streams, graphs, memory of the device.  Run there with TRITON_INTERPRET=0."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

import shiradelta as sd
from shiradelta.hotswap.choose import LIVE_BACKENDS
from tests.swapping import GPU, adapter, bits, formula, random_delta, weights

pytestmark = pytest.mark.skipif(not GPU, reason="no GPU, or Triton's interpreter is on")

SHAPE = (2048, 2048)


@pytest.fixture
def layer() -> torch.nn.Linear:
    layer = torch.nn.Linear(*SHAPE, bias=False, dtype=torch.bfloat16, device="cuda")
    layer.weight = torch.nn.Parameter(weights(SHAPE, "bfloat16"), requires_grad=False)
    return layer


def session(layer: object, backend: str = "auto") -> tuple[sd.HotSwap, list[bytes]]:
    files = [adapter({"weight": random_delta(SHAPE, 40_000, seed)}) for seed in range(2)]
    swap = sd.HotSwap(layer, backend=backend)
    for name, data in zip("ab", files, strict=True):
        swap.load(name, data)
    return swap, files


@pytest.mark.parametrize("backend", [name for name, row in LIVE_BACKENDS.items() if row.works_on("cuda")])
def test_work_before_sees_the_old_weights_and_work_after_the_new(layer: torch.nn.Linear, backend: str):
    """Forward passes and switches are queued on a stream without waiting for any of them."""
    swap, files = session(layer, backend)
    base = bits(layer.weight)
    x = torch.randn(4096, SHAPE[1], dtype=torch.bfloat16, device="cuda")
    expected: dict[str | None, torch.Tensor] = {}
    for name in (None, "a", "b"):
        swap.switch(name)
        expected[name] = layer(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    rng = np.random.default_rng(0)
    order = [(None, "a", "b")[i] for i in rng.integers(0, 3, 60)]
    outputs = []
    with torch.cuda.stream(stream):
        for name in order:
            swap.switch(name, stream=stream)
            outputs.append(layer(x))
    swap.changed()  # on another stream, and no reason to forget this one
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # so that the next pass is late
        order.append(order[-1])
        outputs.append(layer(x))
    # From another stream at once: it follows all that is queued there, the late pass too.
    swap.switch("b")
    assert np.array_equal(bits(layer.weight), formula(base, "bfloat16", [(files[1], 1)], "weight"))
    stream.synchronize()
    assert all(torch.equal(output, expected[name]) for name, output in zip(order, outputs, strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, in compiling
@pytest.mark.parametrize("make", ["graph", "compile"])
def test_captured_models_go_on(layer: torch.nn.Linear, make: str):
    swap, _ = session(layer)
    x = torch.randn(16, SHAPE[1], dtype=torch.bfloat16, device="cuda")
    run: Callable[[], torch.Tensor]
    if make == "compile":
        compiled = torch.compile(layer)
        run = lambda: compiled(x)  # noqa: E731
    else:
        layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = layer(x)

        def run() -> torch.Tensor:
            graph.replay()
            return output.clone()

    before = run()
    for name in ("a", "b"):
        swap.switch(name)
        assert torch.equal(run(), layer(x))
        assert not torch.equal(run(), before)
    swap.revert()
    assert torch.equal(run(), before)


def test_memory(layer: torch.nn.Linear):
    """A loaded adapter takes its file, an active one two bytes a nonzero more."""
    swap, _ = session(layer)
    data = adapter({"weight": random_delta(SHAPE, 400_000, 7)})
    swap.switch("a")
    swap.revert()  # compiles the kernels
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    swap.load("big", data)
    loaded = torch.cuda.memory_allocated()
    assert loaded - before <= 1.05 * len(data)
    swap.switch("big")
    active = torch.cuda.memory_allocated()
    assert active - loaded <= 2.1 * 400_000
    swap.revert()
    swap.unload("big")
    assert torch.cuda.memory_allocated() == before


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("backend", [name for name, row in LIVE_BACKENDS.items() if row.works_on("cuda")])
def test_a_model_on_two_gpus(backend: str):
    """Each part on its own device's stream, whichever device is current."""
    model = {f"w{i}": weights(SHAPE, "bfloat16", i).to(f"cuda:{i}") for i in range(2)}
    before = {name: bits(tensor) for name, tensor in model.items()}
    files = [adapter({name: random_delta(SHAPE, 40_000, seed) for name in model}) for seed in range(2)]
    swap = sd.HotSwap(model, backend=backend)
    for name, data in zip("ab", files, strict=True):
        swap.load(name, data)
    streams = [torch.cuda.Stream(device) for device in range(2)]
    for turn, (name, device) in enumerate([("a", 0), ("b", 1), ("a", 1), (None, 0), ("b", 0), ("a", 0)]):
        with torch.cuda.device(device):
            swap.switch(name, stream=streams[turn % 2] if turn > 2 else None)
        torch.cuda.synchronize(0)
        torch.cuda.synchronize(1)
        for key, tensor in model.items():
            on = [(files["ab".index(name)], 1)] if name else []
            assert np.array_equal(bits(tensor), formula(before[key], "bfloat16", on, key)), turn
    swap.revert()
    assert all(np.array_equal(bits(tensor), before[name]) for name, tensor in model.items())


def test_pinned_memory_is_not_shared_though_the_system_lists_it_so():
    model = {"weight": weights(SHAPE, "bfloat16").cpu().pin_memory()}
    before = bits(model["weight"])
    swap, files = session(model)
    swap.switch("a")
    assert np.array_equal(bits(model["weight"]), formula(before, "bfloat16", [(files[0], 1)], "weight"))
