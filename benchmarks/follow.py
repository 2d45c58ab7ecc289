"""From a trainer's step to the weights of a live model, by part: a folder and a stand-in of S3, on one machine.

    python -m benchmarks.follow --weights 10_000_000 100_000_000 --out benchmarks/results

A model of bf16 matrices changes by a share of its weights, each by one unit in the last place.  Parts, in order:

- difference: two models on disk, and the elements of which the bits differ
- encode: these as a `.shd` file
- write: the file is checked, copied to the store, and named by the manifest
- notice: one look of a follower that finds the step; where nothing is new it waits `every` seconds between looks
- read: the file, compared with its SHA-256; the store's cache is empty
- load: decoding, and the form in which the step is applied
- check: the fingerprints of the elements that are to change against the model's
- apply: the live weights

Wall clock and processor seconds of all threads, medians of `--steps` steps after one that does not count.  Data of the
stand-ins of S3 (`S3` the tests' own, `moto` the server of moto) go through HTTP on the loopback device, and their work
counts as the process's.  All files are in the page cache.  What is durable on a folder is so here.  With
`--weights 400_000_000 --density 0.25 --steps 2`, 100 million weights change; that takes 5.2 GB of memory and as much of
the disk.  Writes `follow.csv`, after the rows that it has.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

import shiradelta as sd
from benchmarks.chains import write_model
from benchmarks.table import commit, machine, print_table
from shiradelta.chain import Chain
from shiradelta.chain.difference import changed, shifted
from shiradelta.chain.remote import RemoteStore
from shiradelta.chain.stores import FolderStore, Store
from shiradelta.io.writer import writing
from shiradelta.models.checkpoint import open_checkpoint
from tests.chain.servers import moto_server, serving

PARTS = ("difference", "encode", "write", "notice", "read", "load", "check", "apply")
COLUMNS = 2048
SEED = 0
KEYS = {
    "AWS_ACCESS_KEY_ID": "x",
    "AWS_SECRET_ACCESS_KEY": "x",
    "AWS_REGION": "us-east-1",
    "AWS_ALLOW_HTTP": "true",
}


@contextmanager
def bucket() -> Iterator[None]:
    """A stand-in of S3, where the environment says that S3 is."""
    with serving() as server:
        os.environ |= {**KEYS, "AWS_ENDPOINT_URL": server.url}
        yield


@contextmanager
def bucket_of_moto() -> Iterator[None]:
    """The same with the server of moto."""
    with moto_server() as url:
        os.environ |= {**KEYS, "AWS_ENDPOINT_URL": url}
        yield


#: What a user calls a place -> what has to run for it.
STORES: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "folder": nullcontext,
    "S3": bucket,
    "moto": bucket_of_moto,
}


def place(name: str, root: Path) -> Store:
    """A store that is empty, of which nothing is in a cache."""
    if name == "folder":
        return FolderStore(root / "chain")
    return RemoteStore(f"s3://bucket/{root.name}", cache=root / "cache")


class Clock:
    """Seconds of the parts: of the clock on the wall, and of the processor; a row of each for every step."""

    def __init__(self) -> None:
        self.wall: list[dict[str, float]] = []
        self.cpu: list[dict[str, float]] = []

    def begin(self) -> None:
        """The next step."""
        self.wall.append(dict.fromkeys(PARTS, 0.0))
        self.cpu.append(dict.fromkeys(PARTS, 0.0))

    @contextmanager
    def part(self, name: str, sign: int = 1) -> Iterator[None]:
        """Adds what the block takes to a part of this step, or with -1 takes it off."""
        start, of_cpu = time.perf_counter(), time.process_time()
        yield
        self.wall[-1][name] += sign * (time.perf_counter() - start)
        self.cpu[-1][name] += sign * (time.process_time() - of_cpu)


def measured(root: Path, store: Store, weights: int, density: float, steps: int) -> tuple[Clock, int, int]:
    """(times, nonzeros of the last step, bytes of its file)."""
    rng, shape = np.random.default_rng(SEED), (1024, COLUMNS)
    count = max(1, round(weights / (shape[0] * shape[1])))
    live = {f"layers.{i}.weight": rng.integers(0, 1 << 14, shape, "<u2") for i in range(count)}
    write_model(root / "0", {name: each.reshape(-1) for name, each in live.items()}, shape)
    swap = sd.HotSwap(live)
    chain = Chain.create(store, root / "0")
    follower, path, clock = Chain.open(store), root / "step.shd", Clock()
    nonzeros = 0
    for number in range(steps + 1):
        new = {name: (each + (rng.random(shape, np.float32) < density)).astype("<u2") for name, each in live.items()}
        nonzeros = sum(int(np.count_nonzero(new[name] != each)) for name, each in live.items())
        write_model(root / str(number + 1), {name: each.reshape(-1) for name, each in new.items()}, shape)
        del new
        clock.begin()
        before, after = open_checkpoint(root / str(number)), open_checkpoint(root / str(number + 1))
        with clock.part("encode"), writing(path) as writer:
            for name in before:
                with clock.part("encode", -1), clock.part("difference"):
                    step = changed(name, before, after)
                if step is not None:
                    writer.add(name, shifted(step))
        with clock.part("write"):
            chain.publish(path)
        with clock.part("notice"):
            follower.refresh()
            (leg,) = follower.way(number, number + 1).steps
        with clock.part("read"):
            delta = follower.open_step(leg)
        with delta:
            with clock.part("load"), clock.part("check", -1):
                swap.load("unchecked", str(delta.file), check=False)
            swap.unload("unchecked")
            with clock.part("check"):
                swap.load("step", str(delta.file))
            with clock.part("apply"):
                swap.switch("step")
        swap.rebase(check=False)
        swap.unload("step")
        shutil.rmtree(root / str(number))
    wrong = sum(int(np.count_nonzero(each.reshape(-1) != after.bits(name))) for name, each in live.items())
    if wrong:
        raise AssertionError(f"{wrong} weights differ")
    return clock, nonzeros, path.stat().st_size


def main() -> None:
    """Prints the table, and writes it where `--out` says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", type=int, nargs="+", default=[10_000_000])
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--stores", nargs="+", choices=STORES, default=["folder", "S3"])
    parser.add_argument("--out", type=Path, help="folder for follow.csv")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for weights in options.weights:
        for name in options.stores:
            with tempfile.TemporaryDirectory(dir=".") as work, STORES[name]():
                root = Path(work)
                clock, nonzeros, size = measured(root, place(name, root), weights, options.density, options.steps)
            row: dict[str, Any] = {"store": name, "weights": weights, "nonzeros": nonzeros, "bytes": size}
            for kind, found in (("", clock.wall), ("_cpu", clock.cpu)):
                times = {part: statistics.median(step[part] for step in found[1:]) * 1e3 for part in PARTS}
                row |= {f"{part}{kind}": f"{each:.2f}" for part, each in (times | {"all": sum(times.values())}).items()}
            rows.append(row)
            print_table(f"a step of {options.density:.1%} of {weights:,} weights to live weights, {name}", lines(row))
    if options.out:
        about = {"density": options.density, "steps": options.steps, "seed": SEED}
        about |= {"load_average": f"{os.getloadavg()[1]:.1f}", "machine": machine()}
        about |= {"date": date.today().isoformat(), "commit": commit()}
        path = options.out / "follow.csv"
        is_new = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, [*rows[0], *about])
            if is_new:
                writer.writeheader()
            writer.writerows({**row, **about} for row in rows)


def lines(row: dict[str, Any]) -> list[list[str]]:
    """The parts of a row, a line each."""
    head = [f"{row['nonzeros']:,} nonzeros, {row['bytes']:,} bytes", "ms", "CPU ms"]
    return [head, *([part, row[part], row[f"{part}_cpu"]] for part in (*PARTS, "all"))]


if __name__ == "__main__":
    main()
