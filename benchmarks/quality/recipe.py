"""How the recipe of fitting was chosen: its settings varied one at a time, on both tasks, the same for all.

`python -m benchmarks.quality.recipe OUT` writes recipe.csv to a folder, that of `benchmarks.quality` by preference,
whose models it uses.  Compare by `divergence`, what is left of the base's divergence from the tuned model in the task's
own answers; a single score carries some points of standard error.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import shiradelta
from benchmarks.table import print_table
from shiradelta.fit import Fit, behaviour, by_training
from shiradelta.fit import training as train
from shiradelta.fit.choices import MASKS, FitMask

from .methods import TASKS, applied, load_tuned, prepare, tune

#: What is varied: settings of `Fit`, a mask that is measured only, or a module's constant.
VARIANTS: dict[str, dict[str, Any]] = {
    "the recipe": {},
    "mask by magnitude": {"mask": "magnitude"},
    "mask by gradient": {"mask": "gradient"},
    "mask by pruning the largest": {"mask": "prune"},
    "mask by least squares": {"mask": "refit"},
    **{f"the same, a rate of {rate}": {"mask": "refit", "relative_lr": rate} for rate in (0.06, 0.1, 0.2)},
    **{
        f"least squares of {begin} times, a rate of {rate}": {
            "mask": FitMask(f"refit of {begin}", "", begin=begin, solves=True, relative_lr=rate)
        }
        for begin, rate in ((5, 0.03), (5, 0.1), (5, 0.3), (10, 0.3))
    },
    "mask fixed at 40 %": {"train.PRUNE_UNTIL": 0.4},
    "mask fixed at 75 %": {"train.PRUNE_UNTIL": 0.75},
    "400 steps": {"steps": 400},
    "the output alone": {"behaviour.LAST": 1.0},
    "the fine-tune's word alone": {"text_share": 0.0},
    "values not rounded": {"values": "f32"},
    "over the model": {"scope": "model"},
}
MODULES = {"by_training": by_training, "train": train, "behaviour": behaviour}
FIELDS = ("task", "source", "seed", "variant", "kept", "second_kept", "divergence", "distance", "seconds")


@contextmanager
def varied(settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Within, constants have other values, and a mask has a name; gives the rest of the settings."""
    constants = {name: value for name, value in settings.items() if "." in name}
    own = settings.get("mask")
    if isinstance(own, FitMask):
        settings = {**settings, "mask": MASKS.add(own).name}
    patches = [mock.patch.object(MODULES[n.split(".")[0]], n.split(".")[1], v) for n, v in constants.items()]
    for patch in patches:
        patch.start()
    try:
        yield {name: value for name, value in settings.items() if name not in constants}
    finally:
        for patch in patches:
            patch.stop()
        if isinstance(own, FitMask):
            MASKS.remove(own.name)


def measure(
    task_name: str, source: str, seed: int, names: list[str], folder: Path, sparsity: float, tuning_steps: int
) -> list[dict[str, Any]]:
    """One fine-tune, fitted in several ways."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(2)
    task = TASKS[task_name](folder)
    path = folder / f"{source}{seed}"
    best = tune(task, source, seed, path, tuning_steps)
    tuned, model = load_tuned(task, source, path), task.load()
    base, apart = task.score(model), task.divergence(model, tuned)
    rows = []
    for name in names:
        file = folder / f"{source}{seed}-{name.replace(' ', '-')}.shd"
        start = time.monotonic()
        with varied(VARIANTS[name]) as settings:
            options = {key: settings.pop(key) for key in ("scope", "values") if key in settings}
            fit = Fit(task.texts, seed=seed, **settings)
            report = shiradelta.convert(path, file, sparsity, task.base, fit=fit, **options)
        seconds = time.monotonic() - start
        assert report.fit is not None
        with applied(model, file):
            kept = [(s - b) / (t - b) for s, b, t in zip(task.score(model), base, best, strict=True)]
            left = task.divergence(model, tuned) / apart
        found = (task.name, source, seed, name, kept[0], kept[1], left, report.fit.fitted, round(seconds, 1))
        rows.append(dict(zip(FIELDS, found, strict=True)))
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--sparsity", type=float, default=0.01)
    parser.add_argument("--tuning-steps", type=int, default=400)
    parser.add_argument("--jobs", type=int, default=6, help="processes that share the device")
    options = parser.parse_args()
    out: Path = options.out
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        for task in options.tasks:
            (out / task).mkdir(parents=True, exist_ok=True)
            if task == "language":
                pool.submit(prepare, out / task).result()
        how = options.sparsity, options.tuning_steps
        jobs = [
            pool.submit(measure, task, source, seed, options.variants, out / task, *how)
            for task, seed, source in product(options.tasks, range(options.seeds), ("LoRA", "full"))
        ]
        for job in as_completed(jobs):
            rows += job.result()
    with open(out / "recipe.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    lines = [["task, fine-tune", "variant", "gain kept", "divergence left", "distance"]]
    for (task, source), name in product(dict.fromkeys((r["task"], r["source"]) for r in rows), options.variants):
        same = [r for r in rows if (r["task"], r["source"], r["variant"]) == (task, source, name)]
        mean = {key: sum(r[key] for r in same) / len(same) for key in ("kept", "divergence", "distance")}
        line = f"{mean['kept']:.1%}", f"{mean['divergence']:.2%}", f"{mean['distance']:.4f}"
        lines.append([f"{task}, {source}", name, *line])
    print_table(f"the recipe varied, {options.sparsity:.1%} of the weights, means over {options.seeds} seeds", lines)


if __name__ == "__main__":
    main()
