"""How much of a fine-tune a file keeps: several tasks, a LoRA and a full fine-tune of each, and what else there is.

`python -m benchmarks.quality OUT` writes quality.csv and quality.png to a folder; one GPU takes some minutes.  What an
earlier run left there is taken up.  The tasks of a real language model need `OUT/real`, which
`python -m benchmarks.quality.gemma OUT` makes: `--tasks define code explain`, and `word`, which is kept aside.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from itertools import product
from pathlib import Path

from .compare import compare, read
from .language import PRETRAINING_STEPS
from .methods import METHODS, TASKS, prepare
from .summary import FIELDS, draw, summarise


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=["dictionary", "language"])
    parser.add_argument("--seeds", type=int, default=3, help="fine-tunes of each kind, each fitted with its own seed")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.005, 0.01, 0.02, 0.05])
    parser.add_argument("--steps", type=int, help="as --fit-steps of shiradelta")
    parser.add_argument("--tuning-steps", type=int, default=400)
    parser.add_argument("--pretraining-steps", type=int, default=PRETRAINING_STEPS)
    parser.add_argument("--jobs", type=int, default=4, help="processes that share the device")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS["full"]), default=list(METHODS["full"]))
    options = parser.parse_args()
    out: Path = options.out
    for task in options.tasks:
        (out / task).mkdir(parents=True, exist_ok=True)
    try:
        with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
            _run(pool, options)
    finally:
        rows = [row for table in sorted(out.glob("*/*.csv")) for row in read(table)]
        if rows:
            with open(out / "quality.csv", "w", newline="") as stream:
                writer = csv.DictWriter(stream, FIELDS)
                writer.writeheader()
                writer.writerows(rows)
            print(summarise(rows))
            draw(rows, out / "quality.png")


def _run(pool: ProcessPoolExecutor, options: argparse.Namespace) -> None:
    out: Path = options.out
    pretraining = "language" in options.tasks and pool.submit(prepare, out / "language", options.pretraining_steps)
    jobs: list[Future[str]] = []
    for task in options.tasks:
        if task == "language" and pretraining:
            print(f"base model pretrained in {pretraining.result():.0f} s", flush=True)
        for seed, source in product(range(options.seeds), METHODS):
            how = options.sparsity, options.methods, options.steps, options.tuning_steps
            jobs.append(pool.submit(compare, task, source, seed, out / task, *how))
    for job in as_completed(jobs):
        print(job.result(), flush=True)


if __name__ == "__main__":
    main()
