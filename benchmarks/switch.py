"""Switching adapters in a live model, against PEFT, torch's own indexing, load_state_dict and a plain copy.

Linear layers in the shapes of Llama-2-7B with random bf16 weights; a LoRA of rank 16 on the other side.  All in one
run: `python -m benchmarks.switch --device cuda`, or `cpu` (one layer).  Times are wall times, the device's work
included; memory is resident.  Writes `switch-DEVICE.csv`, which `python -m benchmarks.plot` draws.
"""

# mypy: disable-error-code="operator, arg-type, unused-ignore, union-attr"

from __future__ import annotations

import argparse
import csv
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import shiradelta as sd
from benchmarks.models import LLAMA_7B_LAYER
from benchmarks.table import machine, print_table
from shiradelta.format import container, registry

RESULTS = Path(__file__).parent / "results"
EXPERIMENTS = ["compare", "lossless", "density", "adapters", "size"]


class Stage:
    """Linear layers on a device, a clock, and the rows of the table."""

    def __init__(self, device: str, layers: int, repeats: int) -> None:
        self.device, self.layers, self.repeats = device, layers, repeats
        self.rows: list[dict[str, object]] = []
        block: Any = torch.nn.ModuleDict(
            {
                name.replace(".", "_"): torch.nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16, device="meta")
                for name, (rows, columns) in LLAMA_7B_LAYER.items()
            }
        ).to_empty(device=device)
        for weight in block.parameters():
            torch.nn.init.normal_(weight, std=0.02)
        # Every layer has the same weights, so that a file of one layer serves for all.
        self.model = torch.nn.ModuleList([block])
        for _ in range(1, layers):
            other = torch.nn.ModuleDict({k: torch.nn.Linear(1, 1, bias=False, device="meta") for k in block})
            for name, module in block.items():
                other[name].weight = torch.nn.Parameter(module.weight.detach().clone())
                other[name].in_features, other[name].out_features = module.in_features, module.out_features
            self.model.append(other)
        self.model.requires_grad_(False)

    def weights(self) -> list[torch.Tensor]:
        """Of all layers."""
        return [parameter.data for parameter in self.model.parameters()]

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device != "cpu":
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], after: Callable[[], object] = lambda: None) -> float:
        """Median; `after` runs untimed after each."""
        times = []
        for number in range(self.repeats + 2):
            seconds = self.once(work)
            if number >= 2:
                times.append(seconds)
            after()
        return statistics.median(times)

    def once(self, work: Callable[[], object]) -> float:
        """Of a single call."""
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - start

    def row(self, experiment: str, what: str, x: float, seconds: float) -> float:
        """Notes a figure."""
        self.rows.append({"experiment": experiment, "what": what, "x": x, "layers": self.layers, "seconds": seconds})
        print(f"{experiment:12} {what:32} {x:8g} {1000 * seconds:10.3f} ms", flush=True)
        return seconds


