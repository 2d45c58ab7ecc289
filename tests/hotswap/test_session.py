"""HotSwap: every backend gives the formula's bits; the session is exact, atomic and plain about what it refuses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import shiradelta as sd
from shiradelta import HotSwap
from shiradelta.backends.choose import choose
from shiradelta.backends.libshd.decoder import LoadedTensor
from shiradelta.errors import ArgumentError, BaseMismatchError, DeltaError, FormatError, ShiraDeltaError, TargetError
from shiradelta.format.codecs import INDEX_CODECS, VALUE_OPTIONS
from shiradelta.format.codecs.smallest import smallest_section
from shiradelta.format.draw import Draw
from shiradelta.hotswap import patched, session
from shiradelta.hotswap.layers import Held
from shiradelta.hotswap.numpy import NumpyBackend
from tests import BRIEF
from tests.pairs import pairs
from tests.swapping import (
    BACKENDS_IN_TIME,
    DEVICE,
    DTYPES,
    GPU,
    adapter,
    bits,
    file,
    formula,
    random_delta,
    weights,
)

# Triton's interpreter computes in NumPy, which warns of infinities and NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

SHAPE = (130, 70)
VALUES = list(VALUE_OPTIONS)


def make(model: object, backend: str = "auto", **files: bytes) -> HotSwap:
    swap = HotSwap(model, backend=backend)
    for name, data in files.items():
        swap.load(name, data)
    return swap


# ------------------------------------------------------------------------------------------------ bits


@pairs(backend=BACKENDS_IN_TIME, dtype=DTYPES, values=VALUES)
def test_every_value_codec_on_every_dtype(backend: str, dtype: str, values: str):
    base = weights(SHAPE, dtype, special=True)
    before = bits(base)
    files = {
        "a": adapter({"w": random_delta(SHAPE, 2000, 1, dtype)}, values),
        "b": adapter({"w": random_delta(SHAPE, 900, 2, dtype, scale=1e-3)}, values),
        "s": adapter({"w": random_delta(SHAPE, 500, 3, dtype, "set")}),
    }
    swap = make({"w": base}, backend, **files)
    for wanted in ({"a": 1.0}, {"a": -0.7}, {"s": 1.0}, {"b": 2.5, "a": 0.3}, {"s": 1.0, "b": 1e-8, "a": 3e38}):
        swap.switch(wanted)
        expected = formula(before, dtype, [(files[name], alpha) for name, alpha in wanted.items()])
        assert np.array_equal(bits(base), expected), wanted
        assert swap.changed() == np.count_nonzero(expected != before)
    swap.revert()
    assert np.array_equal(bits(base), before)


KINDS_OF_POSITIONS = ["all", "rows", "column", "dense", "few", "spread", "crossings", "drawn"]
DRAWS = {"drawn": Draw(5, 500)}


def positions_of(kind: str, numel: int, columns: int) -> np.ndarray:
    every = np.arange(numel)
    crossed = (every // columns % 4 == 0) & (every % columns % 4 == 0)
    return {
        "all": every,
        "rows": every[(every // columns) % 7 == 3],
        "column": every[every % columns == 5],
        "dense": np.flatnonzero(np.random.default_rng(0).random(numel) < 0.4),
        "few": np.array([0, 1, numel - 1]),
        "spread": every[::53],
        "crossings": every[crossed & (every % 3 > 0)],
        "drawn": DRAWS["drawn"].positions(numel)[3:],
    }[kind]


@pytest.mark.parametrize("backend", BACKENDS_IN_TIME)
@pytest.mark.parametrize("kind", KINDS_OF_POSITIONS)
def test_every_kind_of_positions(backend: str, kind: str):
    base = weights(SHAPE, "bfloat16")
    before = bits(base)
    positions = positions_of(kind, base.numel(), SHAPE[1])
    values = np.random.default_rng(1).normal(size=positions.size)
    known = {"base_bits": before[positions], "draw": DRAWS.get(kind)}
    data = adapter({"w": sd.TensorDelta(SHAPE, positions, values, dtype="bfloat16", **known)})
    swap = make({"w": base}, backend, a=data)
    swap.switch("a", 0.5)
    assert np.array_equal(bits(base), formula(before, "bfloat16", [(data, 0.5)]))
    swap.revert()
    assert np.array_equal(bits(base), before)


def test_these_positions_are_stored_in_every_way():
    numel = SHAPE[0] * SHAPE[1]
    chosen = {
        smallest_section(positions_of(kind, numel, SHAPE[1]), SHAPE, draw=DRAWS.get(kind))[0]
        for kind in KINDS_OF_POSITIONS
    }
    assert chosen == {id for id, codec in INDEX_CODECS.by_id.items() if not codec.needs_base}


@pytest.mark.parametrize("backend", BACKENDS_IN_TIME)
@pytest.mark.parametrize("dtype", ["bool", "float8_e4m3fn", "int64", "float32"])
def test_set_on_any_dtype(backend: str, dtype: str):
    base = torch.zeros(SHAPE, dtype=getattr(torch, dtype), device=DEVICE)
    before = bits(base)
    data = adapter({"w": random_delta(SHAPE, 300, 1, dtype, "set", base=base)})
    with sd.open_delta(data) as delta:
        positions, new = delta["w"].positions(), delta["w"].bits()
    swap = make({"w": base}, backend, a=data)
    swap.switch("a")
    assert np.array_equal(bits(base)[positions], new)
    swap.revert()
    assert np.array_equal(bits(base), before)


@pytest.mark.parametrize("backend", BACKENDS_IN_TIME)
def test_a_strided_tensor_is_written_where_it_lies(backend: str):
    storage = weights((70, 260), "bfloat16")
    view = storage[:, ::2].t()  # 130 x 70
    before, outside = bits(view), storage[:, 1::2].clone()
    data = adapter({"w": random_delta(SHAPE, 700, 4, base=view)})
    swap = make({"w": view}, backend, a=data)
    swap.switch("a")
    assert np.array_equal(bits(view), formula(before, "bfloat16", [(data, 1)]))
    assert torch.equal(storage[:, 1::2], outside)
    swap.revert()
    assert np.array_equal(bits(view), before)


@pytest.mark.parametrize("backend", BACKENDS_IN_TIME)
@pytest.mark.parametrize(("numel", "dtype"), [((1 << 31) + 9000, "int16"), ((1 << 32) + 9000, "uint8")])
def test_positions_past_31_and_32_bits(backend: str, numel: int, dtype: str):
    """The memory is never touched but for a few pages."""
    base = torch.from_numpy(np.zeros(numel, dtype)).to(DEVICE)
    first = np.arange(numel - 8000, numel - 10, 3)
    positions = np.concatenate([[0, 77, (1 << 31) - 1, 1 << 31], first[first > 1 << 31], [numel - 1]])
    values = np.random.default_rng(0).integers(1, 99, positions.size).astype(f"u{base.element_size()}")
    data = adapter({"w": sd.TensorDelta((numel,), positions, values, dtype, "set")})
    swap = make({"w": base}, backend, a=data)
    swap.switch("a")
    at = torch.from_numpy(positions).to(DEVICE)
    assert np.array_equal(bits(base[at]), values)
    assert swap.changed() == positions.size
    swap.revert()
    assert not base[at].any()


@pytest.mark.parametrize("backend", BACKENDS_IN_TIME)
def test_many_blocks_and_tensors_of_all_ranks(backend: str):
    shapes = {"scalar": (), "vector": (50,), "cube": (7, 11, 13), "large": (300, 1000), "empty": (0, 4), "none": (5, 5)}
    base = {name: weights(shape, "bfloat16", i) for i, (name, shape) in enumerate(shapes.items())}
    before = {name: bits(tensor) for name, tensor in base.items()}
    nnz = {"scalar": 1, "vector": 9, "cube": 100, "large": 30_000, "empty": 0, "none": 0}
    data = adapter({n: random_delta(s, nnz[n], i, base=base[n]) for i, (n, s) in enumerate(shapes.items())}, "int4")
    swap = make(base, backend, a=data)
    report = swap.switch("a", 0.8)
    assert report.nonzeros == 30_110
    for name, tensor in base.items():
        assert np.array_equal(bits(tensor), formula(before[name], "bfloat16", [(data, 0.8)], name)), name
    swap.revert()
    assert all(np.array_equal(bits(base[name]), before[name]) for name in base)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS_IN_TIME)
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_switches_leave_nothing_behind(backend: str, dtype: str):
    """Among 8 adapters with random strengths: a thousand; fewer on a desk, and by another device's backend on a CPU."""
    rng = np.random.default_rng(7)
    shapes = {"w": (40, 60), "v": (90,)}
    base = {name: weights(shape, dtype, i) for i, (name, shape) in enumerate(shapes.items())}
    before = {name: bits(tensor) for name, tensor in base.items()}
    files = {
        str(i): adapter(
            {
                name: random_delta(shape, 20 + 5 * i, 10 * i + j, dtype)
                for j, (name, shape) in enumerate(shapes.items())
            },
            VALUES[i % len(VALUES)],
        )
        for i in range(8)
    }
    swap = make(base, backend, **files)
    count = {"libshd": 1000, "numpy": 1000, "torch": 250, "triton": 80}[backend] if DEVICE == "cpu" else 1000
    count //= 8 if BRIEF else 1
    sampled = set(rng.choice(count, min(count, 20), replace=False).tolist())
    for number in range(count):
        chosen = rng.choice(8, rng.choice([1, 1, 1, 2, 3]), replace=False)
        wanted = {str(i): float(np.float32(rng.normal())) for i in chosen}
        swap.switch(wanted)
        if number in sampled:
            for name, tensor in base.items():
                expected = formula(before[name], dtype, [(files[i], alpha) for i, alpha in wanted.items()], name)
                assert np.array_equal(bits(tensor), expected), (number, name)
    swap.revert()
    assert all(np.array_equal(bits(base[name]), before[name]) for name in base)


