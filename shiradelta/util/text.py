"""Text for people: escaped names, tables, sizes, shapes, percentages.

Tables are not drawn by rich: to import it and draw one takes 0.42 of the time of importing numpy and click, and `info`,
which has 1.5 of it, takes 1.4 already.  Progress bars, which only long work shows, are rich's.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Collection, Sequence

from shiradelta.errors import ArgumentError, printable

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
#: Blanks between two columns of a table.
_GAP = 2
#: The narrowest that a column is cut to.
_LEAST = 16


def brief(text: str, width: int = 300) -> str:
    """As `printable`, cut to the beginning if the text is long."""
    if len(text) <= width:
        return printable(text)
    return f"{printable(text[:width])}... ({len(text):,} characters)"


def table(rows: Sequence[Sequence[str]], left: int = 1, width: int | None = None) -> str:
    """Formats rows as aligned, escaped columns.

    Args:
        rows: the cells; the first row is the head.
        left: how many columns, the first ones, are aligned to the left; the others to the right.
        width: the most columns of a terminal to take.  In a table that is wider the first column is cut to its end, or
            the last one is wrapped if it is aligned to the left.  If that is not enough, each row becomes some lines.
    """
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    most = sum(widths) + _GAP * (len(widths) - 1)
    if width is not None and most > width:
        cut = len(widths) - 1 if left == len(widths) else 0
        room = widths[cut] - (most - width)
        if room < _LEAST:
            return _as_lines(rows, width)
        widths[cut] = room
    else:
        cut, room = 0, most
    lines = []
    for number, row in enumerate(rows):
        pieces = [[cell] for cell in row]
        pieces[cut] = [_end(row[cut], room)] if cut == 0 else textwrap.wrap(row[cut], room) or [""]
        for again in range(len(pieces[cut])):
            cells = [piece[again] if again < len(piece) else "" for piece in pieces]
            padded = [
                cell.ljust(w) if i < left else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
            ]
            lines.append((" " * _GAP).join(padded).rstrip())
        if number == 0:
            lines.append((" " * _GAP).join("-" * w for w in widths))
    return "\n".join(lines)


def _end(cell: str, room: int) -> str:
    return cell if len(cell) <= room else "..." + cell[3 - room :]


def _as_lines(rows: Sequence[Sequence[str]], width: int) -> str:
    """A table too wide for a terminal: the first cell of each row, and below it the others with their heads."""
    head, *others = rows
    lines = []
    for row in others:
        lines.append(row[0])
        about = ", ".join(f"{name} {cell}" for name, cell in zip(head[1:], row[1:], strict=True))
        lines += textwrap.wrap(about, max(width, _LEAST), initial_indent="  ", subsequent_indent="  ")
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


def duration(seconds: float) -> str:
    """Formats a time for people: 7 s, 3 min 5 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