def one_layer(stage: Stage, density: float, seed: int, values: str = "int8", shifts: bool = False) -> bytes:
    """A file for the first layer: independent positions, random values, or shifts of which nine in ten are 1 or -1."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, parameter in stage.model[0].named_parameters():
        numel = parameter.numel()
        gaps = rng.geometric(density, int(numel * density * 1.1) + 64)
        positions = np.cumsum(gaps) - 1
        positions = positions[positions < numel]
        base = parameter.data.view(torch.int16).view(-1)[torch.from_numpy(positions).to(stage.device)].cpu().numpy()
        if shifts:
            delta = rng.choice([-1, 1], positions.size) * np.where(rng.random(positions.size) < 0.1, 2, 1)
        else:
            delta = (rng.standard_normal(positions.size) * 0.01).astype(np.float32)
        bits = base.view(np.uint16)
        operation = "ulp" if shifts else "add"
        tensors[f"0.{name}"] = sd.TensorDelta(tuple(parameter.shape), positions, delta, "bfloat16", operation, bits)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.shd"
        sd.save_delta(path, tensors, values=values)
        return path.read_bytes()


def for_all_layers(data: bytes, layers: int, digest: bytes | None = None) -> bytes:
    """The same sections under the names of every layer; readers compare the digest only with what needs its base."""
    parsed = container.parse(np.frombuffer(data, np.uint8))
    named = sorted(
        (f"{layer}.{record.name.removeprefix('0.')}".encode(), record)
        for layer in range(layers)
        for record in parsed.records
    )
    cursor = container.payload_start(len(named), sum(len(name) for name, _ in named), {})
    records, payload = [], []
    for name, record in named:
        placed = []
        for section in (record.index, record.values):
            placed.append(section.at(cursor))
            stored = data[section.offset : section.offset + section.stored]
            payload.append(container.pad_section(stored))
            cursor = registry.align(cursor + section.stored, registry.SECTION_ALIGNMENT)
        records.append(record._replace(name=name.decode(), index=placed[0], values=placed[1]))
    return container.build(records, {}, digest or parsed.digest, cursor) + b"".join(payload)


def adapters(stage: Stage, count: int, density: float, layers: int) -> list[bytes]:
    """Different adapters of one density."""
    return [for_all_layers(one_layer(stage, density, seed), layers) for seed in range(count)]


def compare(stage: Stage) -> None:
    """Everything at 1 %."""
    first, second = adapters(stage, 2, 0.01, stage.layers)
    copy, fastest = _copies(stage)

    swap = sd.HotSwap(stage.model)
    swap.load("first", first)
    swap.load("second", second)
    apply = stage.row("compare", "HotSwap apply", 1, stage.seconds(partial(swap.switch, "first"), swap.revert))
    revert = stage.row("compare", "HotSwap revert", 1, _reverts(stage, swap, "first"))
    swap.switch("first")
    names = iter(["second", "first"] * 1000)
    other = stage.row("compare", "HotSwap A -> B", 1, stage.seconds(lambda: swap.switch(next(names))))
    stage.row("compare", "HotSwap other strength", 1, _other_strengths(stage, swap, ["first"]))
    swap.revert()

    file = Path(tempfile.gettempdir()) / "switch.shd"
    file.write_bytes(first)

    def from_file() -> None:
        swap.load("file", file)
        swap.switch("file")

    def forget() -> None:
        swap.revert()
        swap.unload("file")

    stage.row("compare", "HotSwap from a file", 1, stage.seconds(from_file, forget))
    file.unlink()
    nbytes, nnz = swap.loaded["first"].nbytes, swap.loaded["first"].nonzeros
    print(f"{nnz / 1e6:.1f} M nonzeros; a loaded adapter takes {nbytes / len(first):.3f} x its file")

    _indexing(stage, first)
    lora = _lora(stage)
    _shira(stage)
    rows = [["against", "apply", "revert", "A -> B"]]
    against = {"a copy of the weights": copy, "the same bytes in one piece": fastest, "PEFT's LoRA merge": lora}
    for what, seconds in against.items():
        rows.append([what, *(f"{value / seconds:.3f} x" for value in (apply, revert, other))])
    print_table(f"{stage.layers} layers of Llama-2-7B, bf16, 1 %, int8, on {where(stage.device)}", rows)


def lossless(stage: Stage) -> None:
    """The next checkpoint of a training run, 1 % changed, by each backend of the device."""
    copy = _copy(stage, "lossless", stage.layers)
    data = for_all_layers(one_layer(stage, 0.01, 0, shifts=True), stage.layers)
    rows = [["", "apply", "revert"]]
    for backend in ("triton", "torch") if stage.device == "cuda" else ("libshd", "numpy"):
        swap = sd.HotSwap(stage.model, backend=backend)
        swap.load("step", data)
        found = _apply(stage, swap, {"step": 1.0}), _reverts(stage, swap, "step")
        for what, seconds in zip(("apply", "revert"), found, strict=True):
            stage.row("lossless", f"HotSwap {what}, {backend}", 1, seconds)
        rows.append([backend, *(f"{seconds / copy:.3f} x" for seconds in found)])
        swap.revert()
    print_table(f"a lossless step of 1 %, against a copy of the weights, on {where(stage.device)}", rows)


def _copy(stage: Stage, experiment: str, layers: int) -> float:
    """A plain copy of the weights of some layers."""
    weights = [parameter.data for parameter in stage.model[:layers].parameters()]
    copies = [torch.empty_like(weight) for weight in weights]
    seconds = stage.seconds(lambda: torch._foreach_copy_(copies, weights))
    return stage.row(experiment, "copy of the weights", 1, seconds)


def _copies(stage: Stage) -> tuple[float, float]:
    """A plain copy of all weights, and of as many bytes that lie in one piece; torch's own way to put weights in."""
    weights = stage.weights()
    ends = np.cumsum([weight.numel() for weight in weights]).tolist()
    whole = torch.empty(ends[-1], dtype=torch.bfloat16, device=stage.device)
    copies = [whole[end - weight.numel() : end].view_as(weight) for weight, end in zip(weights, ends, strict=True)]
    copy = stage.row("compare", "copy of the weights", 1, stage.seconds(lambda: torch._foreach_copy_(copies, weights)))
    state = dict(zip(stage.model.state_dict(), copies, strict=True))
    stage.row("compare", "load_state_dict", 1, stage.seconds(lambda: stage.model.load_state_dict(state)))
    other = torch.empty_like(whole)
    fastest = stage.row("compare", "copy of the same bytes", 1, stage.seconds(lambda: other.copy_(whole)))
    return copy, fastest