def test_the_order_of_loading_and_naming_does_not_count():
    files = [adapter({"w": random_delta(SHAPE, 4000, i, "float32")}, "f32") for i in range(3)]
    results = []
    for order in ((0, 1, 2), (2, 0, 1)):
        base = weights(SHAPE, "float32").cpu()
        swap = make({"w": base}, **{f"{len(order) - i}{k}": files[k] for i, k in enumerate(order)})
        swap.switch({name: 0.1 * (int(name[1]) + 1) for name in swap.loaded})
        results.append(bits(base))
    assert np.array_equal(*results)


def test_sums_start_from_the_first_contribution():
    """-0 + -0 is -0; starting from +0 would make it +0."""
    base = torch.full((4,), -0.0)
    data = [adapter({"w": sd.TensorDelta((4,), [1, i], [-0.0, 0.5], "float32")}, "f32") for i in (2, 3)]
    swap = make({"w": base}, a=data[0], b=data[1])
    swap.switch({"a": 1.0, "b": 1.0})
    assert bits(base)[1] == 0x80000000


@pytest.mark.parametrize("backend", BACKENDS_IN_TIME)
def test_numpy_arrays_and_bfloat16_as_uint16(backend: str):
    base = {"f": np.ones((30, 20), np.float32), "b": bits(weights((30, 20), "bfloat16")).reshape(30, 20)}
    before = {name: array.copy() for name, array in base.items()}
    data = adapter({"f": random_delta((30, 20), 50, 1, "float32"), "b": random_delta((30, 20), 50, 2, "bfloat16")})
    swap = make(base, backend, a=data)
    swap.switch("a")
    assert np.array_equal(bits(base["f"]), formula(bits(before["f"]), "float32", [(data, 1)], "f"))
    assert np.array_equal(bits(base["b"]), formula(bits(before["b"]), "bfloat16", [(data, 1)], "b"))
    swap.revert()
    assert all(np.array_equal(base[name], before[name]) for name in base)


