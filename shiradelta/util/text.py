"""Text for people: escaped names, tables, sizes, shapes, percentages."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence

from shiradelta.errors import ArgumentError, printable

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def brief(text: str, width: int = 300) -> str:
    """As `printable`, cut to the beginning if the text is long."""
    if len(text) <= width:
        return printable(text)
    return f"{printable(text[:width])}... ({len(text):,} characters)"


def table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Formats rows as aligned, escaped columns, the first `left` columns to the left; the first row is the head."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for number, row in enumerate(rows):
        cells = [
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
        if number == 0:
            lines.append("  ".join("-" * w for w in widths))
    return "\n".join(lines)


def size(count: float) -> str:
    """Formats a number of bytes for people."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError


def parse_size(text: str | int) -> int:
    """Bytes of "2MB" (10^6), "2MiB" (2^20), "900k" or a plain number.

    Raises:
        ArgumentError: it is not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)\s*", str(text), re.IGNORECASE)
    unit = match and (match[2].upper() if match[2].upper() in _UNITS else match[2].upper() + "B")
    size = math.inf if match is None or unit not in _UNITS else float(match[1]) * _UNITS[unit]
    if size == math.inf:
        raise ArgumentError(f"size {text!r} is unknown; give a number of bytes, or such as 900KB, 2MB or 1.5GiB")
    return int(size)


def parse_share(text: str) -> float:
    """The share that "1%" or "0.01" names, the inverse of `percent`.

    Raises:
        ArgumentError: it is neither a number nor a percentage.
    """
    number = text.strip().removesuffix("%")
    try:
        share = float(number)
    except ValueError:
        raise ArgumentError(f"{text!r} is not a share; give a number such as 0.01 or a percentage such as 1%") from None
    return share / 100 if number != text.strip() else share


def shape(dimensions: Sequence[int]) -> str:
    """Formats a shape: 4096x11008."""
    return "x".join(map(str, dimensions)) or "scalar"


def count(number: int | Collection[object], what: str, plural: str = "") -> str:
    """Formats a number of things, or how many things there are: 1 tensor, 2,000 tensors.

    Args:
        number: the number, or a collection of the things.
        what: one thing.
        plural: several of them, where that is not `what` with an s.
    """
    number = number if isinstance(number, int) else len(number)
    return f"{number:,} {what if number == 1 else plural or f'{what}s'}"


def percent(share: float) -> str:
    """Formats a share with three significant digits: 1.00%, 0.0125%."""
    return f"{share * 100:.3g}%"
