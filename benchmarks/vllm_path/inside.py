"""Run by the interpreter of vLLM's environment: one delta by both paths, and the state that each failure leaves.

vLLM's path is `load_checkpoint_weight_patches`, which its engine `sparse_nccl` calls with what it has received.  The
engine needs GPUs, the function does not; only its call is timed, without any transfer.  Ours is a request to the engine
"shd", from the call to the answer.  Bits are judged by what `/weight_checker` compares: the worker's own SHA-256 of
every parameter.
"""

# mypy: disable-error-code="import-not-found, import-untyped, no-any-unimported"
from __future__ import annotations

import json
import math
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

#: Switches to the delta and back, before the digests are compared again.
SWITCHES = 100
#: How often an update is interrupted by Ctrl-C, each time a bit later.
INTERRUPTS = 8

#: Name of a tensor -> its shape, positions and new values.
Patches = dict[str, tuple[tuple[int, ...], Tensor, Tensor]]


def _renamed(name: str, shape: tuple[int, ...], positions: Tensor, values: Tensor) -> Any:
    return f"{name}.else", shape, positions, values


def _row_more(name: str, shape: tuple[int, ...], positions: Tensor, values: Tensor) -> Any:
    return name, (shape[0] + 1, *shape[1:]), positions, values


def _beyond(name: str, shape: tuple[int, ...], positions: Tensor, values: Tensor) -> Any:
    return name, shape, torch.cat([positions[:-1], torch.tensor([math.prod(shape)], dtype=positions.dtype)]), values


def _nan(name: str, shape: tuple[int, ...], positions: Tensor, values: Tensor) -> Any:
    return name, shape, positions, torch.cat([values[:-1], torch.full((1,), math.nan, dtype=values.dtype)])


#: What is wrong with one of the patches -> how it is made so.
DAMAGES: dict[str, Callable[..., Any]] = {
    "unknown name": _renamed,
    "a row too many": _row_more,
    "an index beyond the end": _beyond,
    "a NaN": _nan,
}


