"""How much of a fine-tune a file keeps: two tasks, a LoRA and a full fine-tune of each, and what else there is.

`python -m benchmarks.quality OUT` writes quality.csv and quality.png to a folder; one GPU takes some minutes.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from .methods import compare, prepare
from .summary import FIELDS, draw, summarise

TASKS = ("dictionary", "language")
SOURCES = ("LoRA", "full")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--seeds", type=int, default=3, help="fine-tunes of each kind, each fitted with its own seed")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.005, 0.01, 0.02, 0.05])
    parser.add_argument("--steps", type=int, help="as --fit-steps of shiradelta")
    parser.add_argument("--tuning-steps", type=int, default=400)
    parser.add_argument("--pretraining-steps", type=int, default=2_000)
    parser.add_argument("--jobs", type=int, default=4, help="processes that share the device")
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with (
        open(out / "quality.csv", "w", newline="") as stream,
        ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool,
    ):
        writer = csv.DictWriter(stream, FIELDS)
        writer.writeheader()
        for found in _jobs(pool, options):
            rows.append(found)
            writer.writerow(found)
            stream.flush()
            pass
    print(summarise(rows))
    draw(rows, out / "quality.png")


def _jobs(pool: ProcessPoolExecutor, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of all jobs, each job's when it is done."""
    pretrained = (
        pool.submit(prepare, options.out / "language", options.pretraining_steps)
        if "language" in options.tasks
        else None
    )
    jobs: list[Future[list[dict[str, Any]]]] = []
    for task in options.tasks:
        if task == "language" and pretrained is not None:
            print(f"base model pretrained in {pretrained.result():.0f} s", flush=True)
        for seed in range(options.seeds):
            for source in SOURCES:
                how = options.sparsity, options.steps, options.tuning_steps
                jobs.append(pool.submit(compare, task, source, seed, options.out / task, *how))
    for job in as_completed(jobs):
        yield from job.result()


if __name__ == "__main__":
    main()