def _reverts(stage: Stage, swap: Any, name: str) -> float:
    """Of an adapter that is put on again untimed."""
    swap.switch(name)
    return stage.seconds(swap.revert, lambda: swap.switch(name))


def _other_strengths(stage: Stage, swap: Any, names: Iterable[str]) -> float:
    """Of adapters that are active before and after."""
    swap.switch(dict.fromkeys(names, 1.0))
    factors = iter(np.linspace(0.1, 0.9, 1000).tolist())
    return stage.seconds(lambda: swap.switch(dict.fromkeys(names, next(factors))))


def _indexing(stage: Stage, data: bytes) -> None:
    """torch's own scattered writes, positions decoded beforehand; neither saves anything."""
    targets = dict(stage.model.named_parameters())
    work = []
    with sd.open_delta(data) as delta:
        decoded: dict[str, Any] = {}
        for name, tensor in delta.items():
            key = name.split(".", 1)[1]
            if key not in decoded:
                positions = torch.from_numpy(tensor.positions()).to(stage.device)
                decoded[key] = positions, torch.from_numpy(tensor.values().copy()).to(stage.device).bfloat16()
            work.append((targets[name].data.view(-1), *decoded[key]))

    def put() -> None:
        for weight, positions, values in work:
            weight.index_put_((positions,), values, accumulate=True)

    def add() -> None:
        for weight, positions, values in work:
            weight.index_add_(0, positions, values)

    stage.row("compare", "index_put_ (accumulate)", 1, stage.seconds(put))
    stage.row("compare", "index_add_", 1, stage.seconds(add))


@contextmanager
def wrapped(stage: Stage, config: Any, layers: int) -> Iterator[Any]:
    """The first layers with a PEFT adapter on them; their weights are shared."""
    from peft import get_peft_model

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(
                torch.nn.ModuleDict({name: _same_linear(module.weight) for name, module in layer.items()})
                for layer in stage.model[:layers]
            )

    model = get_peft_model(Plain(), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "shira_weight" in name:
            torch.nn.init.normal_(parameter, std=1e-3)
    yield model
    del model
    gc.collect()


def _same_linear(weight: torch.Tensor) -> torch.nn.Linear:
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight.data, requires_grad=False)
    return linear


MODULES = [name.replace(".", "_") for name in LLAMA_7B_LAYER]


def _lora(stage: Stage) -> float:
    from peft import LoraConfig

    with wrapped(stage, LoraConfig(r=16, lora_alpha=32, target_modules=MODULES), stage.layers) as model:
        model.to(torch.bfloat16)
        merge = stage.row("compare", "PEFT LoRA merge", 1, stage.seconds(model.merge_adapter, model.unmerge_adapter))
        model.merge_adapter()
        stage.row("compare", "PEFT LoRA unmerge", 1, stage.seconds(model.unmerge_adapter, model.merge_adapter))
        model.unmerge_adapter()
    return merge


def _shira(stage: Stage) -> None:
    """Of one layer, for its masks are slow to make; the time is scaled to all."""
    from peft import ShiraConfig

    layers = 1
    with wrapped(stage, ShiraConfig(r=20, target_modules=MODULES), layers) as model:  # 20 (m + n) weights: about 1 %
        model.to(torch.bfloat16)
        seconds = stage.seconds(model.merge_adapter, model.unmerge_adapter)
        stage.row("compare", "PEFT SHiRA merge", 1, seconds * stage.layers / layers)


