"""Modules under their names of 0.1: the same module as under the new name, with a warning that gives it."""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path

import pytest

from shiradelta._moved import MOVED

CHANGELOG = Path(__file__).parents[2] / "CHANGELOG.md"


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch):
    """A module warns when it is imported, so what an earlier test imported has to go."""
    for name in [name for name in sys.modules if name.removeprefix("shiradelta.") in {*MOVED, "engine", "report.page"}]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_a_moved_module(old: str, new: str):
    with pytest.warns(DeprecationWarning, match=re.escape(f"shiradelta.{old} is shiradelta.{new} now")):
        found = import_module(f"shiradelta.{old}")
    assert found is import_module(f"shiradelta.{new}")
    assert found.__spec__ is not None
    assert found.__spec__.name == f"shiradelta.{new}"


def test_a_module_inside_is_not_loaded_twice():
    with pytest.warns(DeprecationWarning, match="is shiradelta") as caught:
        found = import_module("shiradelta.report.page")
    assert str(caught[-1].message) == "shiradelta.report.page is shiradelta.combine.report.page now"
    assert found is import_module("shiradelta.combine.report.page")


def test_a_module_that_never_was():
    with pytest.raises(ModuleNotFoundError):
        import_module("shiradelta.engine.nothing")


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_the_changelog_lists_it(old: str, new: str):
    text = CHANGELOG.read_text()
    assert f"`{old}`" in text
    assert f"`{new}`" in text