class Stock:
    """An extension of the worker: vLLM's path, as its engine goes it, and the weights to begin with again."""

    def stock_prepare(self, path: str, shapes: dict[str, list[int]]) -> None:
        """Reads the patches, and keeps a copy of the weights."""
        from safetensors.torch import load_file

        stored = load_file(path)
        self._patches: Patches = {
            name: (tuple(shape), stored[f"{name}.indices"], stored[f"{name}.values"]) for name, shape in shapes.items()
        }
        self._copies = {name: one.detach().clone() for name, one in self._named()}

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.get_model().named_parameters()  # type: ignore[attr-defined]

    def stock_reset(self) -> None:
        """Copies the weights back."""
        with torch.no_grad():
            for name, one in self._named():
                one.copy_(self._copies[name])

    def stock_update(self, damage: str = "", at: str = "", part: float = 1.0) -> float:
        """Applies the first part of the patches, one of them damaged; returns the seconds of vLLM's function."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader import checkpoint_weight_patch as stock

        patches = []
        for name, patch in list(self._patches.items())[: round(part * len(self._patches))]:
            made = DAMAGES[damage](name, *patch) if name == at else (name, *patch)
            patches.append(stock.CheckpointWeightPatch(made[0], made[1], made[3].dtype, made[3], made[2]))
        with set_current_vllm_config(self.vllm_config):  # type: ignore[attr-defined]
            start = time.perf_counter()
            stock.load_checkpoint_weight_patches(self.get_model(), patches)  # type: ignore[attr-defined]
            return time.perf_counter() - start


@contextmanager
def interrupted(after: float) -> Iterator[None]:
    """Raises KeyboardInterrupt after some seconds."""
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, after)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


class Bench:
    """An engine, both paths to its weights, and what their states are called.

    Args:
        wanted: what `benchmarks.vllm_path` sends: folders, files, shapes.
    """

    def __init__(self, wanted: dict[str, Any]) -> None:
        from vllm.config import WeightTransferConfig

        self.wanted = wanted
        fresh = self._engine("tuned")
        self.target = fresh.collective_rpc("compute_weight_checksums")[0]
        del fresh
        self.engine = self._engine("base", weight_transfer_config=WeightTransferConfig(backend="shd"))
        self.base = self.digests()
        self.engine.init_weight_transfer_engine({"init_info": {}})
        self.engine.collective_rpc("stock_prepare", args=(f"{wanted['folder']}/patches.safetensors", wanted["shapes"]))

    def _engine(self, name: str, **more: Any) -> Any:
        from vllm import LLM

        return LLM(
            f"{self.wanted['folder']}/{name}",
            dtype="bfloat16",
            enforce_eager=True,
            gpu_memory_utilization=0.5,
            max_model_len=64,
            max_num_seqs=4,
            skip_tokenizer_init=True,
            worker_extension_cls="benchmarks.vllm_path.inside.Stock",
            **more,
        )

    def digests(self) -> dict[str, str]:
        """The worker's own, by parameter."""
        found: dict[str, str] = self.engine.collective_rpc("compute_weight_checksums")[0]
        return found

    def state(self) -> str:
        """What the weights are: the base, the target or how much of each."""
        now = self.digests()
        differ = {what: sum(now[name] != one[name] for name in now) for what, one in self._known.items()}
        same = [what for what, count in differ.items() if count == 0]
        return same[0] if same else f"neither: {differ['base']} of {len(now)} parameters are not the base's"

    @property
    def _known(self) -> dict[str, dict[str, str]]:
        return {"base": self.base, "target": self.target}

    def update(self, **request: Any) -> None:
        """A request to the engine "shd"."""
        self.engine.start_weight_update()
        self.engine.update_weights({"update_info": request})
        self.engine.finish_weight_update()

    def stock(self, *arguments: Any) -> float:
        """vLLM's path."""
        return float(self.engine.collective_rpc("stock_update", args=arguments)[0])

    def load_and_switch(self, name: str, file: str) -> None:
        """One request that loads an adapter and makes it active."""
        self.update(load={name: file}, active={name: 1.0})

    def file(self, name: str) -> str:
        """The path of a `.shd` file."""
        return f"{self.wanted['folder']}/{name}.shd"

    def times(self) -> dict[str, list[float]]:
        """Seconds of each repeat, both paths in turn; both have to reach the target."""
        found: dict[str, list[float]] = {"stock": [], "from file": [], "switch": [], "revert": []}
        for repeat in range(self.wanted["repeats"] + 1):
            now = {"stock": self.stock()}
            assert self.state() == "target"
            self.engine.collective_rpc("stock_reset")
            now["from file"] = _seconds(partial(self.load_and_switch, "a", self.file("a")))
            assert self.state() == "target"
            now["revert"] = _seconds(partial(self.update, active={}))
            now["switch"] = _seconds(partial(self.update, active={"a": 1.0}))
            self.update(active={}, unload=["a"])
            assert self.state() == "base"
            for what, seconds in now.items() if repeat else ():
                found[what].append(seconds)
        return found

    def after_switches(self) -> str:
        """The state after many switches to the delta and back, the last one to it."""
        self.update(load={"a": self.file("a")})
        for number in range(SWITCHES):
            self.update(active={"a": 1.0} if number % 2 == 0 else {})
        self.update(active={"a": 1.0})
        found = self.state()
        self.update(active={}, unload=["a"])
        return found

    def failures(self, seconds: dict[str, float]) -> list[list[str]]:
        """(what fails, vLLM's answer, its state, our answer, our state).

        Args:
            seconds: what the updates take, to interrupt them at several points.
        """
        rows = []
        for what, damage, at in self.wanted["damages"]:
            stock = _answer(partial(self.stock, damage, at))
            states = [self.state()]
            self.engine.collective_rpc("stock_reset")
            file = self.wanted["files"][what]
            # Where there is no file, its text says why none can be written.
            ours = _answer(partial(self.load_and_switch, "b", file)) if file.endswith(".shd") else file
            rows.append([what, stock, states[0], ours.replace(f"{self.wanted['folder']}/", ""), self.state()])
        rows.append(["the sender ends half-way", *self._half()])
        rows.append(["Ctrl-C in the worker", *self._interrupts(seconds)])
        return rows

    def _half(self) -> list[str]:
        """vLLM's senders may send chunks; ours send one request, so half of an update is one that was only begun."""
        self.stock("", "", 0.5)
        found = ["not noticed", self.state()]
        self.engine.collective_rpc("stock_reset")
        self.engine.start_weight_update()
        found += ["not noticed", self.state()]
        self.engine.finish_weight_update()
        return found

    def _interrupts(self, seconds: dict[str, float]) -> list[str]:
        """At several points of both updates."""
        answers: list[list[str]] = [[], []]
        states: list[list[str]] = [[], []]
        for number in range(INTERRUPTS):
            share = (number + 0.5) / INTERRUPTS
            with interrupted(share * seconds["stock"]):
                answers[0].append(_answer(self.stock))
            states[0].append(self.state())
            self.engine.collective_rpc("stock_reset")
            with interrupted(share * seconds["from file"]):
                answers[1].append(_answer(partial(self.load_and_switch, "a", self.file("a"))))
            states[1].append(self.state())
            _answer(self.engine.finish_weight_update)  # where Ctrl-C came before it
            _answer(partial(self.update, active={}, unload=["a"]))
            assert self.state() == "base"
        return [_counted(each) for pair in zip(answers, states, strict=True) for each in pair]


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _answer(work: Callable[[], object]) -> str:
    """The error that a call raises, or that there is none."""
    try:
        work()
    except (Exception, KeyboardInterrupt) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return "accepted"


def _counted(states: list[str]) -> str:
    short = [state.partition(":")[0] for state in states]
    return ", ".join(f"{short.count(one)} x {one}" for one in dict.fromkeys(short))


def main() -> None:
    """Reads what is wanted, and prints what was found."""
    from shiradelta.serving import plugin

    plugin.register()  # as the entry point does where the package is installed
    bench = Bench(json.load(sys.stdin))
    times = bench.times()
    medians = {what: statistics.median(each) for what, each in times.items()}
    found = {"seconds": medians, "parameters": len(bench.base), "after switches": bench.after_switches()}
    found["failures"] = bench.failures(medians)
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main()
