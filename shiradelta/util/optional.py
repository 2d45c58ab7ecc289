"""Packages that may be missing: an import that fails says what needs the package and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from shiradelta.errors import MissingDependencyError

#: Package -> the extra of pyproject.toml that installs it.  Others are installed by their own names.
EXTRAS = {
    "cryptography": "sign",
    "fsspec": "stores",
    "huggingface_hub": "hub",
    "matplotlib": "plot",
    "safetensors": "fit",
    "sklearn": "experts",
    "torch": "fit",
    "transformers": "fit",
    "yaml": "recipe",
}

#: Package -> the name under which it is installed, if that is another.
_INSTALLED_AS = {"PIL": "pillow"}


def missing(package: str, purpose: str) -> MissingDependencyError:
    """The error for a package that is not installed; `purpose` is what needs it, such as "a plot"."""
    install = f"'shiradelta[{EXTRAS[package]}]'" if package in EXTRAS else _INSTALLED_AS.get(package, package)
    return MissingDependencyError(
        f"{purpose} needs {package}, which is not installed; pip install {install}", name=package
    )


def failed_import(error: ImportError, purpose: str) -> MissingDependencyError:
    """The error for an import that has failed: a package is missing, or is there and cannot be loaded."""
    package = (error.name or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and package not in ("", "shiradelta"):
        return missing(package, purpose)
    return MissingDependencyError(
        f"{purpose} needs a package that cannot be loaded ({error}); try again, or install it anew", name=package
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
        MissingDependencyError: a package is not installed, or cannot be loaded.
    """
    try:
        yield
    except ImportError as error:
        if isinstance(error, MissingDependencyError) or (error.name or "").partition(".")[0] in ("", "shiradelta"):
            raise
        raise failed_import(error, purpose) from error