def _loaded(stage: Stage, layers: int, files: list[bytes]) -> Any:
    """A session with adapters "0", "1", ...; unchecked, because what was measured before has drifted the weights."""
    swap = sd.HotSwap(stage.model[:layers])
    for i, data in enumerate(files):
        swap.load(str(i), data, check=False)
    return swap


def _apply(stage: Stage, swap: Any, wanted: dict[str, float]) -> float:
    return stage.seconds(lambda: swap.switch(wanted), swap.revert)


def densities(stage: Stage, percents: list[float], layers: int) -> None:
    """Cost against density, beside a copy of the same weights."""
    _copy(stage, "density", layers)
    for percent in percents:
        swap = _loaded(stage, layers, adapters(stage, 1, percent / 100, layers))
        stage.row("density", "HotSwap apply", percent, _apply(stage, swap, {"0": 1.0}))
        stage.row("density", "HotSwap revert", percent, _reverts(stage, swap, "0"))
        swap.revert()


def counts(stage: Stage, numbers: list[int], layers: int) -> None:
    """Cost against the number of adapters that are active together, 1 % each."""
    swap = _loaded(stage, layers, adapters(stage, max(numbers), 0.01, layers))
    for number in numbers:
        wanted = {str(i): 1 / number for i in range(number)}
        for what in ("HotSwap, first time", "HotSwap, second time"):  # what is kept from then on is made there
            stage.row("adapters", what, number, stage.once(partial(swap.switch, wanted)))
            swap.revert()
        stage.row("adapters", "HotSwap apply", number, _apply(stage, swap, wanted))
        stage.row("adapters", "HotSwap other strengths", number, _other_strengths(stage, swap, wanted))
        swap.revert()


def sizes(stage: Stage, numbers: list[int]) -> None:
    """Cost against the size of the model, in layers, 1 %."""
    layer = one_layer(stage, 0.01, 0)
    for number in numbers:
        swap = _loaded(stage, number, [for_all_layers(layer, number)])
        stage.row("size", "HotSwap apply", number, _apply(stage, swap, {"0": 1.0}))


def where(device: str) -> str:
    """What it was measured on."""
    return machine() if device == "cpu" else torch.cuda.get_device_name()


def versions() -> str:
    """Of what is compared."""
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for package in ("torch", "triton", "peft", "numpy"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"no {package}")
    return ", ".join(found)


def write(stage: Stage, folder: Path, only: Sequence[str]) -> None:
    """The table as CSV, with machine and versions; rows of other experiments than `only` stay."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"switch-{stage.device}.csv"
    rows: list[dict[str, object]] = []
    if path.exists():
        with open(path, newline="", encoding="utf-8") as stream:
            rows = [dict(row) for row in csv.DictReader(stream) if row["experiment"] not in only]
    rows += [{**row, "machine": where(stage.device), "versions": versions()} for row in stage.rows]
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: EXPERIMENTS.index(str(row["experiment"]))))


def main() -> None:
    """Runs all of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, help="of 32; default 32 on a GPU, 1 on a CPU")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--only", nargs="+", choices=EXPERIMENTS, default=EXPERIMENTS, help="others stay as OUT has them"
    )
    parser.add_argument("--quick", action="store_true", help="one layer, few repeats, fewer figures")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    layers = options.layers or (32 if on_gpu and not options.quick else 1)
    torch.manual_seed(0)
    stage = Stage(options.device, layers, 2 if options.quick else options.repeats)
    print(f"{where(options.device)}; {versions()}")
    experiments: dict[str, Callable[[], object]] = {
        "compare": lambda: compare(stage),
        "lossless": lambda: lossless(stage),
        "density": lambda: densities(stage, [0.1, 1] if options.quick else [0.1, 0.2, 0.5, 1, 2, 5], layers),
        "adapters": lambda: counts(stage, [1, 2] if options.quick else [1, 2, 4, 8], layers),
        "size": lambda: sizes(stage, [number for number in (1, 2, 4, 8, 16, 32) if number <= layers]),
    }
    for name, experiment in experiments.items():
        if name in options.only and (name != "size" or layers > 1):
            experiment()
    write(stage, options.out, options.only)


if __name__ == "__main__":
    main()
