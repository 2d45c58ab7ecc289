"""A delta on a new base: what `--from-base` keeps of it, beside the old delta and one made for the new base.

`python -m benchmarks.quality.new_base OUT` needs what `python -m benchmarks.quality.gemma OUT` makes.  Two full
fine-tunes to `--base-task` with different seeds are the old base and the new one.  A LoRA of the old base, tuned to
`--task`, is fitted as a file, and then goes over to the new base: as it is, and fitted with the old base and that file
as the teacher, without labels.  Beside it stands what a publisher would do otherwise: a LoRA tuned on the new base with
labels, and a fit of that.  Scores are on held-out examples of `--task`, all with the new base; the share is of the last
fit's gain.  It writes new_base.csv to OUT; models that an earlier run left there are taken up.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

import shiradelta
from benchmarks.table import print_table
from shiradelta.fit import Fit

from .methods import TASKS, load_tuned
from .tasks import TUNE, Task

FIELDS = ("task", "base_task", "seed", "way", "bytes", "score", "kept", "second_score", "second_kept", "seconds")
#: The fine-tunes that are the old base and the new one.
SEEDS = {"old": 0, "new": 1}
Rows = list[dict[str, Any]]


def with_tokenizer(folder: Path, task: Task) -> Path:
    """A tuned model's folder, with what else the folder of its base holds."""
    for file in task.base.iterdir():
        if not (folder / file.name).exists():
            shutil.copy(file, folder)
    return folder


def bases(task: Task, out: Path, steps: int) -> dict[str, Path]:
    """Folders of the old and the new base."""
    found = {}
    for name, seed in SEEDS.items():
        folder = found[name] = out / f"{name}-base"
        if not (folder / "model.safetensors").exists():
            TUNE["full"](task, folder, seed, steps)
        with_tokenizer(folder, task)
    return found


def loras(task: Task, models: dict[str, Path], out: Path, seed: int, steps: int) -> dict[str, Path]:
    """Folders of a LoRA of each base."""
    found = {}
    for name, base in models.items():
        folder = found[name] = out / f"{name}-lora{seed}"
        task.base = base
        if not (folder / "adapter_model.safetensors").exists():
            TUNE["LoRA"](task, folder, seed, steps)
    return found


@contextmanager
def with_file(model: nn.Module, file: Path) -> Iterator[None]:
    """Within, a file is switched on, whatever base it was made for."""
    swap = shiradelta.HotSwap(model)
    swap.load("file", file, check=False)
    with swap.applied("file"):
        yield


def measure(
    task: Task, models: dict[str, Path], out: Path, seed: int, options: argparse.Namespace
) -> Iterator[tuple[str, int, tuple[float, ...], float]]:
    """(way, bytes of its file, scores with the new base, seconds of making the file), without a file first."""
    adapters = loras(task, models, out, seed, options.tuning_steps)
    files = {way: out / f"{way}{seed}.shd" for way in ("old", "moved", "fresh")}
    settings: dict[str, Any] = {
        "old": (adapters["old"], models["old"], None),
        "moved": (files["old"], models["new"], models["old"]),
        "fresh": (adapters["new"], models["new"], None),
    }
    task.base = models["new"]
    model = task.load()
    yield "the new base", 0, task.score(model), 0.0
    for way, (source, base, from_base) in settings.items():
        start = time.monotonic()
        fit = Fit(task.texts, seed=seed, steps=options.steps)
        shiradelta.convert(source, files[way], options.sparsity, base, from_base=from_base, fit=fit)
        seconds = time.monotonic() - start
        with with_file(model, files[way]):
            scores = task.score(model)
        yield WAYS[way], files[way].stat().st_size, scores, round(seconds, 1)
    size = (adapters["new"] / "adapter_model.safetensors").stat().st_size
    yield "the new base's LoRA", size, task.score(load_tuned(task, "LoRA", adapters["new"])), 0.0


WAYS = {"old": "the old file, as it is", "moved": "moved with --from-base", "fresh": "LoRA of the new base, fitted"}


def rows_of(task: Task, base_task: Task, seed: int, found: list[tuple[str, int, tuple[float, ...], float]]) -> Rows:
    """Rows of one seed, with shares of the gain of the new base's own fit."""
    by_way = {way: scores for way, _, scores, _ in found}
    low, high = by_way["the new base"], by_way[WAYS["fresh"]]
    rows = []
    for way, size, scores, seconds in found:
        kept = [(score - base) / (best - base) for score, base, best in zip(scores, low, high, strict=True)]
        values = task.name, base_task.name, seed, way, size, scores[0], kept[0], scores[1], kept[1], seconds
        rows.append(dict(zip(FIELDS, values, strict=True)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--task", choices=list(TASKS), default="define", help="what the delta is for")
    parser.add_argument("--base-task", choices=list(TASKS), default="explain", help="what both bases are tuned to")
    parser.add_argument("--seeds", type=int, default=1, help="LoRAs of each base")
    parser.add_argument("--sparsity", type=float, default=0.01)
    parser.add_argument("--steps", type=int, help="as --fit-steps of shiradelta")
    parser.add_argument("--tuning-steps", type=int, default=200)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    out: Path = options.out / "new_base"
    out.mkdir(parents=True, exist_ok=True)
    task, base_task = (TASKS[name](options.out / name) for name in (options.task, options.base_task))
    models = bases(base_task, out, options.tuning_steps)
    rows: Rows = []
    for seed in range(options.seeds):
        rows += rows_of(task, base_task, seed, list(measure(task, models, out, seed, options)))
        with open(options.out / "new_base.csv", "w", newline="") as stream:
            writer = csv.DictWriter(stream, FIELDS)
            writer.writeheader()
            writer.writerows(rows)
    lines = [
        [
            row["way"],
            f"{row['seed']}",
            f"{row['bytes']:,}",
            f"{row['score']:.3f}",
            f"{row['kept']:.1%}",
            f"{row['second_kept']:.1%}",
            f"{row['seconds']:.0f} s",
        ]
        for row in rows
    ]
    head = ["with the new base", "seed", "bytes", task.measures[0], "gain kept", "second", "fit"]
    print_table(f"{task.name}; bases: {base_task.name}, {options.sparsity:.1%} of the weights, 4 bits", [head, *lines])


if __name__ == "__main__":
    main()
