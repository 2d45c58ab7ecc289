"""The next checkpoint: how small, how fast, side by side with other ways to send it.

`python -m benchmarks.lossless` trains all-MiniLM-L6-v2 for some steps of AdamW in float32, stored as bfloat16, at
learning rates of 1e-6 and 1e-5, and stores the last step in every way.  With `--model FOLDER --examples FILE` it trains
a language model on prompts and completions.  `--only independent` is for changes that are independent of everything, in
a layer of the shapes of Llama-2-7B with random weights, and `--only folders` for two folders of such layers: what
`convert --lossless` takes beside reading both.  All ways give the step back, bit for bit.  Times are the least of
`--repeats` runs, which take turns.  A peer that is not installed is named: `pip install openzl weightscope zipnn zstd
fireworks-delta-compression`.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.lossless import folders
from benchmarks.lossless.peers import fireworks, peers
from benchmarks.lossless.steps import DENSITIES, RATES, STEPS, State, floor, independent, language_steps, steps
from benchmarks.lossless.ways import ON_BASE, PLAIN, Way, compared, others, own, sections, whole, write_both
from benchmarks.table import commit, machine, print_table

#: Tensors above this many elements, of which the sections are compared with the entropy.
LARGE = 100_000
#: What is run: real steps, independent changes, or two folders.
PARTS = ("steps", "independent", "folders")
HEAD = ["", "bytes", "bits a change", "x floor", "encode, s", "its processor", "decode, s", "its processor"]
Row = dict[str, Any]


def ways(base: State, tuned: State, folder: Path, *, all_of_them: bool) -> Iterator[Way | str]:
    """Each way, or why a peer is not there; without all of them, those that are compared in time."""
    yield from own(base, folder)
    yield whole(tuned)
    if all_of_them:
        yield from others(base, tuned, folder)
    yield from (peers if all_of_them else fireworks)(base, tuned, folder)


def compare(case: str, base: State, tuned: State, repeats: int, *, all_of_them: bool) -> list[Row]:
    """A row for each way, and for what bars are about."""
    least, changed = floor(base, tuned)
    rows = [row(case, "floor of independent changes", least / 8, least, changed)]
    with tempfile.TemporaryDirectory(dir=".") as root:
        folder = Path(root)
        write_both(base, tuned, folder)
        found = list(ways(base, tuned, folder, all_of_them=all_of_them))
        there = [way for way in found if isinstance(way, Way)]
        for way, took in compared(there, tuned, repeats):
            rows.append(row(case, way, took.size, least, changed, took.encode, took.decode))
        rows += [{"case": case, "way": way} for way in found if isinstance(way, str)]
        of_large, of_those = floor(base, tuned, LARGE)
        for name in PLAIN, ON_BASE:
            size = sections(folder / f"{name}.shd", LARGE)
            rows.append(row(case, f"{name}: sections of tensors above {LARGE:,}", size, of_large, of_those))
    large = [{key: one for key, one in each.items() if one.numel() > LARGE} for each in (base, tuned)]
    with tempfile.TemporaryDirectory(dir=".") as root:
        folder = Path(root)
        write_both(large[0], large[1], folder)
        for form in own(large[0], folder):
            size = form.size(form.encode())
            rows.append(row(case, f"{form.name}: a whole file of those alone", size, of_large, of_those))
    share = changed / sum(tensor.numel() for tensor in base.values())
    print_table(f"{case}: {share:.2%} of {len(base)} tensors' elements changed", [HEAD, *map(shown, rows)])
    return rows


def row(case: str, way: str, size: float, over: float, changed: int, *clocks: tuple[float, float]) -> Row:
    """A row, with the seconds of encoding and decoding where those were measured."""
    found: Row = {"case": case, "way": way, "bytes": round(size), "bits": 8 * size / changed, "floor": 8 * size / over}
    for name, (wall, processor) in zip(("encode", "decode"), clocks, strict=False):
        found |= {name: wall, f"{name}_cpu": processor}
    return found


def shown(found: Row) -> list[str]:
    """A row as it is printed."""
    forms = {"bytes": ",", "bits": ".2f", "floor": ".3f"} | dict.fromkeys(
        ("encode", "encode_cpu", "decode", "decode_cpu"), ".2f"
    )
    return [found["way"], *(format(found[key], form) if key in found else "-" for key, form in forms.items())]


def beside_reading(layers: int, density: float, repeats: int) -> list[Row]:
    """What two folders take, and how much memory."""
    case = f"two folders of {layers} layers of Llama-2-7B's shapes, random weights, {density:.1%} of them change"
    rows = [
        {"case": case, "way": way, "encode": took.wall, "encode_cpu": took.processor}
        for way, took in folders.against_reading(density, layers, repeats)
    ]
    for name, peak in zip(("allocated", "allocated and mapped"), folders.peaks(density, layers), strict=True):
        rows.append({"case": case, "way": f"peak memory, {name}: {peak / folders.LARGEST:.2f} x the largest tensor"})
        rows[-1]["bytes"] = peak
    print_table(case, [HEAD, *map(shown, rows)])
    return rows


def write_csv(folder: Path, rows: Sequence[Row]) -> None:
    """`lossless.csv`, after the rows that it has."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "lossless.csv"
    about = {"machine": machine(), "date": date.today().isoformat(), "commit": commit()}
    fields = ["case", "way", "bytes", "bits", "floor", "encode", "encode_cpu", "decode", "decode_cpu", *about]
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fields)
        if is_new:
            writer.writeheader()
        for found in rows:
            rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in found.items()}
            writer.writerow({**rounded, **about})


def main() -> None:
    """Prints the tables, and writes them where `--out` says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=["steps"])
    parser.add_argument("--steps", type=int, default=STEPS, help="steps before the one that is stored")
    parser.add_argument("--model", type=Path, help="folder of a language model, instead of all-MiniLM-L6-v2")
    parser.add_argument("--examples", type=Path, help="its examples: JSON Lines with prompt and completion")
    parser.add_argument("--rate", type=float, nargs="*", default=RATES, help="learning rates")
    parser.add_argument("--layers", type=int, default=3, help="of the two folders")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder for lossless.csv")
    options = parser.parse_args()
    rows: list[Row] = []
    if "steps" in options.only:
        for rate in options.rate:
            every = language_steps(options.model, options.examples, rate) if options.model else steps(rate)
            base = [next(every) for _ in range(options.steps)][-1]
            name = options.model.name if options.model else "all-MiniLM-L6-v2"
            case = f"{name}, AdamW, learning rate {rate:g}, step {options.steps + 1}"
            rows += compare(case, base, next(every), options.repeats, all_of_them=True)
    if "independent" in options.only:
        for density in DENSITIES:
            case = f"a layer of Llama-2-7B's shapes, random weights, {density:.2%} change independently"
            rows += compare(case, *independent(density), options.repeats, all_of_them=False)
    if "folders" in options.only:
        rows += beside_reading(options.layers, DENSITIES[1], options.repeats)
    if options.out:
        write_csv(options.out, rows)


if __name__ == "__main__":
    main()
