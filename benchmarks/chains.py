"""Chains: folding many steps against decoding them and encoding the result, and from publishing to applied.

Processor time, since the clock of a shared machine is noisy.  Steps set random elements of a matrix; each changes the
same share, as the steps of a training run do.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np

import shiradelta as sd
from benchmarks.table import print_table
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


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--steps", type=int, nargs="+", default=[2, 10, 100, 1000])
    options = parser.parse_args()
    shape = options.rows, options.columns
    with tempfile.TemporaryDirectory(dir=".") as folder:
        rows = folding(Path(folder), shape, options.steps, options.density)
    print_table(f"folds of steps that set {options.density:.2%} of {shape[0]} x {shape[1]} bf16 weights", rows)


if __name__ == "__main__":
    main()
