"""Bits per nonzero against the entropy: independent positions, uneven rows and columns, drawn positions; no zstd."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import shiradelta
from benchmarks.table import print_table
from shiradelta.format.arithmetic import Positions
from shiradelta.format.draw import Draw
from shiradelta.format.entropy import entropy

NUMEL = 1 << 26
SHAPE = 1 << 13, 1 << 13
#: Bits per nonzero that others store (their own layouts, 4-byte values).
PEERS = {"PEFT SHiRA": 96, "vLLM sparse patch": 48}
#: Loads of a file, of which the fastest counts.
LOADS = 15


def main() -> None:
    """Prints the table."""
    rows = [["positions", "nonzeros", "entropy", "index", "x entropy", "bar"]]
    rows[0] += ["int4 file", "int8", "sign", "x PEFT", "load, ns each"]
    for name, positions, least, bar, draw in kinds():
        values = np.random.default_rng(0).standard_normal(positions.size).astype(np.float32)
        tensor = shiradelta.TensorDelta(SHAPE, positions, values, "bfloat16", draw=draw)
        sizes = {}
        with tempfile.TemporaryDirectory() as folder:
            for codec in ("int8", "sign", "int4"):
                path = Path(folder) / "delta.shd"
                shiradelta.save_delta(path, {"weight": tensor}, values=codec)
                with shiradelta.open_delta(path) as delta:
                    sizes[codec] = delta.sizes["file"] * 8 / positions.size
                    everything_else = (delta.sizes["file"] - delta.sizes["values"]) * 8 / positions.size
            seconds = min(load(path) for _ in range(LOADS))
        rows.append(
            [
                name,
                f"{positions.size:,}",
                f"{least:.3f}",
                f"{everything_else:.3f}",
                f"{everything_else / least:.4f}" if least else "-",
                bar,
                *(f"{sizes[codec]:.2f}" for codec in ("int4", "int8", "sign")),
                f"1/{PEERS['PEFT SHiRA'] / sizes['int4']:.1f}",
                f"{seconds * 1e9 / positions.size:.1f}",
            ]
        )
    print_table("Size in bits per nonzero, 2^26 elements (index: everything in the file but the values)", rows)


def kinds() -> Iterator[tuple[str, Positions, float, str, Draw | None]]:
    """(name, positions, their entropy, the bar, the draw that they are of) of what is measured."""
    generator = np.random.default_rng(0)
    for density, bar in ((0.001, "1.02"), (0.01, "1.02"), (0.05, "1.03")):
        positions = np.flatnonzero(generator.random(NUMEL, dtype=np.float32) < density)
        yield f"independent, {density:.1%}", positions, entropy(positions.size, NUMEL), bar, None
    uneven = np.outer(*(np.exp(0.7 * generator.standard_normal(size, np.float32)) for size in SHAPE))
    uneven *= 0.01 / uneven.mean()
    positions = np.flatnonzero(generator.random(SHAPE, dtype=np.float32) < uneven)
    share = np.clip(uneven, 1e-9, 1 - 1e-6)
    bits = -(share * np.log2(share) + (1 - share) * np.log2(1 - share)).sum(dtype=np.float64) / positions.size
    yield "uneven rows and columns, 1.0%", positions, float(bits), "-", None
    draw = Draw(0, NUMEL // 100)
    yield "drawn, 1.0%", draw.positions(NUMEL), 0.0, "-", draw
    draw = Draw(0, NUMEL // 20)
    left = draw.positions(NUMEL)[generator.random(draw.cells) < 0.2]
    yield "a fifth of 5.0% drawn", left, entropy(left.size, draw.cells), "-", draw


def load(path: Path) -> float:
    """Processor seconds for opening and checking a file as it is loaded, all in the page cache."""
    start = time.process_time()
    with shiradelta.open_delta(path) as delta:
        delta["weight"].check()
    return time.process_time() - start


if __name__ == "__main__":
    main()