# --------------------------------------------------------------------------------------------- session


@pytest.fixture
def base() -> dict[str, torch.Tensor]:
    return {"w": weights(SHAPE, "bfloat16").cpu()}


@pytest.fixture
def one(base: dict[str, torch.Tensor]) -> bytes:
    return adapter({"w": random_delta(SHAPE, 500, 1, base=base["w"])})


@pytest.fixture
def two(base: dict[str, torch.Tensor]) -> bytes:
    return adapter({"w": random_delta(SHAPE, 400, 2, base=base["w"])}, "int4")


def test_reports_and_memory(base: dict[str, torch.Tensor], one: bytes, two: bytes):
    swap = HotSwap(base)
    report = swap.load("one", one)
    assert (report.matched, report.unmatched, report.unchecked, report.nonzeros) == ({"w": "w"}, (), (), 500)
    assert report.nbytes <= 1.05 * len(one)
    assert swap.loaded == {"one": report}
    assert swap.active == {}
    assert swap.nbytes == report.nbytes
    assert swap.switch("one", strength=0.5).active == {"one": 0.5}
    assert swap.nbytes == report.nbytes + 2 * 500
    assert swap.switch({}).tensors == 0


@pytest.mark.parametrize("timeout", [0, -3, 1e-9, 1e30, float("inf"), float("nan")])
def test_a_time_that_no_process_can_wait_is_refused(base: dict[str, torch.Tensor], timeout: float):
    with pytest.raises(ArgumentError, match=r"is no time to wait; give seconds, from 0\.001 to 1e\+08"):
        HotSwap(base, timeout=timeout)


def test_the_base_is_checked_through_what_is_active(base: dict[str, torch.Tensor], one: bytes, two: bytes):
    swap = make(base, one=one)
    swap.switch("one")
    swap.load("two", two)  # made against the base, which is no longer what memory holds
    swap.switch("two")
    assert np.array_equal(bits(base["w"]), formula(bits(weights(SHAPE, "bfloat16")), "bfloat16", [(two, 1)]))


def test_applied_goes_back(base: dict[str, torch.Tensor], one: bytes, two: bytes):
    swap = make(base, one=one, two=two)
    swap.switch("one", 0.5)
    inside = bits(base["w"])
    with swap.applied({"two": 1.0, "one": 1.0}) as report:
        assert report.active == swap.active == {"two": 1.0, "one": 1.0}
    assert swap.active == {"one": 0.5}
    with pytest.raises(RuntimeError), swap.applied("two"):
        raise RuntimeError
    assert swap.active == {"one": 0.5}
    assert np.array_equal(bits(base["w"]), inside)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("at", [1, 2])
def test_applied_goes_back_after_an_interrupt(
    monkeypatch: pytest.MonkeyPatch, base: dict[str, torch.Tensor], one: bytes, at: int
):
    """On its way in, after the weights are written, and on its way out."""
    swap = make(base, one=one)
    before = bits(base["w"])
    increment_versions = patched.increment_versions
    calls: list[int] = []

    def interrupted(helds: Any) -> None:
        increment_versions(helds)
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(patched, "increment_versions", interrupted)
    with pytest.raises(KeyboardInterrupt), swap.applied("one"):
        pass
    assert swap.active == {}
    assert np.array_equal(bits(base["w"]), before)


@pytest.mark.skipif(GPU or choose().name != "libshd", reason="libshd is not what writes here")
def test_a_handler_that_raises_waits_until_it_is_known_what_was_written(monkeypatch: pytest.MonkeyPatch):
    """Of a signal other than Ctrl-C."""
    model = {"w": weights(SHAPE, "float32")}
    before = bits(model["w"])
    swap = make(model, "libshd", x=adapter({"w": random_delta(SHAPE, 300, 4, "float32")}))
    apply = LoadedTensor.apply

    def late(number: int, frame: object) -> None:
        raise TimeoutError

    def then_alarmed(self: LoadedTensor, *arguments: Any) -> None:
        apply(self, *arguments)
        os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(LoadedTensor, "apply", then_alarmed)
    old = signal.signal(signal.SIGUSR1, late)
    try:
        with pytest.raises(TimeoutError):
            swap.switch("x")
        assert signal.getsignal(signal.SIGUSR1) is late
    finally:
        signal.signal(signal.SIGUSR1, old)
    swap.revert()
    assert np.array_equal(bits(model["w"]), before)


