"""Text for people."""

from __future__ import annotations

import pytest

from shiradelta.errors import ArgumentError
from shiradelta.util import text


def test_what_a_terminal_acts_on_is_escaped():
    assert text.printable("a\x1b[31m\u202eb") == "a\\x1b[31m\\u202eb"
    assert text.brief("a" * 400) == "a" * 300 + "... (400 characters)"


def test_a_table_has_a_head_and_columns_to_the_right():
    assert text.table([["name", "n"], ["a", "10"]]) == "name   n\n----  --\na     10"


def test_a_table_shrinks_to_the_terminal():
    rows = [["tensor", "shape", "nonzeros"], ["model.layers.0.mlp.up_proj.weight", "96x32", "31"]]
    for width in (200, 40, 30, 10):
        lines = text.table(rows, width=width).splitlines()
        assert max(map(len, lines)) <= max(width, 33)
        assert "up_proj.weight" in lines[0 if width < 36 else 2]
        assert "96x32" in "".join(lines[-3:])
    assert text.table(rows, width=40).splitlines()[2] == "...0.mlp.up_proj.weight  96x32        31"
    wrapped = text.table([["kind", "what it reads"], ["lora", "one two three four five six seven"]], left=2, width=24)
    assert wrapped.splitlines()[2:] == ["lora  one two three four", "      five six seven"]


def test_times():
    assert [text.duration(seconds) for seconds in (0.4, 59, 185, 7800)] == ["0 s", "59 s", "3 min 5 s", "2 h 10 min"]


def test_sizes_shapes_and_percentages():
    assert [text.size(count) for count in (7, 1500, 2e6, 3e12)] == ["7 B", "1.50 KB", "2.00 MB", "3000.00 GB"]
    assert [text.shape(dimensions) for dimensions in ((), (3,), (4, 5))] == ["scalar", "3", "4x5"]
    assert [text.percent(share) for share in (0.01, 0.000125, 1)] == ["1%", "0.0125%", "100%"]


@pytest.mark.parametrize(
    ("number", "said"), [(0, "0 tensors"), (1, "1 tensor"), (["a"], "1 tensor"), (2000, "2,000 tensors")]
)
def test_counts_of_things(number: int | list[str], said: str):
    assert text.count(number, "tensor") == said


def test_a_plural_of_its_own():
    assert [text.count(n, "index", "indices") for n in (1, 2)] == ["1 index", "2 indices"]


def test_shares_as_numbers_and_as_percentages():
    assert [text.parse_share(given) for given in ("0.01", "1%", " 12.5 % ", "100%")] == [0.01, 0.01, 0.125, 1]
    for wrong in ("", "%", "1%%", "much"):
        with pytest.raises(ArgumentError, match="give a number such as 0"):
            text.parse_share(wrong)
