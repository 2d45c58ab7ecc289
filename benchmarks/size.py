"""Bits per nonzero against the entropy: independent positions, no zstd."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

import shiradelta
from benchmarks.table import print_table
from shiradelta.format.entropy import entropy

NUMEL = 1 << 26
#: Bits per nonzero that others store (their own layouts, 4-byte values).
PEERS = {"PEFT SHiRA": 96, "vLLM sparse patch": 48}


def main() -> None:
    """Prints the table."""
    generator = np.random.default_rng(0)
    rows = [["density", "nonzeros", "entropy", "index", "x entropy", "bar", "int4 file", "int8", "sign", "x PEFT"]]
    for density, bar in ((0.001, 1.02), (0.01, 1.02), (0.05, 1.03)):
        positions = np.flatnonzero(generator.random(NUMEL, dtype=np.float32) < density)
        values = generator.standard_normal(positions.size).astype(np.float32)
        tensor = shiradelta.TensorDelta((1 << 13, 1 << 13), positions, values, "bfloat16")
        sizes = {}
        with tempfile.TemporaryDirectory() as folder:
            for codec in ("int4", "int8", "sign"):
                path = Path(folder) / "delta.shd"
                shiradelta.save_delta(path, {"weight": tensor}, values=codec)
                with shiradelta.open_delta(path) as delta:
                    sizes[codec] = delta.sizes["file"] * 8 / positions.size
                    everything_else = (delta.sizes["file"] - delta.sizes["values"]) * 8 / positions.size
        least = entropy(positions.size, NUMEL)
        rows.append(
            [
                f"{density:.1%}",
                f"{positions.size:,}",
                f"{least:.3f}",
                f"{everything_else:.3f}",
                f"{everything_else / least:.4f}",
                f"{bar}",
                *(f"{sizes[codec]:.2f}" for codec in ("int4", "int8", "sign")),
                f"1/{PEERS['PEFT SHiRA'] / sizes['int4']:.1f}",
            ]
        )
    print_table("Size in bits per nonzero, 2^26 elements (index: everything in the file but the values)", rows)


if __name__ == "__main__":
    main()