def test_unload(base: dict[str, torch.Tensor], one: bytes):
    swap = make(base, one=one)
    swap.switch("one")
    with pytest.raises(DeltaError, match="is active"):
        swap.unload("one")
    swap.revert()
    swap.unload("one")
    with pytest.raises(DeltaError, match=r"'one' is not loaded \(none are\)"):
        swap.switch("one")


def test_loading_in_the_background(base: dict[str, torch.Tensor], one: bytes):
    swap = HotSwap(base)
    assert swap.load_async("one", file(one)).result().nonzeros == 500
    with pytest.raises(DeltaError, match=r"loaded already; take it out \(del swap\['one'\]\)"):
        swap.load_async("one", one, skip="*").result()
    swap.switch("one")
    del swap["one"]  # what the message says, for an adapter that is active, too
    swap.load("one", one)
    with pytest.raises(ArgumentError, match="name is empty"):
        swap.load("", one)
    with pytest.raises(FormatError):
        swap.load_async("two", one[:100]).result()


def test_threads(base: dict[str, torch.Tensor], one: bytes, two: bytes):
    """What a thread sees inside `applied` is its own adapter, whatever the others do."""
    before = bits(base["w"])
    swap = make(base, one=one, two=two)
    expected = {name: formula(before, "bfloat16", [(data, 1)]) for name, data in (("one", one), ("two", two))}
    wrong: list[str] = []

    def work(name: str) -> None:
        for _ in range(30):
            with swap.applied(name):
                if not np.array_equal(bits(base["w"]), expected[name]):
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("one", "two", "one")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert np.array_equal(bits(base["w"]), before)


def test_addresses_gradients_and_versions(one: bytes):
    layer = torch.nn.Linear(SHAPE[1], SHAPE[0], bias=False, dtype=torch.bfloat16)
    layer.weight.data.copy_(weights(SHAPE, "bfloat16"))
    address = layer.weight.data_ptr()
    swap = HotSwap(layer, names={"w": "weight"})
    swap.load("one", one)
    output = layer(torch.ones(2, SHAPE[1], dtype=torch.bfloat16, requires_grad=True))
    swap.switch("one")
    assert layer.weight.requires_grad
    assert layer.weight.data_ptr() == address
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_inference_tensors(one: bytes):
    with torch.inference_mode():
        base = {"w": weights(SHAPE, "bfloat16").clone()}
    for backend in ("auto", "torch"):
        before = bits(base["w"])
        swap = make(base, backend, one=one)
        swap.switch("one")
        swap.revert()
        assert np.array_equal(bits(base["w"]), before)


@pytest.mark.slow
def test_importing_brings_neither_torch_nor_triton():
    code = (
        "import sys, numpy as np, shiradelta as sd;"
        "s = sd.HotSwap({'w': np.zeros(4, np.float32)});"
        "sd.save_delta(sys.argv[1], {'w': sd.TensorDelta((4,), [1], [.5], 'float32')});"
        "s.load('a', sys.argv[1]); s.switch('a'); s.revert();"
        "assert not {'torch', 'triton', 'transformers'} & set(sys.modules)"
    )
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"lazy-{os.getpid()}.shd"
    try:
        subprocess.run([sys.executable, "-c", code, path], check=True)
    finally:
        path.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------- atomicity


@pytest.mark.parametrize(
    "error",
    [MemoryError, *(pytest.param(e, marks=pytest.mark.slow) for e in (KeyboardInterrupt, torch.OutOfMemoryError))],
)
@pytest.mark.parametrize("step", ["positions", "payload", "read", "write", "room", "add"])
def test_a_failure_anywhere_leaves_the_state_before(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException], step: str
):
    failed = [at for at in range(1, 5) if _fails_and_keeps_the_state(monkeypatch, error, step, at)]
    assert failed
    assert failed == list(range(1, failed[-1] + 1))


@cache
def _two_tensors(seed: int) -> bytes:
    return adapter({"w": random_delta(SHAPE, 300, seed), "v": random_delta((40,), 10, seed + 9)})


