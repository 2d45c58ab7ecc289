"""Fusing four adapters against decoding and encoding them once."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np

import shiradelta
from benchmarks.models import names
from benchmarks.table import print_table


def write_adapter(path: Path, layers: int, seed: int) -> None:
    """Independent positions at 1 %, random values."""
    generator = np.random.default_rng(seed)
    tensors = {}
    for module, shape in names(layers).items():
        positions = np.flatnonzero(generator.random(shape[0] * shape[1], dtype=np.float32) < 0.01)
        values = generator.standard_normal(positions.size).astype(np.float32)
        tensors[f"{module}.weight"] = shiradelta.TensorDelta(shape, positions, values, "bfloat16")
    shiradelta.save_delta(path, tensors, values="int8")


def main(layers: int = 2, inputs: int = 4) -> None:
    """Prints the table."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{seed}.shd" for seed in range(inputs)]
        for seed, file in enumerate(files):
            write_adapter(file, layers, seed)
        rows = [["values", "decode and encode each", "fuse", "x", "bar"]]
        for values in ("f32", "int8"):
            start = time.perf_counter()
            for file in files:
                with shiradelta.open_delta(file) as delta:
                    shiradelta.save_delta(Path(folder) / "again.shd", delta, values=values)
            once = time.perf_counter() - start
            start = time.perf_counter()
            report = shiradelta.fuse(dict.fromkeys(files, 0.5), Path(folder) / "fused.shd", values=values)
            fused = time.perf_counter() - start
            rows.append([values, f"{once:.2f} s", f"{fused:.2f} s", f"{fused / once:.2f}", "2"])
    print_table(f"{inputs} adapters of {report.input_nnz // inputs / 1e6:.1f} M nonzeros each, 1 %, int8", rows)


if __name__ == "__main__":
    main()
