"""Chains: publishing many tiny steps, folds against decoding and encoding, from publishing to applied, and the wires.

Processor time, since the clock of a shared machine is noisy.  Steps set random elements of a matrix; each changes the
same share, as the steps of a training run do.  The tables of wires are those of `benchmarks.wires`, on real steps.
"""

from __future__ import annotations

import argparse
import json
import resource
import struct
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

import shiradelta as sd
from benchmarks import wires
from benchmarks.lossless.steps import STEPS
from benchmarks.table import print_table
from shiradelta.chain import Chain, FolderFollower, LiveFollower
from shiradelta.chain.difference import shifted
from shiradelta.chain.fold import fold
from shiradelta.io.reader import Delta
from shiradelta.io.writer import writing


def processor_time(work: Callable[[], object]) -> float:
    """Seconds of all threads."""
    start = time.process_time()
    work()
    return time.process_time() - start


def write_steps(root: Path, shape: tuple[int, int], steps: int, density: float) -> list[Path]:
    """Consecutive steps of one bf16 matrix."""
    rng = np.random.default_rng(0)
    now = rng.integers(0, 1 << 16, shape[0] * shape[1]).astype("<u2")
    files = []
    for number in range(steps):
        at = np.flatnonzero(rng.random(now.size) < density)
        bits = (now[at] + 1).astype("<u2")
        files.append(root / f"{number}.shd")
        delta = sd.TensorDelta.trusted(shape, at, bits, "bfloat16", "set", now[at])
        sd.save_delta(files[-1], {"w": delta})
        now[at] = bits
    return files


def folding(root: Path, shape: tuple[int, int], counts: list[int], density: float) -> list[list[str]]:
    """Rows of the table of folds."""
    files = write_steps(root, shape, max(counts), density)
    rows = [["steps", "nonzeros", "in the fold", "decode", "encode", "fold", "x both", "memory"]]
    for count in counts:
        with ExitStack() as stack:
            opened = [stack.enter_context(sd.open_delta(file)) for file in files[:count]]

            def decode(opened: list[Delta] = opened) -> None:
                for delta in opened:
                    delta["w"].positions(), delta["w"].bits()

            def run(opened: list[Delta] = opened) -> None:
                with writing(root / "fold.shd", "f32") as writer:
                    fold(opened, writer, None)

            folds, decodes, encodes = [], [], []
            for _ in range(3):
                folds.append(processor_time(run))
                decodes.append(processor_time(decode))
                with sd.open_delta(root / "fold.shd") as folded:
                    known = folded["w"].base_fingerprint
                    result = sd.TensorDelta.trusted(
                        shape, folded["w"].positions(), folded["w"].bits(), "bfloat16", "set", None, known
                    )
                encodes.append(processor_time(lambda r=result: sd.save_delta(root / "again.shd", {"w": r})))  # type: ignore[misc]
            both = min(decodes) + min(encodes)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            rows.append(
                [
                    f"{count:,}",
                    f"{sum(delta.nnz for delta in opened):,}",
                    f"{result.nnz:,}",
                    f"{min(decodes) * 1e3:.0f} ms",
                    f"{min(encodes) * 1e3:.0f} ms",
                    f"{min(folds) * 1e3:.0f} ms",
                    f"{min(folds) / both:.2f}",
                    f"{peak:.0f} MB",
                ]
            )
    return rows


def publishing(root: Path, counts: list[int]) -> list[list[str]]:
    """Rows of the table of many tiny steps, one after the other."""
    bits = np.arange(1 << 12, dtype="<u2")
    write_model(root / "model", {"w": bits}, (64, 64))
    chain, path = Chain.create(root / "chain", root / "model"), root / "step.shd"
    rows, wall, processor = [["steps", "publish", "a step", "processor, a step", "chain.json"]], 0.0, 0.0
    for number in range(max(counts)):
        at = np.array([number % bits.size])
        delta = sd.TensorDelta.trusted((64, 64), at, bits[at] + 1, "bfloat16", "set", bits[at])
        sd.save_delta(path, {"w": delta})
        bits[at] += 1
        start = time.perf_counter()
        processor += processor_time(lambda: chain.publish(path))
        wall += time.perf_counter() - start
        done = number + 1
        if done in counts:
            size = (root / "chain" / "chain.json").stat().st_size
            times = [f"{wall:.1f} s", f"{wall / done * 1e3:.1f} ms", f"{processor / done * 1e3:.1f} ms"]
            rows.append([f"{done:,}", *times, f"{size:,}"])
    return rows


