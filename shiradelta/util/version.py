"""The version of this package, also in a source tree that is not installed."""

from __future__ import annotations

import tomllib
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path


def version() -> str:
    """The installed version, or pyproject.toml's with "+source" if the package is not installed."""
    try:
        return installed("shiradelta")
    except PackageNotFoundError:
        pass
    try:
        project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        return f"{project['version']}+source"
    except (OSError, KeyError, tomllib.TOMLDecodeError):
        return "0+unknown"
