"""Sparse adapters beside their neighbours, trained with labels at equal numbers of trained parameters.

`python -m benchmarks.quality.neighbours OUT` writes neighbours.csv to a folder and prints means over seeds: SHiRA's
masks (`snip`, `rand`, `grad`, `wm`, `struct`), SHiRA-DoRA, RIGSA, SymLoRA, PEFT's LoRA and DoRA; each one's score, its
score on another task before and after (forgetting), seconds of preparation and of a step, memory, and the size of the
file.  What OUT holds already is not done again.  The small model of bytes is for a CPU.  `--model encoder` takes
all-MiniLM-L6-v2, which has square weights for SymLoRA too; `--model real` takes the Gemma 3 270M and the tasks that
`python -m benchmarks.quality.gemma OUT` makes.  A GPU is taken if there is one.

The learning rate of each method is the best of `RATES` times its usual one, by the loss of the last quarter of a run of
half the steps with another seed; less than an epoch is trained, so that loss is one on unseen examples.
"""

from __future__ import annotations

import argparse
import csv
import gc
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.table import print_table
from shiradelta import train

from .compare import read
from .methods import is_linear
from .small import Prose, Small
from .tasks import DEVICE, Task

#: Name of a model -> (what it is tuned to, what it may forget).
PAIRS: dict[str, Callable[[Path], tuple[Task, Task]]] = {}
#: Batches whose gradients choose a mask, and what training warms up for.
CALIBRATION, WARM_UP = 8, 0.1
#: Learning rates that are tried, relative to a method's own; the seed that tries them.
RATES, TRIAL = (1 / 3, 1.0, 3.0, 10.0), 99
FIELDS = (
    "model", "task", "method", "seed", "trained", "changed", "rate", "base", "score", "other_before", "other_after",
    "prepare_seconds", "step_seconds", "held_bytes", "file_bytes",
)  # fmt: skip


def small(out: Path) -> tuple[Task, Task]:
    """Python source, and prose."""
    return Small(out / "small"), Prose(out / "small")


def real(out: Path) -> tuple[Task, Task]:
    """Definitions, and code; Gemma 3 270M."""
    from .real import Code, Define

    return Define(out / "define"), Code(out / "code")


def encoder(out: Path) -> tuple[Task, Task]:
    """Words by their definitions, and functions by their documentation; all-MiniLM-L6-v2."""
    from .dictionary import Dictionary, Functions

    return Dictionary(out / "dictionary"), Functions(out / "functions")


PAIRS |= {"small": small, "real": real, "encoder": encoder}


@dataclass
class Run:
    """A model ready to be trained.

    Attributes:
        model: with what is trained requiring gradients.
        parameters: what is trained.
        changed: elements of the base that change once it is fused.
        save: writes the file that a user would keep, and says its bytes.
        decay: weight decay of the optimizer.
        beside: bytes held beside model, parameters, gradients and moments, by count: positions, and a search's state.
    """

    model: nn.Module
    parameters: list[nn.Parameter]
    changed: int
    save: Callable[[Path], int]
    decay: float = 0.0
    beside: int = 0


@dataclass(frozen=True)
class Case:
    """What a method gets: the task, the seed, and how much it may train."""

    task: Task
    seed: int
    rank: int
    epoch: int

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        return {name: weight for name, weight in self.task.load().named_parameters() if is_linear(self.task, name)}

    @property
    def budget(self) -> int:
        """Parameters of a LoRA of the rank."""
        return self.rank * sum(sum(weight.shape) for weight in self.weights.values())


def sparse(case: Case, mask: str, magnitude: bool = False, decay: float = 0.0) -> Run:
    """SHiRA's masks, with lengths of rows or without, and RIGSA."""
    weights = case.weights
    rows = sum(len(weight) for weight in weights.values()) if magnitude else 0
    share = (case.budget - rows) / sum(weight.numel() for weight in weights.values())
    count = case.epoch if mask == "rigsa" else CALIBRATION
    batches = list(islice(case.task.batches(case.seed + 1_000), count))
    model = case.task.load()
    how: dict[str, Any] = {"loss": case.task.loss, "seed": case.seed, "magnitude": magnitude}
    tuner = train.attach(model, share, mask, list(weights), batches, **how)

    def save(path: Path) -> int:
        tuner.save(path.with_suffix(".shd"), values="int4")
        return path.with_suffix(".shd").stat().st_size

    numel, stored = sum(weight.numel() for weight in weights.values()), next(iter(weights.values())).element_size()
    search = (7 + stored) * numel if mask == "rigsa" else 0  # shiradelta/train/rigsa.py
    return Run(model, tuner.parameters(), tuner.nnz, save, decay, max((4 + stored) * tuner.nnz, search))


