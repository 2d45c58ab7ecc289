"""A family of experts against one delta, on several tasks at once: what routes gain, and what a prompt costs.

`python -m benchmarks.experts OUT` tunes the language model of bytes that `benchmarks.quality.small` pretrains to the
four tasks of benchmarks/fusion_tasks.py (a query, then its answer; nothing says which task it is): as a family, and as
one delta with as many steps as the family's base delta, and as the whole family.  It writes experts.csv to a folder,
nats a byte of held-out answers, and prints milliseconds a prompt.  A CPU takes some minutes a seed.

`--model real` takes the Gemma 3 270M and the tasks that `python -m benchmarks.quality.gemma OUT` makes, and a GPU if
there is one; figures are nats a token then.  Rows and models are kept in OUT as they come, and what is there is not
done again, so another scale needs another folder.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.experts.measure import METHODS, Experiment
from benchmarks.experts.subjects import SUBJECTS, Scale
from benchmarks.quality.compare import read
from benchmarks.table import print_table


def main() -> None:
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experts", description=about)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", choices=list(SUBJECTS), default="small")
    parser.add_argument("--tasks", nargs="+", help="of the model's; by default all")
    parser.add_argument("--examples", type=int, help="to train on, of each task")
    parser.add_argument("--items", type=int, help="to score, of each task")
    parser.add_argument("--steps", type=int, help="of the base delta")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--relative-lr", type=float)
    parser.add_argument("--sparsity", type=float, default=0.01)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    given.out.mkdir(parents=True, exist_ok=True)
    make, tasks, scale = SUBJECTS[given.model]
    scale = Scale(
        **{key: value if (asked := getattr(given, key)) is None else asked for key, value in vars(scale).items()}
    )
    subject = make(given.out, given.tasks or tasks, scale)
    table = given.out / "experts.csv"
    rows = read(table) if table.exists() else []
    costs: list[dict[str, float]] = []
    for seed in given.seeds:
        done = [row["method"] for row in rows if (row["model"], row["seed"]) == (given.model, str(seed))]
        folder = given.out / f"{given.model}-{seed}"
        if set(METHODS) <= set(done):
            continue
        experiment = Experiment(subject, scale, given.sparsity, given.experts, seed, folder, done)
        for method, found in experiment.run():
            if method not in done:
                rows.append({"model": given.model, "method": method, "seed": str(seed), **found})
                write(table, rows)
                print(*rows[-1].values(), flush=True)
        costs.append(experiment.costs)
    own = [row for row in rows if row["model"] == given.model]
    summarise(own, list(subject.held_out), subject.unit)
    if costs:
        where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        medians = [[what, f"{statistics.median(cost[what] for cost in costs):.4g}"] for what in costs[0]]
        print_table(f"cost, median of seeds, {where}", medians)


def write(table: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Rows of models that have other tasks have other columns."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with open(table, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(rows)


def summarise(rows: Sequence[dict[str, Any]], tasks: Sequence[str], unit: str) -> None:
    """Means over seeds, and the spread of the mean over tasks."""
    seeds = Counter(row["method"] for row in rows)
    lines = [["", *tasks, "mean", "spread", "seeds"]]
    for method in seeds:
        of = [[float(row[task]) for task in tasks] for row in rows if row["method"] == method]
        means = [statistics.fmean(one) for one in of]
        spread = f"{statistics.stdev(means):.3f}" if len(means) > 1 else "-"
        by_task = [f"{statistics.fmean(one):.3f}" for one in zip(*of, strict=True)]
        lines.append([method, *by_task, f"{statistics.fmean(means):.3f}", spread, str(seeds[method])])
    print_table(f"nats a {unit} of held-out answers", lines)


if __name__ == "__main__":
    main()
