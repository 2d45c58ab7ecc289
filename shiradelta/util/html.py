"""Tables in HTML, which notebooks show for an object."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from shiradelta.errors import printable

#: Rows of a table; a longer one ends in a row that says how many are left out.
_ROWS = 20


def html_table(title: str, rows: Sequence[Sequence[str]]) -> str:
    """A titled table of escaped cells, the first row being the head and the first column to the left."""
    head, *body = rows
    shown = (
        body if len(body) <= _ROWS else [*body[:_ROWS], [f"and {len(body) - _ROWS:,} more", *[""] * (len(head) - 1)]]
    )
    lines = [_row("th", head), *(_row("td", row) for row in shown)]
    return f"<div>{_cell(title)}</div><table>{''.join(lines)}</table>"


def _row(tag: str, cells: Sequence[str]) -> str:
    sides = ["left", *["right"] * (len(cells) - 1)]
    inside = "".join(
        f'<{tag} style="text-align: {side}">{_cell(cell)}</{tag}>' for cell, side in zip(cells, sides, strict=True)
    )
    return f"<tr>{inside}</tr>"


def _cell(text: str) -> str:
    return escape(printable(text))
