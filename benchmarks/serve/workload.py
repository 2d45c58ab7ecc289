"""The requests, and the model and adapters as files: the same for every engine and every way to serve them."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

import shiradelta as sd
from shiradelta.errors import ArgumentError
from shiradelta.models.checkpoint import open_checkpoint
from shiradelta.models.compatibility import spec_of

#: The model that is made where none is given: 21 M parameters.
SIZES = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 6, "vocab_size": 2048}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 512}
RANK, DENSITY = 16, 0.01
#: The layers that adapters change, as Llama, Mistral, Qwen and Gemma call them.
_CHANGED = "_proj.weight"
#: What seconds are: of a clock on the wall, or of the processor, which other work on the machine does not lengthen.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Request:
    """A prompt for an adapter."""

    adapter: str
    prompt: list[int]


@dataclass(frozen=True)
class Load:
    """How requests come, and how much each wants.

    Attributes:
        count: requests in all.
        window: how many come at one time; the next ones come when all of these have been answered.
        batch: how many the model computes at a time.
        prompt: tokens of a prompt.
        answer: tokens of an answer.
        seed: of the prompts and of the order of adapters.
        clock: of `CLOCKS`.
    """

    count: int = 64
    window: int = 32
    batch: int = 8
    prompt: int = 32
    answer: int = 16
    seed: int = 0
    clock: str = "wall"

    def now(self) -> float:
        """Seconds on the clock."""
        return CLOCKS[self.clock]()

    def requests(self, adapters: Sequence[str], every: int, vocabulary: int) -> list[Request]:
        """Requests whose adapter changes to another, chosen at random, every so many requests."""
        chance = random.Random(self.seed)
        found: list[Request] = []
        now = chance.choice(adapters)
        for number in range(self.count):
            if number and number % every == 0 and len(adapters) > 1:
                now = chance.choice([name for name in adapters if name != now])
            found.append(Request(now, [chance.randrange(3, vocabulary) for _ in range(self.prompt)]))
        return found


@dataclass
class Measured:
    """What serving all requests once took.  Times are in seconds.

    Attributes:
        seconds: from the first window's arrival to the last answer.
        latencies: of each request, from its window's arrival to its answer.
        switches: how often the active adapter changed.
        switching: how long that took in all.
    """

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    switches: int = 0
    switching: float = 0.0


@dataclass
class Server:
    """A way to serve requests.

    Attributes:
        load: how requests come.
        generate: answers requests, and returns the moment (`Load.now`) at which each was answered.
        select: makes an adapter active for all requests that follow; None if each request may have another one.
    """

    load: Load
    generate: Callable[[Sequence[Request]], list[float]]
    select: Callable[[str], object] | None = None
    _active: str | None = None

    def serve(self, requests: Sequence[Request]) -> Measured:
        """Answers all requests, a window at a time."""
        found = Measured()
        start = self.load.now()
        for first in range(0, len(requests), self.load.window):
            self._window(requests[first : first + self.load.window], found)
        found.seconds = self.load.now() - start
        return found

    def _window(self, some: Sequence[Request], found: Measured) -> None:
        arrived = self.load.now()
        for group in [list(some)] if self.select is None else self._groups(some):
            if self.select is not None and group[0].adapter != self._active:
                before = self.load.now()
                self.select(group[0].adapter)
                self._active = group[0].adapter
                found.switches += 1
                found.switching += self.load.now() - before
            found.latencies += [moment - arrived for moment in self.generate(group)]

    def _groups(self, some: Sequence[Request]) -> list[list[Request]]:
        """By adapter, in the order of their first requests; that of the active adapter comes first."""
        by_adapter: dict[str, list[Request]] = {}
        for one in some:
            by_adapter.setdefault(one.adapter, []).append(one)
        return sorted(by_adapter.values(), key=lambda group: group[0].adapter != self._active)


def write_model(folder: Path, seed: int, dtype: str) -> None:
    """A Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)).to(getattr(torch, dtype)).save_pretrained(folder)


def vocabulary(model: Path) -> int:
    """Tokens that the model of a folder knows."""
    return int(json.loads((model / "config.json").read_text())["vocab_size"])


def write_adapters(folder: Path, model: Path, count: int, seed: int) -> list[str]:
    """Adapters `a0`, `a1`, ... for all linear layers: `a0.shd`, 1 % in int8, and `a0/`, a LoRA of rank 16 for PEFT.

    Positions, values and factors are random, and small enough for the model to go on giving numbers.

    Raises:
        ArgumentError: the model has no such layers.
    """
    stored = open_checkpoint(model)
    names = [name for name in stored if name.endswith(_CHANGED)]
    if not names:
        raise ArgumentError(f"no tensor of {str(model)!r} ends in {_CHANGED!r}; give a model with such layers")
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        deltas, factors = {}, {}
        for name in names:
            spec = spec_of(stored[name])
            rows, columns = spec.shape
            positions = np.flatnonzero(rng.random(rows * columns, dtype=np.float32) < DENSITY)
            values = 0.01 * rng.standard_normal(positions.size).astype(np.float32)
            bits = stored.bits(name).reshape(-1)[positions]
            deltas[name] = sd.TensorDelta(spec.shape, positions, values, spec.dtype, base_bits=bits)
            layer = f"base_model.model.{name.removesuffix('.weight')}"
            for factor, shape in (("lora_A", (RANK, columns)), ("lora_B", (rows, RANK))):
                made = 0.01 * rng.standard_normal(shape).astype(np.float32)
                factors[f"{layer}.{factor}.weight"] = torch.from_numpy(made)
        sd.save_delta(folder / f"a{number}.shd", deltas, values="int8")
        lora = folder / f"a{number}"
        lora.mkdir()
        save_file(factors, lora / "adapter_model.safetensors", metadata={"format": "pt"})
        targets = sorted({name.removesuffix(".weight").rpartition(".")[2] for name in names})
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK, "lora_dropout": 0.0}
        (lora / "adapter_config.json").write_text(json.dumps({**config, "target_modules": targets, "bias": "none"}))
    return [f"a{number}" for number in range(count)]


def measure(
    servers: Mapping[str, Server], model: Path, adapters: Sequence[str], changes: Sequence[int], repeats: int
) -> list[dict[str, object]]:
    """Serves the same requests in each way, all ways in turn, after a window that is not measured.

    Returns:
        A row for each way and each number of requests between two changes: medians of the repeats; latencies are the
        median and the 95th percentile over all requests of all repeats.
    """
    tokens = vocabulary(model)
    found: dict[tuple[int, str], list[Measured]] = {(every, way): [] for every in changes for way in servers}
    for repeat in range(repeats + 1):
        for every, way in found:
            load = servers[way].load
            requests = load.requests(adapters, every, tokens)
            if repeat == 0:
                servers[way].serve(requests[: load.window])
            else:
                found[every, way].append(servers[way].serve(requests))
    rows: list[dict[str, object]] = []
    for (every, way), runs in found.items():
        seconds = float(np.median([run.seconds for run in runs]))
        late = np.quantile([latency for run in runs for latency in run.latencies], (0.5, 0.95))
        load = servers[way].load
        times = {"seconds": seconds, "tokens_a_second": load.count * load.answer / seconds}
        times |= {"median_latency": float(late[0]), "latency_95": float(late[1])}
        switching = float(np.median([run.switching for run in runs]))
        row = {"way": way, "every": every, **{key: round(value, 4) for key, value in times.items()}}
        rows.append({**row, "switches": runs[-1].switches, "switching": round(switching, 4), "repeats": repeats})
    return rows