def _fails_and_keeps_the_state(monkeypatch: pytest.MonkeyPatch, error: type[BaseException], step: str, at: int) -> bool:
    """Whether there is a call number `at` of the step, which then fails."""
    base = {"w": weights(SHAPE, "bfloat16").cpu(), "v": weights((40,), "bfloat16", 1).cpu()}
    swap = make(base, "numpy", one=_two_tensors(0), two=_two_tensors(1))
    swap.switch("one", 0.5)
    state = {name: bits(tensor) for name, tensor in base.items()}
    original = getattr(NumpyBackend, step)
    calls = 0

    def failing(self: NumpyBackend, *arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == at:
            if step == "write":  # half of it is written
                target, positions, new = arguments
                original(self, target, positions[: len(positions) // 2], new[: len(positions) // 2])
            raise error
        return original(self, *arguments)

    monkeypatch.setattr(NumpyBackend, step, failing)
    try:
        swap.switch({"two": 1.0, "one": 1.0})
    except error:
        assert swap.active == {"one": 0.5}
        assert all(np.array_equal(bits(base[name]), state[name]) for name in base)
    else:
        assert calls < at
    monkeypatch.undo()
    swap.revert()
    assert all(
        torch.equal(base[name], weights(t.shape, "bfloat16", i).cpu()) for i, (name, t) in enumerate(base.items())
    )
    return calls >= at


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, also in a background job, which starts with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(
    ("where", "what"), [(NumpyBackend, "write"), (Held, "check_model"), (patched, "increment_versions")]
)
def test_an_interrupt_waits_for_a_whole_state(
    monkeypatch: pytest.MonkeyPatch, base: dict[str, torch.Tensor], one: bytes, where: Any, what: str
):
    swap = make(base, "numpy", one=one)
    before = bits(base["w"])
    own = getattr(where, what)

    def interrupted(*arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        own(*arguments)

    monkeypatch.setattr(where, what, interrupted)
    with pytest.raises(KeyboardInterrupt):
        swap.switch("one")
    assert swap.active == {}
    assert np.array_equal(bits(base["w"]), before)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_failed_way_back_is_not_kept_quiet(
    monkeypatch: pytest.MonkeyPatch, base: dict[str, torch.Tensor], one: bytes
):
    swap = make(base, "numpy", one=one)

    def broken(*_: object) -> None:
        raise MemoryError("no more")

    monkeypatch.setattr(NumpyBackend, "write", broken)
    with pytest.raises(TargetError, match="unknown state"):
        swap.switch("one")
    monkeypatch.undo()
    for call in (swap.revert, swap.changed, lambda: swap.load("two", one)):
        with pytest.raises(TargetError, match="unknown state"):
            call()


# ------------------------------------------------------------------------------------------- bad input


def test_wrong_base(base: dict[str, torch.Tensor], one: bytes):
    with sd.open_delta(one) as delta:
        touched = int(delta["w"].positions()[7])
    view = base["w"].view(-1)
    view[touched] += 1
    swap = HotSwap(base)
    with pytest.raises(BaseMismatchError, match="tensor 'w' is not the one that the delta was made against"):
        swap.load("one", one)
    assert swap.load("one", one, check=False).unchecked == ("w",)


def test_already_patched(base: dict[str, torch.Tensor], one: bytes):
    make(base, one=one).switch("one")
    with pytest.raises(BaseMismatchError, match="already holds the result"):
        HotSwap(base).load("one", one)


def test_a_tensor_that_the_model_lacks_is_an_error_unless_a_pattern_names_it(base: dict[str, torch.Tensor]):
    both = adapter({"w": random_delta(SHAPE, 5, 1), "x.y": random_delta((3,), 1, 2)})
    swap = HotSwap(base)
    with pytest.raises(BaseMismatchError, match=r"1 of 2 tensors not found in the model: 'x\.y' .*skip="):
        swap.load("both", both)
    for skip in ("x.*", ["x.y"], ("*",)):
        report = swap.load(str(skip), both, skip=skip)
        assert (report.matched, report.unmatched) == ({"w": "w"}, ("x.y",))
    for skip in ("y", ["*", "w"]):
        with pytest.raises(
            ArgumentError, match=r"skip pattern '[yw]' matches no tensor that would otherwise be refused"
        ):
            swap.load("useless", both, skip=skip)
    with pytest.raises(BaseMismatchError, match="2 of 2 tensors not found in the model"):
        HotSwap({"unlike": base["w"]}).load("none", both, skip="*")


def test_a_tensor_that_is_left_out_makes_no_other_unclear():
    """The layers of text and of vision both fit the model's, until one half is left out."""
    shape, layers = (8, 8), [f"layers.{i}.w" for i in range(2)]
    both = adapter({f"{part}.{name}": random_delta(shape, 4, 1) for part in ("text", "vision") for name in layers})
    swap = HotSwap({name: weights(shape, "bfloat16") for name in layers})
    with pytest.raises(BaseMismatchError, match=r"may both be 'layers\.0\.w'"):
        swap.load("both", both)
    report = swap.load("text", both, skip="vision.*")
    assert report.matched == {f"text.{name}": name for name in layers}
    assert report.unmatched == tuple(f"vision.{name}" for name in layers)


def test_strict_is_taken_for_a_release(base: dict[str, torch.Tensor], one: bytes):
    both = adapter({"w": random_delta(SHAPE, 5, 1), "x": random_delta((3,), 1, 2)})
    swap = HotSwap(base)
    with pytest.warns(DeprecationWarning, match=r'strict=False is deprecated; use skip="\*"'):
        assert swap.load("both", both, strict=False).unmatched == ("x",)
    with pytest.warns(DeprecationWarning, match="strict=True is deprecated"):
        swap.load("one", one, strict=True)
    with pytest.warns(DeprecationWarning, match="strict=True"), pytest.raises(BaseMismatchError, match="'x'"):
        swap.load("strict", both, strict=True)


def test_computed_weights_are_refused_by_name():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    data = adapter({f"{i}.weight": random_delta((4, 4), 2, i) for i in range(2)})
    torch.nn.utils.parametrize.register_parametrization(model[0], "weight", torch.nn.Identity())
    swap = HotSwap(model)
    with pytest.raises(TargetError, match=r"tensor '0\.weight' is computed by a parametrization; "):
        swap.load("a", data, check=False, allow_dtype=True)
    report = swap.load("a", data, check=False, allow_dtype=True, skip="0.*")
    assert report.unmatched == ("0.weight",)
    torch.nn.utils.parametrize.register_parametrization(model[1], "weight", torch.nn.Identity())
    with pytest.raises(TargetError, match="is computed by a parametrization; "):
        HotSwap(model).load("a", data, check=False, allow_dtype=True, skip="*")


def test_names(base: dict[str, torch.Tensor], one: bytes):
    both = adapter({"w": random_delta(SHAPE, 5, 1), "x": random_delta((3,), 1, 2)})
    with pytest.raises(BaseMismatchError, match=r"the model has e\.g\. 'unlike'"):
        HotSwap({"unlike": base["w"]}).load("one", one)
    with pytest.raises(BaseMismatchError, match="the model has no tensors"):
        HotSwap({}).load("one", one)
    assert HotSwap({"deep.model.w": base["w"]}).load("one", one).matched == {"w": "deep.model.w"}
    assert HotSwap({"a": base["w"]}, names={"w": "a"}).load("one", one).matched == {"w": "a"}
    swap = HotSwap({"w": base["w"], "x": torch.zeros(3)}, names=lambda name: None if name == "x" else name)
    assert swap.load("both", both).unmatched == ("x",)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(7, dtype=torch.bfloat16), r"shape \[7\] in the model, the delta was made for \[130, 70\]"),
        (torch.zeros(SHAPE, dtype=torch.float16), "made against a bfloat16 base.*allow_dtype=True"),
        (torch.zeros(SHAPE, dtype=torch.int8), "nothing can be added exactly"),
        (torch.zeros(SHAPE, dtype=torch.complex128), "nothing can be added exactly"),
        (torch.zeros(SHAPE, dtype=torch.bfloat16, device="meta"), "on the meta device"),
        (torch.zeros(1, 70, dtype=torch.bfloat16).expand(SHAPE), "is expanded"),
        (torch.zeros(SHAPE, dtype=torch.bfloat16).to_sparse(), "make it dense first"),
    ],
)
def test_tensors_that_do_not_fit(tensor: torch.Tensor, message: str, one: bytes):
    with pytest.raises(ShiraDeltaError, match=message):
        HotSwap({"w": tensor}).load("one", one)


def test_quantised_tensors_are_refused_by_name(one: bytes):
    kind = type("Params4bit", (torch.nn.Parameter,), {"__module__": "bitsandbytes.nn.modules"})
    tensor = torch.zeros(SHAPE, dtype=torch.bfloat16).as_subclass(kind)
    with pytest.raises(
        TargetError, match=r"tensor 'w' is a bitsandbytes.nn.modules.Params4bit: quantised.*unquantised"
    ):
        HotSwap({"w": tensor}).load("one", one)


def test_read_only_arrays(one: bytes):
    array = np.zeros(SHAPE, np.uint16)
    array.setflags(write=False)
    with pytest.raises(TargetError, match="read-only"):
        HotSwap({"w": array}).load("one", one)


def test_another_dtype_if_allowed(one: bytes):
    base = weights(SHAPE, "float16").cpu()
    before = bits(base)
    swap = HotSwap({"w": base})
    assert swap.load("one", one, allow_dtype=True).unchecked == ("w",)
    swap.switch("one")
    assert np.array_equal(bits(base), formula(before, "float16", [(one, 1)]))
    swap.revert()
    assert np.array_equal(bits(base), before)


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), 1e39])
def test_strengths_that_are_not_finite(base: dict[str, torch.Tensor], one: bytes, strength: float):
    with pytest.raises(DeltaError, match="finite float32"):
        make(base, one=one).switch("one", strength)