def latency(root: Path, layers: int, rows: int, columns: int, density: float) -> list[list[str]]:
    """Rows of the table from publishing to applied: wall clock, every part durable."""
    rng = np.random.default_rng(0)
    bits = {f"layers.{i}.weight": rng.integers(0, 1 << 14, rows * columns).astype("<u2") for i in range(layers)}
    write_model(root / "model", bits, (rows, columns))
    chain = Chain.create(root / "chain", root / "model")
    follower = FolderFollower(chain, root / "copy")
    follower.follow()
    live = {name: each.reshape(rows, columns).copy() for name, each in bits.items()}
    live_follower = LiveFollower(chain, sd.HotSwap(live), 0)
    found: dict[str, list[float]] = {}

    def timed(what: str, work: Callable[[], object]) -> None:
        start = time.perf_counter()
        work()
        found.setdefault(what, []).append(time.perf_counter() - start)

    nonzeros = 0
    for _ in range(3):
        step = {}
        for name, old in bits.items():
            at = np.flatnonzero(rng.random(old.size) < density)
            bits[name] = old.copy()
            bits[name][at] += 1
            step[name] = shifted(
                sd.TensorDelta.trusted((rows, columns), at, bits[name][at], "bfloat16", "set", old[at])
            )
        nonzeros = sum(delta.nnz for delta in step.values())
        timed("encode the step", lambda step=step: sd.save_delta(root / "step.shd", step))  # type: ignore[misc]
        timed("publish", lambda: chain.publish(root / "step.shd"))
        timed("follow with a folder", follower.follow)
        timed("follow with a live model", live_follower.follow)
    model = sum(each.nbytes for each in bits.values())
    size = (root / "step.shd").stat().st_size
    table = [["part", "median", "nonzeros", "bits each", "model"]]
    for what, times in found.items():
        median = sorted(times)[len(times) // 2]
        table.append(
            [what, f"{median * 1e3:.0f} ms", f"{nonzeros:,}", f"{8 * size / nonzeros:.1f}", f"{model >> 20} MiB"]
        )
    assert all(np.array_equal(live[name].reshape(-1), each) for name, each in bits.items())
    return table


def write_model(folder: Path, bits: dict[str, np.ndarray[Any, Any]], shape: tuple[int, int]) -> None:
    """A folder with bf16 weights."""
    header: dict[str, object] = {}
    at = 0
    for name, each in bits.items():
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + each.nbytes]}
        at += each.nbytes
    text = json.dumps(header).encode()
    folder.mkdir()
    with open(folder / "model.safetensors", "wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for each in bits.values():
            stream.write(each.tobytes())


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--steps", type=int, nargs="+", default=[2, 10, 100, 1000])
    parser.add_argument(
        "--publish", type=int, nargs="+", default=[100, 1000, 5000], help="tiny steps that are published"
    )
    parser.add_argument("--layers", type=int, default=16, help="matrices of the model that is followed")
    parser.add_argument("--before", type=int, default=STEPS, help="training steps before the one on every wire")
    options = parser.parse_args()
    shape = options.rows, options.columns
    with tempfile.TemporaryDirectory(dir=".") as folder:
        print_table("tiny steps, published one after the other", publishing(Path(folder), options.publish))
    with tempfile.TemporaryDirectory(dir=".") as folder:
        rows = folding(Path(folder), shape, options.steps, options.density)
    print_table(f"folds of steps that set {options.density:.2%} of {shape[0]} x {shape[1]} bf16 weights", rows)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        rows = latency(Path(folder), options.layers, *shape, options.density)
    print_table(f"a step from the trainer to the weights, {options.layers} such matrices, one machine", rows)
    wires.tables(options.before)


if __name__ == "__main__":
    main()
