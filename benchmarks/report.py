"""Comparing four adapters against fusing them; and how long a browser takes to open the report of 300 tensors."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

import shiradelta
from benchmarks.fuse import write_adapter
from benchmarks.table import print_table
from shiradelta.combine.interference import measure
from shiradelta.combine.report import report
from shiradelta.util import text


def compare(folder: Path, layers: int) -> None:
    """On the shapes of Llama-2-7B, 1 %."""
    files = [folder / f"{seed}.shd" for seed in range(4)]
    for seed, file in enumerate(files):
        write_adapter(file, layers, seed)
    start = time.perf_counter()
    shiradelta.fuse(dict.fromkeys(files, 1.0), folder / "fused.shd")
    fused = time.perf_counter() - start
    start = time.perf_counter()
    found = measure(dict.fromkeys(files, 1.0))
    compared = time.perf_counter() - start
    tensors = len(found.pairs[0, 1])
    rows = [["tensors", "pairs", "fuse", "compare", "x", "per tensor and pair"]]
    per = compared / tensors / len(found.pairs)
    rows.append([str(tensors), "6", f"{fused:.2f} s", f"{compared:.2f} s", f"{compared / fused:.1f}", f"{per:.3f} s"])
    print_table("comparing four adapters, 1 % of Llama-2-7B's layers, against fusing them", rows)


def opening(folder: Path, tensors: int = 300, repeats: int = 7) -> None:
    """A cold page, offline, on a screen of a phone and of a desk."""
    from playwright.sync_api import sync_playwright

    files = [folder / f"small{seed}.shd" for seed in range(4)]
    for seed, file in enumerate(files):
        generator = np.random.default_rng(seed)
        made = {}
        for number in range(tensors):
            positions = np.flatnonzero(generator.random(256 * 256) < 0.01)
            values = generator.standard_normal(positions.size)
            made[f"model.layers.{number // 7}.part{number % 7}.weight"] = shiradelta.TensorDelta(
                (256, 256), positions, values, "bfloat16"
            )
        shiradelta.save_delta(file, made)
    report(dict.fromkeys(files, 1.0), folder / "report.html")
    rows = [["screen", "page", "load event, median", "longest", "bar"]]
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright:
        for width in (390, 1280):
            times = []
            for _ in range(repeats):
                browser = playwright.chromium.launch(executable_path=program)
                page = browser.new_context(viewport={"width": width, "height": 844}, offline=True).new_page()
                page.goto((folder / "report.html").as_uri())
                times.append(page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd") / 1000)
                browser.close()
            size = text.size((folder / "report.html").stat().st_size)
            rows.append([f"{width} px", size, f"{statistics.median(times):.2f} s", f"{max(times):.2f} s", "1 s"])
    print_table(f"opening the report of {tensors} tensors, 4 adapters, in a fresh Chromium", rows)


def main() -> None:
    """Prints the tables."""
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), layers=1)
        opening(Path(folder))


if __name__ == "__main__":
    main()