def lora(case: Case, dora: bool = False) -> Run:
    """PEFT's; a DoRA has the largest rank that keeps the budget with its magnitudes, 1 at least."""
    from peft import LoraConfig, get_peft_model

    weights = case.weights
    rank = case.rank
    if dora:
        rows = sum(len(weight) for weight in weights.values())
        rank = max(1, (case.budget - rows) * case.rank // case.budget)
    torch.manual_seed(case.seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(case.task.linears), use_dora=dora)
    model: Any = get_peft_model(case.task.load(), config)
    trained = [weight for weight in model.parameters() if weight.requires_grad]

    def save(path: Path) -> int:
        model.save_pretrained(str(path))
        return (path / "adapter_model.safetensors").stat().st_size

    return Run(model, trained, sum(weight.numel() for weight in weights.values()), save)


class NoSquareWeightsError(Exception):
    """A model has none of the weights that SymLoRA is for."""


class Symmetric(nn.Module):
    """A linear layer and Q diag(L) Q^T (SymLoRA): Q orthonormal at first, L zero."""

    def __init__(self, layer: nn.Module, rank: int) -> None:
        super().__init__()
        self.layer, weight = layer, layer.get_parameter("weight")
        self.Q = nn.Parameter(torch.linalg.qr(torch.randn(len(weight), rank))[0].to(weight.device))
        self.Lambda = nn.Parameter(torch.zeros(rank, device=weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both."""
        found: Tensor = self.layer(x) + (((x.to(self.Q.dtype) @ self.Q) * self.Lambda) @ self.Q.T).to(x.dtype)
        return found


def symlora(case: Case) -> Run:
    """SymLoRA on the square weights alone, which is all that it is for, with as many parameters as the others."""
    from safetensors.torch import save_file

    torch.manual_seed(case.seed)
    model = case.task.load().requires_grad_(False)
    shapes = {name.removesuffix(".weight"): weight.shape for name, weight in case.weights.items()}
    square = {name: shape[0] for name, shape in shapes.items() if shape[0] == shape[1]}
    if not square:
        raise NoSquareWeightsError
    rank = max(1, round(case.budget / sum(side + 1 for side in square.values())))
    made: dict[str, Symmetric] = {}
    for name, side in square.items():
        parent, _, own = name.rpartition(".")
        made[name] = Symmetric(model.get_submodule(name), min(rank, side))
        setattr(model.get_submodule(parent), own, made[name])

    def save(path: Path) -> int:
        parts = {f"{name}.{part}": getattr(layer, part) for name, layer in made.items() for part in ("Q", "Lambda")}
        save_file(
            {name: one.detach().contiguous().cpu() for name, one in parts.items()}, path.with_suffix(".safetensors")
        )
        return path.with_suffix(".safetensors").stat().st_size

    trained = [part for layer in made.values() for part in (layer.Q, layer.Lambda)]
    return Run(model, trained, sum(side**2 for side in square.values()), save)


#: Method -> (what makes it, its usual learning rate by kind in `Task.rates`).
METHODS: dict[str, tuple[Callable[[Case], Run], str]] = {
    "SHiRA snip": (lambda case: sparse(case, "snip"), "sparse"),
    "SHiRA rand": (lambda case: sparse(case, "rand"), "sparse"),
    "SHiRA grad": (lambda case: sparse(case, "grad"), "sparse"),
    "SHiRA wm": (lambda case: sparse(case, "wm"), "sparse"),
    "SHiRA struct": (lambda case: sparse(case, "struct"), "sparse"),
    "SHiRA-DoRA snip": (lambda case: sparse(case, "snip", magnitude=True), "sparse"),
    "SHiRA-DoRA rand": (lambda case: sparse(case, "rand", magnitude=True), "sparse"),
    "RIGSA": (lambda case: sparse(case, "rigsa", decay=0.1), "sparse"),
    "LoRA": (lora, "LoRA"),
    "DoRA": (lambda case: lora(case, dora=True), "LoRA"),
    "SymLoRA": (symlora, "LoRA"),
}


def held_bytes(run: Run, before: int) -> int:
    """Memory beside the model: on a GPU its peak, activations included; else at most that, by count."""
    if DEVICE.type == "cuda":
        own = {id(weight) for weight in run.parameters}
        frozen = [weight for weight in run.model.parameters() if id(weight) not in own]
        model = sum(weight.numel() * weight.element_size() for weight in frozen)
        return torch.cuda.max_memory_allocated() - before - model
    return run.beside + sum(4 * parameter.numel() * parameter.element_size() for parameter in run.parameters)


def fit(case: Case, method: str, rate: float, steps: int) -> tuple[Run, dict[str, Any], float]:
    """Trains: (the run, columns of its row, mean loss of the last quarter)."""
    gc.collect()
    before = 0
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    run = METHODS[method][0](case)
    prepared = time.perf_counter() - start
    optimizer = torch.optim.AdamW(run.parameters, lr=rate, weight_decay=run.decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min(1.0, (n + 1) / (WARM_UP * steps)) * (1 + math.cos(math.pi * n / steps)) / 2
    )
    stream, times, losses = case.task.batches(case.seed), [], []
    for _ in range(steps):
        start = time.perf_counter()
        loss = case.task.loss(run.model, next(stream))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        times.append(time.perf_counter() - start)
    columns = {
        "trained": sum(parameter.numel() for parameter in run.parameters),
        "changed": run.changed,
        "rate": rate,
        "prepare_seconds": round(prepared, 2),
        "step_seconds": round(statistics.median(times), 4),
        "held_bytes": held_bytes(run, before),
    }
    return run, columns, statistics.fmean(losses[-max(1, steps // 4) :])


def best_rate(case: Case, method: str, steps: int) -> float:
    """The learning rate whose short run ends with the least loss; one that diverges is never taken."""
    usual = case.task.rates[METHODS[method][1]]
    losses = {rate * usual: fit(case, method, rate * usual, steps)[2] for rate in RATES}
    return min(losses, key=lambda rate: losses[rate] if math.isfinite(losses[rate]) else math.inf)


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows that the folder does not have yet, as they come."""
    table = options.out / "neighbours.csv"
    done = {(row["model"], row["method"], row["seed"]) for row in (read(table) if table.exists() else [])}
    task, other = PAIRS[options.model](options.out)
    base = task.load()
    scores = task.score(base)[0], other.score(base)[0]
    del base
    for method in options.methods:
        seeds = [seed for seed in range(options.seeds) if (options.model, method, str(seed)) not in done]
        if not seeds:
            continue
        try:
            rate = best_rate(Case(task, TRIAL, options.rank, options.epoch), method, max(1, options.steps // 2))
        except NoSquareWeightsError:
            print(f"{method} is left out: {task.name} has no square weights, which it is for", flush=True)
            continue
        for seed in seeds:
            run, columns, _ = fit(Case(task, seed, options.rank, options.epoch), method, rate, options.steps)
            file = options.out / "files" / f"{options.model}-{method.replace(' ', '-')}-{seed}"
            yield {
                "model": options.model,
                "task": task.name,
                "method": method,
                "seed": seed,
                "base": scores[0],
                "score": task.score(run.model)[0],
                "other_before": scores[1],
                "other_after": other.score(run.model)[0],
                "file_bytes": run.save(file),
                **columns,
            }


def summarise(found: Sequence[dict[str, Any]]) -> None:
    """Means over seeds, with the spread of the gain and of what is forgotten."""
    head = "model, method", "trained", "gain", "spread", "forgotten", "spread", "ms a step", "prepare", "beside", "file"
    lines = [[*head, "seeds"]]
    for key in dict.fromkeys((row["model"], row["method"]) for row in found):
        same = [row for row in found if (row["model"], row["method"]) == key]

        def of(*names: str, same: Sequence[dict[str, Any]] = same) -> list[float]:
            first, *less = names
            return [float(row[first]) - sum(float(row[name]) for name in less) for row in same]

        gains, lost = of("score", "base"), of("other_before", "other_after")
        spreads = [f"{statistics.stdev(one):.4f}" if len(one) > 1 else "-" for one in (gains, lost)]
        lines.append(
            [
                ", ".join(key),
                f"{int(same[0]['trained']):,}",
                f"{statistics.fmean(gains):.4f}",
                spreads[0],
                f"{statistics.fmean(lost):.4f}",
                spreads[1],
                f"{1000 * statistics.fmean(of('step_seconds')):.0f}",
                f"{statistics.fmean(of('prepare_seconds')):.1f} s",
                f"{statistics.fmean(of('held_bytes')) / 1e6:.2f} MB",
                f"{statistics.fmean(of('file_bytes')) / 1e3:.1f} KB",
                str(len(same)),
            ]
        )
    print_table("trained with labels, equal numbers of trained parameters", lines)


def main() -> None:
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.neighbours", description=about)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", choices=list(PAIRS), default="small")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rank", type=int, default=2, help="of the LoRA, whose number of parameters all have")
    parser.add_argument("--epoch", type=int, default=100, help="batches of one of the four rounds of RIGSA's search")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    (options.out / "files").mkdir(parents=True, exist_ok=True)
    table = options.out / "neighbours.csv"
    if not table.exists():
        with open(table, "w", newline="") as stream:
            csv.DictWriter(stream, FIELDS).writeheader()
    for row in rows(options):
        with open(table, "a", newline="") as stream:
            csv.DictWriter(stream, FIELDS).writerow(row)
        print(*row.values(), flush=True)
    summarise(read(table))


if __name__ == "__main__":
    main()
