"""Packages that may be missing: an import that fails says what needs the package and how to install it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from shiradelta.errors import MissingDependencyError

#: Package -> the extra of pyproject.toml that installs it.  Others are installed by their own names.
EXTRAS = {"cryptography": "sign", "matplotlib": "plot", "safetensors": "fit", "torch": "fit", "transformers": "fit"}


def missing(package: str, purpose: str) -> MissingDependencyError:
    """The error for a package that is not installed; `purpose` is what needs it, such as "a plot"."""
    install = f"'shiradelta[{EXTRAS[package]}]'" if package in EXTRAS else package
    return MissingDependencyError(
        f"{purpose} needs {package}, which is not installed; pip install {install}", name=package
    )


def require(package: str, purpose: str) -> None:
    """Checks that a package can be imported, without importing it.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        found = find_spec(package) is not None
    except (ModuleNotFoundError, ValueError):  # a test may have put None into sys.modules
        found = False
    if not found:
        raise missing(package, purpose)


@contextmanager
def importing(purpose: str) -> Iterator[None]:
    """Turns a failed import in the block into a MissingDependencyError.

    with importing("a plot"):
        from matplotlib.figure import Figure

    Raises:
        MissingDependencyError: a package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "shiradelta"):
            raise
        raise missing(package, purpose) from error