def test_a_strength_beside_a_mapping_is_refused(base: dict[str, torch.Tensor], one: bytes):
    """A mapping has its own strengths, and the base has none."""
    swap, before = make(base, one=one), bits(base["w"])
    for adapters in ({"one": 1.0}, {}, None):
        with pytest.raises(ArgumentError, match=r"strength 0\.1 is for one adapter given by name"):
            swap.switch(adapters, 0.1)
        with pytest.raises(ArgumentError, match=r"strength 0\.1"), swap.applied(adapters, 0.1):
            pass
    assert swap.active == {}
    assert np.array_equal(bits(base["w"]), before)
    assert swap.switch("one").active == {"one": 1.0}


def test_flags_of_load_are_keywords(base: dict[str, torch.Tensor], one: bytes):
    with pytest.raises(TypeError, match="positional"):
        make(base).load("one", one, False)


def test_sets_have_no_strength_and_exclude_each_other(base: dict[str, torch.Tensor]):
    shared = random_delta(SHAPE, 50, 1, op="set")
    other = sd.TensorDelta(SHAPE, [int(shared.positions()[3])], np.array([1], np.uint16), dtype="bfloat16", op="set")
    apart = np.setdiff1d(np.arange(60), shared.positions())[:2]
    third = sd.TensorDelta(SHAPE, apart, np.array([1, 2], np.uint16), dtype="bfloat16", op="set")
    swap = make(base, a=adapter({"w": shared}), b=adapter({"w": other}), c=adapter({"w": third}))
    with pytest.raises(DeltaError, match="adapter 'a': set has strength 1 only"):
        swap.switch("a", 0.5)
    with pytest.raises(DeltaError, match="set the same elements of tensor 'w'"):
        swap.switch({"a": 1, "b": 1})
    assert swap.active == {}
    swap.switch({"a": 1, "c": 1})
    assert bits(base["w"])[apart].tolist() == [1, 2]


