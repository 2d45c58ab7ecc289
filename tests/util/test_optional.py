"""Errors for packages that are missing or cannot be loaded."""

from __future__ import annotations

import re
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import shiradelta
from shiradelta.util import optional

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


def test_a_failed_import_says_what_needs_the_package_and_how_to_install_it():
    line = "a song needs no_such_package, which is not installed; pip install no_such_package"
    with pytest.raises(shiradelta.MissingDependencyError, match=line) as caught, optional.importing("a song"):
        import_module("no_such_package.inside")
    assert caught.value.name == "no_such_package"
    assert isinstance(caught.value, ImportError)
    with pytest.raises(shiradelta.MissingDependencyError, match=line):
        optional.require("no_such_package", "a song")
    optional.require("numpy", "a song")


def test_a_module_of_this_package_that_is_missing_is_no_missing_dependency():
    with pytest.raises(ModuleNotFoundError) as caught, optional.importing("a song"):
        import_module("shiradelta.no_such_module")
    assert not isinstance(caught.value, shiradelta.MissingDependencyError)


@pytest.mark.parametrize(("package", "extra"), optional.EXTRAS.items())
def test_extras_install_the_package(package: str, extra: str):
    assert f"'shiradelta[{extra}]'" in str(optional.missing(package, "a song"))
    distribution = {"yaml": "pyyaml", "sklearn": "scikit-learn"}.get(package, package)
    lines = PROJECT["optional-dependencies"][extra]
    assert any(re.match(rf"{distribution}(\[\w+\])?>=", line) for line in lines)


@pytest.mark.parametrize("name", ["a_song", "a_song.inside"])
def test_a_package_that_cannot_be_loaded_is_not_said_to_be_missing(name: str):
    line = r"a plot needs a package that cannot be loaded \(no memory\); try again, or install it anew"
    with pytest.raises(shiradelta.MissingDependencyError, match=line), optional.importing("a plot"):
        raise ImportError("no memory", name=name)
