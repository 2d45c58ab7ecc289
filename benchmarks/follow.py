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

Wall clock, medians of `--steps` steps after one that does not count.  Data of the stand-in go through HTTP on the
loopback device.  All files are in the page cache.  What is durable on a folder is so here.  Writes `follow.csv`.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
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
from shiradelta.models.checkpoint import open_checkpoint
from tests.chain.servers import serving

PARTS = ("difference", "encode", "write", "notice", "read", "load", "check", "apply")
COLUMNS = 2048
SEED = 0


@contextmanager
def bucket() -> Iterator[None]:
    """A stand-in of S3, where the environment says that S3 is."""
    with serving() as server:
        keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_REGION": "us-east-1"}
        os.environ |= {**keys, "AWS_ENDPOINT_URL": server.url, "AWS_ALLOW_HTTP": "true"}
        yield


def place(name: str, root: Path) -> Store:
    """A store that is empty, of which nothing is in a cache."""
    if name == "folder":
        return FolderStore(root / "chain")
    return RemoteStore(f"s3://bucket/{root.name}", cache=root / "cache")


class Clock:
    """Seconds of the parts."""

    def __init__(self) -> None:
        self.found: dict[str, list[float]] = {part: [] for part in PARTS}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Times what is in the block."""
        start = time.perf_counter()
        yield
        self.found[name].append(time.perf_counter() - start)


def measured(root: Path, store: Store, weights: int, density: float, steps: int) -> tuple[Clock, int, int]:
    """(times, nonzeros of the last step, bytes of its file)."""
    rng, shape = np.random.default_rng(SEED), (1024, COLUMNS)
    count = max(1, round(weights / (shape[0] * shape[1])))
    bits = {f"layers.{i}.weight": rng.integers(0, 1 << 14, shape[0] * shape[1]).astype("<u2") for i in range(count)}
    write_model(root / "0", bits, shape)
    live = {name: each.reshape(shape).copy() for name, each in bits.items()}
    swap = sd.HotSwap(live)
    chain = Chain.create(store, root / "0")
    follower, path, clock = Chain.open(store), root / "step.shd", Clock()
    nonzeros = size = 0
    for number in range(steps + 1):
        for name in bits:
            bits[name] = bits[name] + (rng.random(shape[0] * shape[1]) < density).astype("<u2")
        write_model(root / str(number + 1), bits, shape)
        with clock.part("difference"):
            before, after = open_checkpoint(root / str(number)), open_checkpoint(root / str(number + 1))
            found = {name: step for name in before if (step := changed(name, before, after)) is not None}
        with clock.part("encode"):
            sd.save_delta(path, {name: shifted(step) for name, step in found.items()})
        with clock.part("write"):
            chain.publish(path)
        with clock.part("notice"):
            follower.refresh()
            (leg,) = follower.way(number, number + 1).steps
        with clock.part("read"):
            delta = follower.open_step(leg)
        with delta:
            start = time.perf_counter()
            swap.load("unchecked", str(delta.file), check=False)
            loading = time.perf_counter() - start
            swap.unload("unchecked")
            start = time.perf_counter()
            swap.load("step", str(delta.file))
            clock.found["load"].append(loading)
            clock.found["check"].append(max(0.0, time.perf_counter() - start - loading))
            with clock.part("apply"):
                swap.switch("step")
        swap.rebase(check=False)
        swap.unload("step")
        shutil.rmtree(root / str(number))
        nonzeros, size = sum(each.nnz for each in found.values()), path.stat().st_size
    wrong = sum(int(np.count_nonzero(live[name].reshape(-1) != each)) for name, each in bits.items())
    if wrong:
        raise AssertionError(f"{wrong} weights differ")
    return clock, nonzeros, size


def main() -> None:
    """Prints the table, and writes it where `--out` says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", type=int, nargs="+", default=[10_000_000])
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path, help="folder for follow.csv")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for weights in options.weights:
        for name in ("folder", "S3 stand-in"):
            with tempfile.TemporaryDirectory(dir=".") as work, bucket() if name != "folder" else nullcontext():
                root = Path(work)
                clock, nonzeros, size = measured(root, place(name, root), weights, options.density, options.steps)
            times = {part: statistics.median(clock.found[part][1:]) * 1e3 for part in PARTS}
            about = {"store": name, "weights": weights, "nonzeros": nonzeros, "bytes": size}
            rows.append({**about, **times, "all": sum(times.values())})
    table = [["store", "weights", "nonzeros", "bytes", *(f"{part}, ms" for part in (*PARTS, "all"))]]
    for row in rows:
        known = [row["store"], *(f"{row[key]:,}" for key in ("weights", "nonzeros", "bytes"))]
        table.append([*known, *(f"{row[part]:.1f}" for part in (*PARTS, "all"))])
    print_table(f"a step of {options.density:.1%} from a trainer to live weights, by part", table)
    if options.out:
        noted = {"density": options.density, "steps": options.steps, "seed": SEED}
        about = {"machine": machine(), "date": date.today().isoformat(), "commit": commit()}
        with open(options.out / "follow.csv", "w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, [*rows[0], *noted, *about])
            writer.writeheader()
            writer.writerows(
                {**row, **{part: f"{row[part]:.2f}" for part in (*PARTS, "all")}, **noted, **about} for row in rows
            )


if __name__ == "__main__":
    main()
