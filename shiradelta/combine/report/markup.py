"""Pieces of HTML: tables, bars, tabs, coloured cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from shiradelta.errors import printable

#: Deltas are called A, B, ... if their names would be too long.
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Cell(str):
    """A whole table cell in HTML, with its `<td>`."""

    __slots__ = ()


def text(value: object) -> str:
    """Escapes everything in a value that a browser or terminal would act on."""
    return escape(printable(str(value)))


def badge(number: int) -> str:
    """A delta's letter in its colour."""
    return f'<b class="id" style="--n:{number}">{letter(number)}</b>'


def letter(number: int) -> str:
    """A to Z, then A1, B1, ..."""
    turn, index = divmod(number, len(_LETTERS))
    return _LETTERS[index] + (str(turn) if turn else "")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "wide") -> str:
    """A table of rows of HTML; a `Cell` is used unchanged, other strings are put into one."""
    lines = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"]
    body = [
        f"<tr><th>{first}</th>" + "".join(c if isinstance(c, Cell) else f"<td>{c}</td>" for c in rest) + "</tr>"
        for first, *rest in rows
    ]
    return (
        f'<div class="scroll"><table class="{kind}"><thead>{"".join(lines)}</thead><tbody>{"".join(body)}</tbody>'
        "</table></div>"
    )


def bars(heights: Sequence[float], number: int, kind: str = "spark") -> str:
    """A bar chart, scaled to its highest bar."""
    top = max(heights, default=0)
    if not top:
        return ""
    steps = [round(20 * (1 - height / top)) for height in heights]
    path = f"M0 {steps[0]}h1" + "".join(f"V{y}h1" for y in steps[1:]) + "V20H0z"
    return (
        f'<svg class="{kind}" style="--n:{number}" viewBox="0 0 {len(heights)} 20" preserveAspectRatio="none"'
        f' aria-hidden="true"><path d="{path}"/></svg>'
    )


def tabs(group: str, panes: Mapping[str, str]) -> str:
    """Tabs: titles to choose from, and a pane for each."""
    heads = "".join(
        f'<input type="radio" name="{group}" id="{group}{i}"{" checked" * (i == 0)}>'
        f'<label for="{group}{i}">{title}</label>'
        for i, title in enumerate(panes)
    )
    return f'<div class="tabs">{heads}{"".join(f"<div class=pane>{pane}</div>" for pane in panes.values())}</div>'


def cell(value: float | None, words: str, colour: float) -> Cell:
    """A cell of a heat map; `colour` is from -1 to 1."""
    if value is None:
        return Cell('<td class="dim">-</td>')
    strength = min(abs(colour), 1)
    kind = " ".join([*["n"] * (colour < 0), *["full"] * (strength > 0.6)])
    return Cell(f'<td class="{kind}" style="--a:{strength:.2f}">{words}</td>')