def test_one_delta_under_two_names(base: dict[str, torch.Tensor], one: bytes):
    with pytest.raises(DeltaError, match="are the same delta"):
        make(base, a=one, b=one).switch({"a": 1, "b": 0.5})


def test_whole_tensors_are_for_folders(base: dict[str, torch.Tensor]):
    new = adapter({"n": sd.TensorDelta((2,), None, np.zeros(2, np.uint16), dtype="bfloat16", op="new")})
    drop = adapter({"w": sd.TensorDelta(SHAPE, None, np.zeros(0), op="drop")})
    with pytest.raises(BaseMismatchError, match=r"'n' is to be added.*use shiradelta\.apply"):
        HotSwap(base).load("new", new)
    with pytest.raises(BaseMismatchError, match="'w' is to be removed"):
        HotSwap(base).load("drop", drop)
    other = adapter({"w": sd.TensorDelta((2,), None, np.zeros(2, np.uint16), dtype="bfloat16", op="replace")})
    with pytest.raises(BaseMismatchError, match=r"'w' is to be replaced whole.*use shiradelta\.apply"):
        HotSwap(base).load("other", other)


def test_a_moved_model(base: dict[str, torch.Tensor], one: bytes):
    layer = torch.nn.Linear(SHAPE[1], SHAPE[0], bias=False, dtype=torch.bfloat16)
    swap = HotSwap(layer, names={"w": "weight"})
    swap.load("one", one, check=False)
    before = layer.weight.data
    layer.weight.data = before.clone()
    with pytest.raises(TargetError, match="'weight' was moved or replaced"):
        swap.switch("one")
    assert torch.equal(before, layer.weight.data)
    assert swap.active == {}
    layer.weight.data = before
    swap.switch("one")
    layer.weight.data = layer.weight.data.clone()
    for work in (swap.revert, swap.changed):
        with pytest.raises(TargetError, match="'weight' was moved or replaced"):
            work()
    assert torch.equal(before, layer.weight.data)
    assert swap.active == {"one": 1}


@pytest.mark.parametrize("backend", BACKENDS_IN_TIME)
def test_memory_that_was_given_back(base: dict[str, torch.Tensor], one: bytes, backend: str):
    """As FSDP does between forward passes; what lies there since is others'."""
    weight = base["w"].clone()  # in a storage that can be resized, unlike memory of NumPy's
    swap = make({"w": weight}, backend, one=one)
    storage, address, size = weight.untyped_storage(), weight.data_ptr(), weight.nbytes
    try:
        storage.resize_(0)
    except RuntimeError:
        assert backend in ("numpy", "libshd")  # their arrays keep it from that
        return
    with pytest.raises(TargetError, match="'w' was moved or replaced"):
        swap.switch("one")
    assert swap.active == {}
    storage.resize_(size)
    if weight.data_ptr() == address:  # the same memory again
        assert swap.switch("one").active == {"one": 1}
    else:
        with pytest.raises(TargetError, match="'w' was moved or replaced"):
            swap.switch("one")


@pytest.mark.parametrize("how", ["assigned", "another parameter", "another buffer", "taken away"])
def test_a_replaced_tensor(how: str):
    model = torch.nn.BatchNorm1d(4)
    name = "running_mean" if how == "another buffer" else "bias"
    swap = make(model, x=adapter({name: random_delta((4,), 2, 1, "float32")}))
    if how == "assigned":
        model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)
    elif how == "another buffer":
        model.double().float()
    else:
        model.bias = None if how == "taken away" else torch.nn.Parameter(model.bias.detach().clone())
    with pytest.raises(TargetError, match=f"'{name}' was moved or replaced"):
        swap.switch("x")


def test_a_strength_of_minus_zero_is_another_than_zero():
    model = {"w": torch.tensor([-0.0, 1.0])}
    swap = make(model, x=adapter({"w": sd.TensorDelta((2,), [0], [3.0], "float32")}, "f32"))
    for strength in (0.0, -0.0):
        swap.switch("x", strength)
        assert np.signbit(model["w"].numpy()[0]) == np.signbit(strength)


def test_tensors_without_elements():
    model = {"v": torch.zeros(0, 4), "w": torch.zeros(0, 4)}
    empty = sd.TensorDelta((0, 4), [], [], "float32")
    swap = make(model, x=adapter({"v": empty, "w": empty}))
    assert swap.switch("x").nonzeros == 0


@pytest.mark.parametrize("backend", BACKENDS_IN_TIME)
def test_weights_at_odd_addresses(backend: str):
    """As safetensors maps them where a tensor of single bytes comes before."""
    if DEVICE != "cpu":
        pytest.skip("a GPU's memory is aligned")
    weight = torch.frombuffer(bytearray(4 * 100 + 1), dtype=torch.float32, offset=1, count=100)
    before = bits(weight)
    data = adapter({"w": random_delta((100,), 30, 1, "float32")})
    swap = make({"w": weight}, backend, x=data)
    swap.switch("x")
    assert np.array_equal(bits(weight), formula(before, "float32", [(data, 1)]))
    swap.revert()
    assert np.array_equal(bits(weight), before)


