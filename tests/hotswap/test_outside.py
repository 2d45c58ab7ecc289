"""Weights that something else than the session has written: noticed, refused, and taken as the base on demand."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import shiradelta as sd
from shiradelta import HotSwap
from shiradelta.errors import ArgumentError, BaseMismatchError, TargetError
from shiradelta.hotswap.numpy import NumpyBackend
from tests.pairs import pairs
from tests.swapping import BACKENDS_IN_TIME, DEVICE, GPU, adapter, bits, formula, random_delta, weights

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

SHAPE = (40, 33)
NEW = weights(SHAPE, "float32", 7).cpu()
CHANGED = "was changed from outside since HotSwap last wrote or checked it; call rebase"


def delta(seed: int = 1, shape: tuple[int, ...] = SHAPE, base: Any = None) -> bytes:
    return adapter({"weight": random_delta(shape, 60, seed, "float32", base=base)})


def layer() -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(SHAPE[1], SHAPE[0], bias=False, device=DEVICE)


def step(kind: type[torch.optim.Optimizer], **options: Any) -> Callable[[torch.nn.Linear], object]:
    def write(model: torch.nn.Linear) -> None:
        model.weight.grad = torch.ones_like(model.weight)
        kind(model.parameters(), lr=0.5, **options).step()

    return write


def through_no_grad(model: torch.nn.Linear) -> None:
    with torch.no_grad():
        model.weight.mul_(2)


def in_inference_mode(model: torch.nn.Linear) -> None:
    with torch.inference_mode():
        model.weight[3, 4] += 1


#: Writes that a tensor counts, on every device.
COUNTED: dict[str, Callable[[torch.nn.Linear], object]] = {
    "load_state_dict": lambda model: model.load_state_dict({"weight": NEW}),
    "SGD": step(torch.optim.SGD),
    "AdamW": step(torch.optim.AdamW, foreach=True),
    "no_grad": through_no_grad,
    "inference_mode": in_inference_mode,
    "init": lambda model: torch.nn.init.normal_(model.weight),
    "detach": lambda model: model.weight.detach().copy_(NEW),
}
#: Writes that it does not count.
UNCOUNTED: dict[str, Callable[[torch.nn.Linear], object]] = {
    "data": lambda model: model.weight.data.copy_(NEW),
    "fused": step(torch.optim.AdamW, fused=True),
    "dlpack": lambda model: torch.from_dlpack(model.weight.detach()).copy_(NEW),
}


@pairs(
    backend=BACKENDS_IN_TIME,
    active=[False, True],
    how=[*COUNTED, *UNCOUNTED],
)
def test_writes_from_outside_are_refused_until_rebase(how: str, active: bool, backend: str):
    if GPU and how in UNCOUNTED:
        pytest.skip("not noticed on a GPU")
    model, files = layer(), {"a": delta(1), "b": delta(2)}
    swap = HotSwap(model, backend=backend)
    swap.load("a", files["a"])
    if active:
        swap.switch("a")
    write = {**COUNTED, **UNCOUNTED}[how]
    write(model)
    after = bits(model.weight)
    for call in (
        lambda: swap.switch("a"),
        lambda: swap.switch("a", 0.5),
        swap.revert,
        swap.changed,
        lambda: swap.load("b", files["b"]),
    ):
        with pytest.raises(TargetError, match=f"tensor 'weight' {CHANGED}"):
            call()
        assert np.array_equal(bits(model.weight), after)
    assert swap.active == ({"a": 1.0} if active else {})
    report = swap.rebase()
    assert (report.changed, report.kept) == (("weight",), ())
    assert swap.active == {}
    assert np.array_equal(bits(model.weight), after)
    swap.load("b", files["b"])
    swap.switch({"a": 0.5, "b": 1.0})
    expected = formula(after, "float32", [(files["a"], 0.5), (files["b"], 1.0)], "weight")
    assert np.array_equal(bits(model.weight), expected)
    swap.revert()
    assert np.array_equal(bits(model.weight), after)
    if how in COUNTED:  # some of the others write the same again
        write(model)
        with pytest.raises(TargetError, match=CHANGED):
            swap.switch("a")


@pytest.mark.parametrize("backend", BACKENDS_IN_TIME)
def test_an_optimizer_step_inside_applied_is_not_mixed_with_the_base(backend: str):
    model = layer()
    swap = HotSwap(model, backend=backend)
    swap.load("a", delta())

    def train() -> None:
        with swap.applied("a"):
            step(torch.optim.SGD)(model)
            after.append(bits(model.weight))

    after: list[np.ndarray] = []
    with pytest.raises(TargetError, match=CHANGED):
        train()
    assert np.array_equal(bits(model.weight), after[0])


def replaced_by_another(model: torch.nn.Linear) -> None:
    model.weight = torch.nn.Parameter(model.weight.detach().clone())


def with_other_data(model: torch.nn.Linear) -> None:
    model.weight.data = model.weight.data.clone()


def taken_away(model: torch.nn.Linear) -> None:
    model.weight = None


@pytest.mark.parametrize("change", [replaced_by_another, with_other_data, taken_away])
def test_other_memory_is_noticed_by_every_call_and_not_rebased(change: Callable[[torch.nn.Linear], None]):
    model = layer()
    swap = HotSwap(model)
    swap.load("a", delta())
    swap.switch("a")
    change(model)
    for call in (lambda: swap.switch("a"), swap.revert, swap.changed, swap.rebase, lambda: swap.load("b", delta(2))):
        with pytest.raises(TargetError, match="'weight' was moved or replaced"):
            call()


def tied() -> torch.nn.Module:
    """A weight under two names, and a module under two others."""
    model = torch.nn.ModuleDict({"one": layer(), "two": layer(), "three": torch.nn.ModuleDict({"in": layer()})})
    model["two"].weight = model["one"].weight
    model["four"] = model["three"]
    return model


#: Ways to put something else where a watched tensor is: what is watched, what changes.
REPLACED: dict[str, tuple[str, Callable[[Any], object]]] = {
    "module": ("one.weight", lambda model: model.update({"one": layer()})),
    "module deleted": ("one.weight", lambda model: model.pop("one")),
    "second name": ("one.weight", lambda model: replaced_by_another(model["two"])),
    "first name": ("one.weight", lambda model: replaced_by_another(model["one"])),
    "module above": ("three.in.weight", lambda model: model.update({"three": torch.nn.ModuleDict()})),
    "second module above": ("three.in.weight", lambda model: model.update({"four": copy.deepcopy(model["four"])})),
}


@pytest.mark.parametrize("active", [False, True])
@pytest.mark.parametrize("how", REPLACED)
def test_all_places_of_a_tensor_are_watched(how: str, active: bool):
    (name, change), model = REPLACED[how], tied()
    swap = HotSwap(model)
    swap.load("a", adapter({name: random_delta(SHAPE, 60, 1, "float32")}))
    if active:
        swap.switch("a")
    change(model)
    again = adapter({name: random_delta(SHAPE, 60, 2, "float32")})
    for call in (lambda: swap.switch("a"), swap.revert, swap.changed, swap.rebase, lambda: swap.load("b", again)):
        with pytest.raises(TargetError, match=f"'{name}' was moved or replaced"):
            call()


def test_modules_around_a_tensor_may_change():
    """PEFT puts its layers around those of the model."""
    model = tied()
    base = bits(model["three"]["in"].weight)
    swap = HotSwap(model)
    swap.load("a", adapter({"three.in.weight": random_delta(SHAPE, 60, 1, "float32")}))
    swap.switch("a")
    model["three"]["in"] = torch.nn.Sequential(model["three"]["in"], torch.nn.ReLU())
    swap.revert()
    assert np.array_equal(bits(model["three"]["in"][0].weight), base)
    model["three"]["in"] = torch.nn.ReLU()
    with pytest.raises(TargetError, match="moved or replaced"):
        swap.switch("a")


@pytest.mark.parametrize("replace", [lambda model, _: model.clear(), dict.update], ids=["deleted", "replaced"])
@pytest.mark.parametrize("name", ["weight", "same"])
@pytest.mark.parametrize("array", [False, True], ids=["tensor", "array"])
def test_entries_of_a_mapping_are_watched(array: bool, name: str, replace: Callable[..., object]):
    weight, other = (np.zeros(SHAPE, np.float32) if array else torch.zeros(SHAPE) for _ in range(2))
    model = {"weight": weight, "same": weight}
    swap = HotSwap(model)
    swap.load("a", delta())
    swap.switch("a")
    replace(model, {name: other})
    for call in (lambda: swap.switch("a"), swap.revert, swap.changed, swap.rebase):
        with pytest.raises(TargetError, match="'weight' was moved or replaced"):
            call()


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("inside", [False, True])
def test_torchscript_is_refused(inside: bool):
    script = torch.jit.trace(layer(), torch.zeros(1, SHAPE[1], device=DEVICE))
    with pytest.raises(TargetError, match="TorchScript, whose parameters cannot be watched; give the Python"):
        HotSwap(torch.nn.Sequential(script) if inside else script)


def test_another_parameter_on_the_same_memory_has_versions_of_its_own():
    model = layer()
    swap = HotSwap(model)
    swap.load("a", delta())
    model.weight = torch.nn.Parameter(model.weight.detach())
    with pytest.raises(TargetError, match=CHANGED):
        swap.switch("a")
    swap.rebase()
    swap.switch("a")
    model.weight.detach()[0, 0] += 1
    with pytest.raises(TargetError, match=CHANGED):
        swap.revert()


@pytest.mark.parametrize("backend", ["auto", "numpy", "torch"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays(backend: str, order: str):
    array = np.asarray(bits(layer().weight).view(np.float32).reshape(SHAPE), order=order)
    data = delta()
    swap = HotSwap({"weight": array}, backend=backend)
    swap.load("a", data)
    swap.switch("a")
    array[...] = NEW.numpy()
    with pytest.raises(TargetError, match=CHANGED):
        swap.revert()
    assert np.array_equal(array, NEW.numpy())
    swap.rebase()
    swap.switch("a", 2)
    assert np.array_equal(bits(array), formula(bits(NEW), "float32", [(data, 2)], "weight"))


@pytest.mark.skipif(GPU, reason="not noticed on a GPU")
@pytest.mark.parametrize("backend", ["auto", "numpy", "torch"])
def test_tensors_made_in_inference_mode(backend: str):
    with torch.inference_mode():
        model = layer()
    swap = HotSwap(model, backend=backend)
    swap.load("a", delta())
    swap.switch("a")
    swap.revert()
    with torch.inference_mode():
        model.weight.mul_(2)
    with pytest.raises(TargetError, match=CHANGED):
        swap.switch("a")


def test_what_no_adapter_changes_may_change():
    model = torch.nn.Sequential(layer(), torch.nn.Linear(3, 3))
    swap = HotSwap(model, names=lambda name: f"0.{name}")
    model.load_state_dict({name: tensor + 1 for name, tensor in model.state_dict().items()})  # nothing is loaded yet
    swap.load("a", delta())
    swap.switch("a")
    model[1].load_state_dict({name: tensor + 1 for name, tensor in model[1].state_dict().items()})
    swap.revert()
    swap.unload("a")
    step(torch.optim.SGD)(model[0])
    swap.load("a", delta())
    swap.switch("a")


def test_unloading_forgets_no_other_adapter():
    model = {"weight": layer().weight, "v": torch.nn.Parameter(torch.zeros(SHAPE, device=DEVICE))}
    swap = HotSwap(model)
    swap.load("a", delta())
    swap.load("v", adapter({"v": random_delta(SHAPE, 5, 1, "float32")}))
    for tensor in model.values():
        tensor.detach().add_(1)
    swap.unload("a")
    with pytest.raises(TargetError, match=f"'v' {CHANGED}"):
        swap.switch("v")
    swap.unload("v")
    swap.load("a", delta())
    swap.switch("a")


# ---------------------------------------------------------------------------------------------- rebase


def test_a_base_that_an_adapter_does_not_fit_is_refused():
    model = layer()
    swap = HotSwap(model)
    swap.load("checked", delta(1, base=model.weight))
    swap.load("unchecked", delta(2, base=NEW), check=False)
    swap.switch("checked")
    model.load_state_dict({"weight": NEW})
    with pytest.raises(BaseMismatchError, match="tensor 'weight' is not the one that the delta was made against"):
        swap.rebase()
    assert swap.active == {"checked": 1.0}
    with pytest.raises(TargetError, match=CHANGED):
        swap.revert()
    assert swap.rebase(check=False).unchecked == {"checked": ("weight",), "unchecked": ("weight",)}
    swap.unload("checked")
    assert swap.rebase().unchecked == {"unchecked": ("weight",)}
    swap.load("again", delta(3, base=NEW))
    assert swap.rebase().unchecked["again"] == ()


def test_an_adapter_that_is_still_on_a_tensor_becomes_part_of_the_base():
    model = {name: layer().weight for name in "wv"}
    swap = HotSwap(model)
    swap.load("a", adapter({name: random_delta(SHAPE, 30, i, "float32") for i, name in enumerate("wv")}))
    swap.switch("a")
    model["v"].detach().copy_(NEW)
    now = {name: bits(tensor) for name, tensor in model.items()}
    report = swap.rebase()
    assert (report.changed, report.kept) == (("v",), ("w",))
    swap.switch("a")
    swap.revert()
    assert all(np.array_equal(bits(model[name]), now[name]) for name in "wv")
    assert swap.nbytes == sum(report.nbytes for report in swap.loaded.values())


def test_rebase_takes_a_model_whose_state_was_unknown(monkeypatch: pytest.MonkeyPatch):
    model = {"weight": layer().weight.detach().cpu()}
    swap = HotSwap(model, backend="numpy")
    swap.load("a", delta())

    def broken(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(NumpyBackend, "write", broken)
        with pytest.raises(TargetError, match=r"unknown state.*rebase"):
            swap.switch("a")
    with pytest.raises(TargetError, match="unknown state"):
        swap.revert()
    model["weight"].copy_(NEW)
    swap.rebase()
    swap.switch("a")
    swap.revert()
    assert np.array_equal(bits(model["weight"]), bits(NEW))


# ---------------------------------------------------------------------------- sessions and processes


def one_of(kind: str) -> tuple[Any, Any]:
    """The same weights, twice, as two sessions may be given them."""
    if kind == "array":
        array = np.zeros(SHAPE, np.float32)
        return array, array
    if kind == "views":
        array = np.zeros((2 * SHAPE[0], SHAPE[1]), np.float32)
        return array[: SHAPE[0]], array[10:][: SHAPE[0]]
    if kind == "inference":
        with torch.inference_mode():
            tensor = torch.zeros(SHAPE, device=DEVICE)
        return tensor, tensor
    weight = layer().weight
    return weight, weight.data if kind == "data" else weight


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("kind", ["parameter", "data", "array", "views", "inference"])
def test_two_sessions_on_one_model(kind: str, backend: str):
    """Deltas so sparse that no sampled element changes."""
    one, other = one_of(kind)
    data = adapter({"weight": sd.TensorDelta(SHAPE, [1000], [1.0], "float32")})
    first, second = HotSwap({"weight": one}, backend=backend), HotSwap({"weight": other}, backend=backend)
    apart = HotSwap({"weight": np.zeros(SHAPE, np.float32)})
    for swap in (first, second, apart):
        swap.load("a", data)
    first.switch("a")
    now = bits(other)
    for call in (lambda: second.switch("a"), second.changed, lambda: second.load("b", delta())):
        with pytest.raises(TargetError, match=CHANGED):
            call()
    assert np.array_equal(bits(other), now)
    first.revert()
    with pytest.raises(TargetError, match=CHANGED):
        second.switch("a")
    second.rebase()
    second.switch("a")
    with pytest.raises(TargetError, match=CHANGED):
        first.switch("a")
    second.revert()
    apart.switch("a")
    assert not np.any(bits(other)) or kind in ("parameter", "data")


@pytest.mark.slow
def test_of_two_sessions_in_threads_one_switches():
    array, data = np.zeros((300, 300), np.float32), delta(shape=(300, 300))
    for _ in range(20):
        swaps = [HotSwap({"weight": array}) for _ in range(2)]
        for swap in swaps:
            swap.load("a", data)
        refused = []
        together = threading.Barrier(2)

        def work(swap: HotSwap, together: threading.Barrier = together, refused: list[HotSwap] = refused) -> None:
            together.wait()
            try:
                swap.switch("a")
            except TargetError:
                refused.append(swap)

        threads = [threading.Thread(target=work, args=(swap,)) for swap in swaps]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(refused) == 1
        next(swap for swap in swaps if swap not in refused).revert()
        assert not array.any()


def test_sessions_that_are_gone_count_no_more():
    array = np.zeros(SHAPE, np.float32)
    gone = HotSwap({"weight": array})
    gone.load("a", delta())
    del gone
    gc.collect()
    swap = HotSwap({"weight": array})
    swap.load("a", delta())
    swap.switch("a")


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copies_are_refused(how: Callable[[object], object]):
    model = layer()
    model.swap = HotSwap(model)
    for thing in (model.swap, [model.swap]):
        if how is not copy.copy or thing is model.swap:
            with pytest.raises(ArgumentError, match="a HotSwap cannot be copied or pickled"):
                how(thing)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.parametrize(
    "held", [pytest.param(False, marks=pytest.mark.slow, id="free"), pytest.param(True, id="held by another thread")]
)
def test_a_forked_process(held: bool):
    """In a process without torch, whose threads a fork would not take along."""
    code = f"""
