"""Prints a row a producer and kind; with words, only the rows of producers or kinds that have one of them.

`--csv FILE` writes them, too.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import transformers

from shiradelta.util.text import table

from . import diffusion, flux, language, lycoris, mlx, peft_types, sparse, unets
from .case import outcome

#: The producers, one file each: its `cases()` are the rows.
PRODUCERS = (peft_types, unets, diffusion, flux, lycoris, mlx, language, sparse)


def main(words: Sequence[str], file: Path | None) -> None:
    """Converts every source and compares it with what its producer makes of it."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    rows = []
    for module in PRODUCERS:
        for case in module.cases():
            if words and not any(word.lower() in f"{case.producer} {case.kind}".lower() for word in words):
                continue
            with tempfile.TemporaryDirectory() as folder:
                rows.append([case.producer, case.kind, case.by, outcome(case, Path(folder))])
    if file is not None:
        with open(file, "w", encoding="utf-8", newline="") as stream:
            csv.writer(stream, lineterminator="\n").writerows([["producer", "kind", "made by", "outcome"], *rows])
    print(table([["producer", "kind", "made by", "outcome"], *rows], left=4))
    print(", ".join(f"{count} {what}" for what, count in Counter(row[3].partition(":")[0] for row in rows).items()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--csv", type=Path)
    given = parser.parse_args()
    main(given.words, given.csv)
