"""Where the time of `HotSwap.load` and `switch` goes: each step's CPU time on the thread that calls them.

A model of many small tensors, so that nearly all of it is work per tensor: linear layers nested as in a Llama of 32
layers (224 tensors), or as in a mixture of 64 experts in 12 layers (2,352).  The adapter is read from a file.

A session remembers what it has found of names, shapes and dtypes, so its first load of a kind of file takes longer:
that is the last column.

`python -m benchmarks.load`, or `--device cuda`.  On a CPU the device's tables and the plan of its launches are made
beside the load, since its kernels do not run there.  A step includes the steps below it that are indented.
"""

# mypy: disable-error-code="attr-defined, unused-ignore"

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

import shiradelta as sd
import shiradelta.hotswap.matching
import shiradelta.hotswap.prepare
import shiradelta.hotswap.session
import shiradelta.hotswap.torch
import shiradelta.models.live
from benchmarks.table import print_table
from shiradelta.hotswap.layers import Layer

WIDTH = 64
ATTENTION = [f"self_attn.{one}_proj" for one in "qkvo"]
MLP = [f"{one}_proj" for one in ("gate", "up", "down")]
#: Model -> (layers, linear layers of each).
MODELS = {
    "llama": (32, [*ATTENTION, *(f"mlp.{one}" for one in MLP)]),
    "experts": (12, [*ATTENTION, *(f"mlp.experts.{expert}.{one}" for expert in range(64) for one in MLP)]),
}
#: (step, what it is in `shiradelta`).
_STEPS: Sequence[tuple[str, str]] = (
    ("load", "hotswap.session.HotSwap.load"),
    ("  read its tables", "hotswap.prepare.PartlyRead"),
    ("  open it", "hotswap.prepare.open_delta"),
    ("  find the names", "hotswap.prepare.Preparation._matched"),
    ("  check the tensors", "hotswap.prepare.Preparation._fits"),
    ("  read it, copy it to the device", "hotswap.devices.Devices.hold"),
    ("    find the sections", "hotswap.torch.TorchBackend._residents"),
    ("    copy them", "hotswap.torch.TorchBackend._upload"),
    ("    the device's tables", "hotswap.torch.TorchBackend.arrange"),
    ("  check overlaps", "hotswap.matching.Apart.check"),
    ("  compare with the base", "hotswap.session.fit_of"),
    ("    fingerprints on a CPU", "hotswap.elementwise.Elementwise._fingerprint_of"),
    ("    watch meanwhile", "hotswap.outside.Watch.follow"),
    ("switch", "hotswap.session.HotSwap.switch"),
    ("  claim", "hotswap.outside.Watch.claim"),
    ("  exchange", "hotswap.patched.exchange"),
)


def model(layers: int, linears: Sequence[str], device: str) -> torch.nn.Module:
    """Linear layers, nested by their names."""
    root = torch.nn.Module()
    for layer in range(layers):
        for name in linears:
            *path, last = f"model.layers.{layer}.{name}".split(".")
            at = root
            for part in path:
                if part not in at._modules:
                    at.add_module(part, torch.nn.Module())
                at = at.get_submodule(part)
            at.add_module(last, torch.nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16, device=device))
    return root.requires_grad_(False)


def adapter(root: torch.nn.Module, path: Path) -> None:
    """Writes an adapter of 1 % of all weights."""
    rng = np.random.default_rng(0)
    tensors = {}
    for name, parameter in root.named_parameters():
        positions = np.sort(rng.choice(parameter.numel(), parameter.numel() // 100, replace=False))
        bits = parameter.detach().view(torch.int16).view(-1).cpu().numpy()[positions].view(np.uint16)
        values = rng.standard_normal(positions.size).astype(np.float32)
        tensors[name] = sd.TensorDelta(tuple(parameter.shape), positions, values, "bfloat16", "add", bits)
    sd.save_delta(path, tensors, values="int8")


class Clock:
    """CPU time of steps, on the thread that the clock is made on."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self.spent: dict[str, float] = {}

    def timed(self, step: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, whose time counts for a step."""

        @wraps(work)
        def inner(*arguments: Any, **named: Any) -> Any:
            if threading.get_ident() != self._thread:
                return work(*arguments, **named)
            start = time.thread_time()
            try:
                return work(*arguments, **named)
            finally:
                self.spent[step] = self.spent.get(step, 0.0) + time.thread_time() - start

        return inner


@contextmanager
def steps(clock: Clock) -> Iterator[None]:
    """Has the clock take the time of each step within the block."""
    with ExitStack() as stack:
        for step, where in _STEPS:
            *path, name = f"shiradelta.{where}".split(".")
            owner: Any = sd
            for part in path[1:]:
                owner = getattr(owner, part)
            stack.enter_context(patch.object(owner, name, clock.timed(step, getattr(owner, name))))
        yield


def once(swap: sd.HotSwap, path: Path, clock: Clock) -> dict[str, float]:
    """Milliseconds of each step of one load and switch."""
    clock.spent.clear()
    swap.load("adapter", path)
    swap.switch("adapter")
    spent = dict(clock.spent)
    swap.revert()
    (held,) = swap._adapters["adapter"].held.values()
    if held.data is None:
        from shiradelta.hotswap.triton.plan import new_plan, prepare

        clock.spent.clear()
        held.data = clock.timed("the device's tables, apart", prepare)(held, torch.from_numpy)
        clock.timed("the plan of launches, apart", new_plan)([Layer(held, 1, None)], torch.from_numpy)
        spent |= clock.spent
    swap.unload("adapter")
    return {step: 1000 * seconds for step, seconds in spent.items()}


def main() -> None:
    """Prints a table for each model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.manual_seed(0)
    for name in options.models:
        root = model(*MODELS[name], options.device)
        with tempfile.TemporaryDirectory() as folder, steps(clock := Clock()):
            path = Path(folder) / "adapter.shd"
            adapter(root, path)
            new_session = partial(sd.HotSwap, root, backend="torch" if options.device == "cpu" else "auto")
            once(swap := new_session(), path, clock)
            every = [once(swap, path, clock) for _ in range(options.repeats)]
            first = once(new_session(), path, clock)
        tensors = sum(1 for _ in root.parameters())
        rows = [["step", "median ms", "least ms", "a first load's"]]
        for step in dict.fromkeys([*(step for step, _ in _STEPS), *every[0]]):
            times = [one[step] for one in every if step in one]
            if times:
                shown = statistics.median(times), min(times), first.get(step, 0)
                rows.append([step.replace("  ", "- "), *(f"{time:.2f}" for time in shown)])
        print_table(f"{name}: {tensors:,} tensors on {options.device}, CPU time of the calling thread", rows)


if __name__ == "__main__":
    main()