def test_overlapping_tensors(one: bytes):
    storage = torch.zeros(131, 70, dtype=torch.bfloat16)
    model = {"w": storage[:130], "v": storage[1:]}
    both = adapter({"w": random_delta(SHAPE, 5, 1), "v": random_delta(SHAPE, 5, 2)})
    with pytest.raises(BaseMismatchError, match="'w' and 'v' share memory without being the same"):
        HotSwap(model).load("both", both)


def test_tied_tensors_are_written_once(one: bytes):
    base = weights(SHAPE, "bfloat16").cpu()
    before = bits(base)
    delta = random_delta(SHAPE, 500, 1)
    swap = make({"in": base, "out": base}, a=adapter({"in": delta, "out": delta}))
    swap.switch("a")
    assert np.array_equal(bits(base), formula(before, "bfloat16", [(adapter({"w": delta}), 1)]))
    with pytest.raises(BaseMismatchError, match="tied to another"):
        swap.load("b", adapter({"in": delta, "out": random_delta(SHAPE, 3, 9)}))


def test_what_is_no_model_or_backend(base: dict[str, torch.Tensor], tmp_path: Path):
    with pytest.raises(TargetError, match="a torch module, a pipeline or a mapping"):
        HotSwap([1, 2])
    with pytest.raises(DeltaError, match="backend 'cuda' is unknown"):
        HotSwap(base, backend="cuda")
    with pytest.raises(ShiraDeltaError, match="cannot be read"):
        HotSwap(base).load("a", tmp_path / "nothing.shd")


@pytest.mark.parametrize("backend", BACKENDS_IN_TIME)
def test_damaged_files_are_refused(backend: str):
    """A bit of each section is turned, one after the other: nothing is loaded, and the tensor is named."""
    base = {"w": weights((300, 300), "bfloat16")}
    data = adapter({"w": random_delta((300, 300), 3000, 1, base=base["w"])})
    with sd.open_delta(data) as delta:
        record = delta["w"].record
    swap = HotSwap(base, backend=backend)
    for section in (record.index, record.values):
        damaged = bytearray(data)
        damaged[section.offset + section.stored // 2] ^= 4
        with pytest.raises(FormatError, match="tensor 'w'") as caught:
            swap.load("bad", bytes(damaged))
        assert caught.value.reason == "section_checksum"
    damaged = bytearray(data)
    damaged[record.index.offset : record.index.offset + 16] = b"\xff" * 16  # how large all parts are
    with pytest.raises(FormatError, match=r"tensor 'w'.*section_checksum"):
        swap.load("bad", bytes(damaged))
    assert swap.loaded == {}


@pytest.mark.parametrize("backend", BACKENDS_IN_TIME)
def test_each_file_of_the_same_names_is_looked_at(backend: str):
    """What a session remembers of one kind of file is not taken for files of others."""
    shapes = {"a": (40, 30), "b": (30, 40)}
    base = {name: weights(shape, "bfloat16") for name, shape in shapes.items()}

    def made(seed: int, dtype: str = "bfloat16", **others: tuple[int, int]) -> bytes:
        return adapter({n: random_delta(shape, 100, seed, dtype) for n, shape in {**shapes, **others}.items()})

    swap = HotSwap(base, backend=backend)
    for seed in range(2):
        swap.load(f"good {seed}", made(seed))
        with pytest.raises(BaseMismatchError, match=r"'b'.* shape"):
            swap.load("bad", made(seed, b=(40, 30)))
        with pytest.raises(BaseMismatchError, match="float16 base"):
            swap.load("bad", made(seed, "float16"))
        assert swap.load(f"cast {seed}", made(seed, "float16"), allow_dtype=True).matched == {"a": "a", "b": "b"}
        with pytest.raises(BaseMismatchError, match="1 of 3 tensors not found"):
            swap.load("bad", made(seed, c=(20, 20)))
        assert swap.load(f"some {seed}", made(seed, c=(20, 20)), skip="c").unmatched == ("c",)
        assert swap.load(f"one {seed}", made(seed), only=["b"]).matched == {"b": "b"}
    for name in ("good 1", "one 1"):
        swap.switch(name)
        data = made(1)
        for tensor, weight in base.items():
            plain = weights(shapes[tensor], "bfloat16")
            expected = formula(bits(plain), "bfloat16", [(data, 1.0)] * (name == "good 1" or tensor == "b"), tensor)
            assert np.array_equal(bits(weight), expected), (name, tensor)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_is_refused_at_once(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(sd.ShiraDeltaError, match="not a regular file"):
        make({"w": weights((4, 4), "float32")}, "numpy").load("a", tmp_path / "pipe")


def test_a_switch_that_changes_nothing_starts_no_thread(
    monkeypatch: pytest.MonkeyPatch, base: dict[str, torch.Tensor], one: bytes
):
    swap = make(base, "numpy", one=one)
    report = swap.switch("one")
    monkeypatch.setattr(session, "uninterrupted", None)
    assert swap.switch({"one": 1}) == report
    base["w"].add_(1)
    with pytest.raises(TargetError, match="changed from outside"):
        swap.switch("one")