import os, sys, threading, numpy as np, shiradelta as sd
from io import BytesIO
model = {{"w": np.zeros(100, np.float32)}}
sd.save_delta(sys.argv[1], {{"w": sd.TensorDelta((100,), [1, 50], [1.0, 2.0], "float32")}})
swap = sd.HotSwap(model, backend="numpy")
swap.load("a", sys.argv[1])
swap.switch("a")
inside, leave = threading.Event(), threading.Event()
def hold():
    with swap.applied("a", 2.0):
        inside.set()
        leave.wait()
if {held}:
    threading.Thread(target=hold).start()
    inside.wait()
child = os.fork()
if not child:
    try:
        swap.revert()
        result = 0 if not model["w"].any() else 1
    except sd.TargetError as error:
        result = 2 if "forked while another thread" in str(error) else 3
    if result == 2:
        model["w"][:] = 0
        swap.rebase()
        swap.switch("a")
        swap.revert()
    os._exit(result)
_, status = os.waitpid(child, 0)
leave.set()
swap.revert()
print(os.waitstatus_to_exitcode(status), model["w"].any())
"""
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"fork-{os.getpid()}.shd"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, path], capture_output=True, text=True, timeout=60, check=True
        )
    finally:
        path.unlink(missing_ok=True)
    assert done.stdout.split() == ["2" if held else "0", "False"], done.stderr


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not tell")
@pytest.mark.parametrize("kind", ["memmap", "shared_memory", "share_memory_", "copy on write"])
def test_memory_that_processes_share(kind: str, tmp_path: Path):
    block = None
    if kind == "shared_memory":
        block = shared_memory.SharedMemory(create=True, size=4 * 40 * 33)
        weight: Any = np.ndarray(SHAPE, np.float32, block.buf)
    elif kind == "share_memory_":
        weight = torch.zeros(SHAPE).share_memory_()
    else:
        (tmp_path / "weights").write_bytes(bytes(4 * 40 * 33))
        weight = np.memmap(tmp_path / "weights", np.float32, "r+" if kind == "memmap" else "c", shape=SHAPE)
    try:
        swap = HotSwap({"weight": weight})
        if kind == "copy on write":
            swap.load("a", delta())
        else:
            with pytest.raises(TargetError, match="'weight' is in memory that other processes or a file share"):
                swap.load("a", delta())
        swap = HotSwap({"weight": weight}, allow_shared=True)
        swap.load("a", delta())
        swap.switch("a")
        swap.revert()
        assert not np.any(bits(weight))
    finally:
        del weight, swap
        if block is not None:
            gc.collect()
            block.close()
            block.unlink()


def test_pinned_memory_is_taken(monkeypatch: pytest.MonkeyPatch):
    """A driver maps it as memory that processes share; test_cuda.py has a real one."""
    weight = torch.zeros(SHAPE).share_memory_()
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: True)
    HotSwap({"weight": weight}).load("a", delta())


def test_the_examples_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    page = (Path(__file__).parents[2] / "docs" / "live.md").read_text()
    monkeypatch.chdir(tmp_path)
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(code, {})
    assert CHANGED.split(" since")[0] in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["torch", "numpy"])
@pytest.mark.parametrize("deleted", [True, False])
def test_a_new_session_takes_no_patched_weights_for_the_base(kind: str, deleted: bool):
    weight = torch.zeros(SHAPE) if kind == "torch" else np.zeros(SHAPE, np.float32)
    model, without_fingerprints = {"weight": weight, "v": np.zeros(SHAPE, np.float32)}, delta()
    first = HotSwap(model, backend="numpy" if kind == "numpy" else "auto")
    first.load("a", without_fingerprints)
    first.switch("a")
    if deleted:
        del first
        gc.collect()
    second = HotSwap(model)
    with pytest.raises(sd.TargetError, match="HotSwap that was deleted" if deleted else "of another HotSwap"):
        second.load("a", without_fingerprints)
    second.load("without the check", without_fingerprints, check=False)
    second.unload("without the check")
    second.rebase()
    second.load("a", without_fingerprints)
    second.switch("a")


def test_what_a_failed_load_would_have_changed_may_be_written():
    model = {"weight": torch.zeros(SHAPE), "other": torch.zeros(SHAPE)}
    swap = HotSwap(model)
    swap.load("a", delta())
    wrong = adapter({"other": random_delta(SHAPE, 60, 2, "float32", base=np.ones(SHAPE, np.float32))})
    with pytest.raises(BaseMismatchError, match="not the one that the delta was made against"):
        swap.load("wrong", wrong)
    model["other"] += 1
    swap.load("right", wrong)
    swap.switch({"a": 1.0, "right": 1.0})


def test_weights_that_are_loaded_again_are_a_base():
    model = {"weight": torch.zeros(SHAPE)}
    first, second = HotSwap(model), HotSwap(model)
    for swap in (first, second):
        swap.load("a", delta())
    first.switch("a")
    model["weight"].copy_(torch.ones(SHAPE))
    HotSwap(model).load("a", delta())
    del first
    gc.collect()
    HotSwap(model).load("a", delta())
