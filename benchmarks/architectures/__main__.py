"""Runs the matrix of architectures and prints it; exits with 1 on a wrong result or a traceback."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.architectures import workers
from benchmarks.architectures.cells import FORBIDDEN, Cell
from benchmarks.architectures.columns import COLUMNS
from benchmarks.architectures.rows import ROWS
from benchmarks.switch import versions
from benchmarks.table import machine, print_table
from shiradelta.util.text import brief


def main() -> int:
    """Runs what is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="NAME", help="rows; see --list")
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, metavar="NAME", help=", ".join(COLUMNS))
    parser.add_argument("--list", action="store_true", help="print the names of all rows")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all cells to this file")
    parser.add_argument("--jobs", type=int, default=1, help="how many architectures run at a time")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds that a cell may take")
    options = parser.parse_args()
    if options.list:
        print("\n".join(ROWS))
        return 0
    rows, columns = list(options.only or ROWS), list(options.columns or COLUMNS)
    found: list[Cell] = []
    for cell in workers.cells(rows, columns, options.jobs, options.limit):
        found.append(cell)
        progress = f"{len(found)}/{len(rows) * len(columns)}"
        text = f": {brief(cell.text, 160)}" if cell.text else ""
        print(f"{progress} {cell.row}, {cell.column} ({cell.seconds:.1f} s): {cell.label}{text}", file=sys.stderr)
    if options.json is not None:
        what = {"machine": machine(), "versions": versions(), "cells": [cell.as_dict() for cell in found]}
        options.json.write_text(json.dumps(what, indent=1), encoding="utf-8")
    report(found, rows, columns)
    return int(any(cell.outcome in FORBIDDEN for cell in found))


def report(found: Sequence[Cell], rows: Sequence[str], columns: Sequence[str]) -> None:
    """Prints the table, what its numbers mean, and a summary."""
    by_place = {(cell.row, cell.column): cell for cell in found}
    texts = {cell.text: cell for cell in found if cell.text}
    numbers = {text: number for number, text in enumerate(texts, 1)}
    table = [["architecture", "family", *columns]]
    for row in rows:
        cells = [by_place[row, column] for column in columns]
        labels = [f"{cell.label} {numbers.get(cell.text, '')}".strip() for cell in cells]
        table.append([row, ROWS[row].family, *labels])
    print_table("architectures of tiny random models", table)
    if texts:
        print()
    for text, number in numbers.items():
        reason = f"\n{'':6}lies in the architecture: {texts[text].reason}" if texts[text].reason else ""
        print(f"{number:4}  {texts[text].label}: {brief(text, 400)}{reason}")
    counts = Counter(cell.label for cell in found)
    print(
        f"\n{len(rows)} architectures, {len(found)} cells: {', '.join(f'{n} {label}' for label, n in counts.items())}"
    )
    print("refused*: for a reason that lies in the architecture")


if __name__ == "__main__":
    sys.exit(main())
