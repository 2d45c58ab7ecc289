"""One fine-tune and all files of it.  Rows are kept as they come: what is there is not made again."""

from __future__ import annotations

import csv
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from .methods import METHODS, TASKS, Case, Made, tune
from .summary import FIELDS

Row = dict[str, Any]


def compare(
    task_name: str,
    source: str,
    seed: int,
    folder: Path,
    sparsities: Sequence[float],
    methods: Sequence[str],
    steps: int | None,
    tuning_steps: int,
) -> str:
    """Tunes a model, and adds a row to a table beside it for every file that is made of it; says how long it took."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(2)  # one of several processes
    start = time.monotonic()
    table = folder / f"{source}{seed}.csv"
    if not table.exists():
        with open(table, "w", newline="") as stream:
            csv.DictWriter(stream, FIELDS).writeheader()
    done = {(row["method"], row["sparsity"]) for row in read(table)}
    task = TASKS[task_name](folder)
    tuned = tune(task, source, seed, folder / f"{source}{seed}", tuning_steps)
    case = Case(task, source, seed, folder, task.load(), steps, tuning_steps)
    base = task.score(case.model)
    for method, sparsity, made, seconds in _files(case, sparsities, methods, done, tuned):
        kept = [(found - low) / (best - low) for found, low, best in zip(made.scores, base, tuned, strict=True)]
        values = (
            *(task.name, source, seed, method, sparsity, made.bytes),
            *(task.measures[0], base[0], tuned[0], made.scores[0], kept[0], task.measures[1], kept[1]),
            *(made.distance, seconds),
        )
        with open(table, "a", newline="") as stream:
            csv.DictWriter(stream, FIELDS).writerow(dict(zip(FIELDS, values, strict=True)))
    return f"{task.name}, {source}, seed {seed}: {time.monotonic() - start:.0f} s"


def _files(
    case: Case,
    sparsities: Sequence[float],
    methods: Sequence[str],
    done: set[tuple[str, str]],
    tuned: tuple[float, ...],
) -> Iterator[tuple[str, float, Made, float]]:
    if case.source == "LoRA" and ("itself", "1.0") not in done:
        halved = (case.tuned / "adapter_model.safetensors").stat().st_size // 2  # PEFT writes float32
        yield "itself", 1.0, Made(halved, tuned), 0.0
    makers: dict[str, Callable[[Case, float], Made]] = METHODS[case.source]
    for method, sparsity in product(makers, sparsities):
        if method in methods and (method, str(sparsity)) not in done:
            start = time.monotonic()
            made = makers[method](case, sparsity)
            yield method, sparsity, made, round(time.monotonic() - start, 1)


def read(table: Path) -> list[Row]:
    """Rows of a table; numbers stay text."""
    with open(table, newline="") as stream:
        return list(csv.DictReader(stream))
