"""Sparse adapters trained directly, with labels: every mask at several sparsities, against a LoRA of rank 16.

The tasks are those of `benchmarks.quality`; the number of steps is the LoRA's, the learning rate is one for all masks.
`python -m benchmarks.training_quality OUT` writes training-quality.csv and .png; a GPU takes some minutes.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.language import PRETRAINING_STEPS
from benchmarks.quality.methods import TASKS, prepare, score_with
from benchmarks.quality.tasks import STEPS, TUNE, optimise
from benchmarks.table import print_table
from shiradelta import train
from shiradelta.nonzeros.pruning import PRUNE_FROM, PRUNE_UNTIL
from shiradelta.train.masks import MASKS, can_be_larger

#: Batches that gradients are summed over for a mask.
CALIBRATION = 16
#: The paper takes 5e-4 where LoRA takes 2e-4: more than twice as much; here for LoRA's 1e-3, with pruning.
RATE = 2e-3

Row = dict[str, Any]
#: Task, method, sparsity, rate, scope, times the sparsity that is pruned from.
Key = tuple[str, str, float, float, str, float]


def job(
    task_name: str,
    method: str,
    sparsity: float,
    seed: int,
    rate: float,
    scope: str,
    prune_from: float,
    steps: int,
    folder: Path,
) -> Row:
    """One training and its score; `method` is a mask, "LoRA" or "base".

    The density is pruned from `prune_from` times the sparsity; 1 keeps the mask, as do masks that cannot be larger.
    """
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    task = TASKS[task_name](folder)
    start = time.monotonic()
    prune_from = prune_from if can_be_larger(method, None) else 1
    file = folder / f"{task_name}-{method}-{sparsity}-{seed}-{rate}-{scope}-{prune_from:g}"
    quantised: tuple[float, ...] = ()
    if method == "base":
        scores = task.score(task.load())
    elif method == "LoRA":
        scores = task.score(TUNE["LoRA"](task, file, seed, steps))
    else:
        model = task.load()
        batches = list(islice(task.batches(seed + 1_000), CALIBRATION))
        targets = [name for name, _ in model.named_parameters() if task.trained(name)]
        weights = [name for name in targets if name.removesuffix(".weight").endswith(tuple(task.linears))]
        how: dict[str, Any] = {"scope": scope}
        if prune_from > 1:
            how |= {"prune_steps": round(PRUNE_UNTIL * steps), "prune_from": prune_from}
        tuner = train.attach(model, sparsity, method, weights, batches, loss=task.loss, seed=seed, **how)
        optimise(task, model, rate, seed, steps)
        scores = task.score(model)
        tuner.save(file.with_suffix(".shd"), values="int4")
        tuner.detach()
        quantised = score_with(task, model, file.with_suffix(".shd"))
    return {
        "task": task.name,
        "method": method,
        "sparsity": sparsity,
        "seed": seed,
        "rate": rate,
        "scope": scope,
        "prune_from": prune_from,
        "score": scores[0],
        "int4": quantised[0] if quantised else "",
        "second": scores[1],
        "seconds": round(time.monotonic() - start, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--masks", nargs="+", default=list(MASKS), choices=list(MASKS))
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.005, 0.01, 0.02])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", nargs="+", type=float, default=[RATE])
    parser.add_argument("--scope", default="tensor", choices=["tensor", "model"], help="of the share; not for struct")
    parser.add_argument("--prune-from", type=float, default=PRUNE_FROM, help="times the sparsity; 1 keeps the mask")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--pretraining", type=int, default=PRETRAINING_STEPS, help="steps, of the language model")
    parser.add_argument("--processes", type=int, default=6, help="at once, on one GPU")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    work = options.out / "work"
    if "language" in options.tasks:
        print(f"pretrained in {prepare(work, options.pretraining):.0f} s", flush=True)
    work.mkdir(exist_ok=True)
    jobs: list[tuple[Any, ...]] = []
    for name in options.tasks:
        jobs.append((name, "base", 0.0, 0, 0.0))
        jobs += [(name, "LoRA", 1.0, seed, 0.0) for seed in range(options.seeds)]
    # What the bar is about comes first, should there not be time for all.
    shares = sorted(options.sparsity, key=lambda share: abs(share - 0.01))
    runs = product(shares, range(options.seeds), options.masks, options.rates, options.tasks)
    jobs += [(name, mask, share, seed, rate) for share, seed, mask, rate, name in runs]
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    rows: list[Row] = []
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
        how = {"scope": options.scope, "prune_from": options.prune_from, "steps": options.steps, "folder": work}
        futures = [pool.submit(partial(job, **how), *arguments) for arguments in jobs]
        for future in as_completed(futures):
            rows.append(future.result())
            print(*rows[-1].values(), flush=True)
            write(rows, options.out / "training-quality.csv")
    summarise(rows)
    draw(rows, options.out / "training-quality.png")


def write(rows: Sequence[Row], path: Path) -> None:
    with open(path, "w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def gains(rows: Iterable[Row]) -> dict[Key, list[tuple[float, float]]]:
    """Key -> share of the LoRA's gain, by float32 values and by 4 bits, seed by seed.

    The LoRA's gain is the mean over its seeds.
    """
    by_task: Mapping[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_task[row["task"]].append(row)
    found: dict[Key, list[tuple[float, float]]] = defaultdict(list)
    for task, of_task in by_task.items():
        base = next(float(row["score"]) for row in of_task if row["method"] == "base")
        lora = statistics.fmean(float(row["score"]) for row in of_task if row["method"] == "LoRA")
        for row in of_task:
            if row["method"] != "base":
                scores = float(row["score"]), float(row["int4"] or row["score"])
                kept = tuple((score - base) / (lora - base) for score in scores)
                key = (
                    task,
                    row["method"],
                    float(row["sparsity"]),
                    float(row["rate"]),
                    row["scope"],
                    float(row["prune_from"]),
                )
                found[key].append((kept[0], kept[1]))
    return found


def summarise(rows: Sequence[Row]) -> None:
    lines = [
        [
            "task, method",
            "weights",
            "of each",
            "pruned from",
            "rate",
            "gain of LoRA's",
            "spread",
            "with 4 bits",
            "seeds",
        ]
    ]
    for (task, method, sparsity, rate, scope, begin), kept in sorted(gains(rows).items()):
        whole = [pair[0] for pair in kept]
        spread = f"{statistics.stdev(whole):.1%}" if len(kept) > 1 else "-"
        bits = f"{statistics.fmean(pair[1] for pair in kept):.1%}"
        share = f"{statistics.fmean(whole):.1%}"
        lines.append(
            [
                f"{task}, {method}",
                f"{sparsity:.1%}",
                scope,
                f"{begin:g} x",
                f"{rate:g}",
                share,
                spread,
                bits,
                str(len(kept)),
            ]
        )
    print_table("share of the gain of a LoRA r16, trained directly", lines)


def draw(rows: Sequence[Row], path: Path) -> None:
    from matplotlib.figure import Figure

    found = gains(rows)
    tasks = sorted({key[0] for key in found})
    figure = Figure(figsize=(5 * len(tasks), 4), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for method in sorted({key[1] for key in found if key[0] == task} - {"LoRA"}):
            points = sorted(
                (key[2] * 100, statistics.fmean(k[0] for k in kept))
                for key, kept in found.items()
                if key[:2] == (task, method)
            )
            axes.plot(*zip(*points, strict=True), marker="o", label=method)
        axes.axhline(1, color="gray", linestyle=":", label="LoRA r16")
        axes.set(title=task, xlabel="weights that change, %", ylabel="share of the LoRA's gain", xscale="log")
        axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
