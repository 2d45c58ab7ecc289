"""Patching a model's folder in place against copying the same files, both made durable."""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from functools import partial
from pathlib import Path

import shiradelta
from benchmarks import models
from benchmarks.table import print_table, seconds


def copy_and_sync(source: Path, target: Path) -> None:
    """`cp` plus sync."""
    shutil.copytree(source, target)
    for file in target.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--values", default="int8")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        root = Path(folder)
        base, lora, delta, copy = root / "base", root / "lora", root / "delta.shd", root / "copy"
        models.write_base(base, options.layers)
        models.write_lora(lora, options.layers)
        shiradelta.convert(lora, delta, base=base, values=options.values)
        os.sync()
        clear = partial(shutil.rmtree, copy, ignore_errors=True)
        copied = seconds(lambda: copy_and_sync(base, copy), options.repeats, clear)
        clear()
        applied, reverted = [], []
        for _ in range(options.repeats):
            applied.append(seconds(lambda: shiradelta.apply(base, delta), 1))
            reverted.append(seconds(lambda: shiradelta.revert(base), 1))
        apply, revert = sorted(applied)[len(applied) // 2], sorted(reverted)[len(reverted) // 2]
    rows = [
        ["what", "time", "x copy", "bar"],
        ["cp + sync", f"{copied:.2f} s", "1.00", ""],
        ["apply, in place", f"{apply:.2f} s", f"{apply / copied:.2f}", "1.5"],
        ["revert", f"{revert:.2f} s", f"{revert / copied:.2f}", ""],
    ]
    print_table(f"{options.layers} layers of Llama-2-7B shapes, random bf16 weights, 1 %, {options.values}", rows)


if __name__ == "__main__":
    main()
