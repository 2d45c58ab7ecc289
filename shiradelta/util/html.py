"""Templates of HTML whose values are escaped, and the tables that notebooks show for an object."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from shiradelta.errors import printable
from shiradelta.util.optional import importing

if TYPE_CHECKING:
    from jinja2 import Template

#: Rows of a table; a longer one ends in a row that says how many are left out.
_ROWS = 20
_TABLE = """<div>{{ title }}</div><table>
{%- for row in rows %}{% set tag = "th" if loop.first else "td" %}<tr>
{%- for cell in row %}
<{{ tag }} style="text-align: {{ 'left' if loop.first else 'right' }}">{{ cell }}</{{ tag }}>
{%- endfor %}</tr>{% endfor %}</table>"""


@cache
def template(text: str) -> Template:
    """A template of Jinja.  In every value that is no `Markup`, all is escaped that a browser or terminal acts on.

    Raises:
        MissingDependencyError: jinja2 is not installed.
    """
    with importing("a page of HTML"):
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup

    def finalize(value: object) -> object:
        return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    return Environment(
        autoescape=True, finalize=finalize, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    ).from_string(text)


def html_table(title: str, rows: Sequence[Sequence[str]]) -> str:
    """A titled table, the first row being the head and the first column to the left."""
    head, *body = rows
    if len(body) > _ROWS:
        body = [*body[:_ROWS], [f"and {len(body) - _ROWS:,} more", *[""] * (len(head) - 1)]]
    return template(_TABLE).render(title=title, rows=[head, *body])
