"""A registry whose members have ids."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from shiradelta.errors import ArgumentError
from shiradelta.util.registry import IdRegistry


@dataclass(frozen=True)
class Row:
    id: int
    name: str


def test_members_are_found_by_id_and_by_name():
    registry = IdRegistry("thing", [Row(1, "one")])
    two = registry.add(Row(2, "two"))
    assert registry["two"] is registry.by_id[2] is registry.find("two") is two
    registry.remove("two")
    assert list(registry) == ["one"]
    assert list(registry.by_id) == [1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Row(1, "other"), "id 1 is that of 'one'"),
        (Row(2, "one"), "registered already"),
        (Row(256, "large"), "does not fit one byte"),
        (Row(-1, "small"), "does not fit one byte"),
    ],
)
def test_what_clashes_is_refused_and_leaves_nothing(row: Row, message: str):
    registry = IdRegistry("thing", [Row(1, "one")])
    with pytest.raises(ArgumentError, match=message):
        registry.add(row)
    assert list(registry) == ["one"]
    assert registry.by_id == {1: Row(1, "one")}
