"""Old names of arguments and classes, accepted for one more release (CONTRIBUTING.md, "Deprecation")."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from shiradelta.errors import ArgumentError

P = ParamSpec("P")
R = TypeVar("R")


def warn_renamed(old: str, new: str, stacklevel: int = 2) -> None:
    """Warns that `old` is called `new` now; `stacklevel` counts from the caller."""
    warnings.warn(f"{old} is deprecated; use {new}", DeprecationWarning, stacklevel=stacklevel + 1)


def renamed_names(module: str, names: Mapping[str, type]) -> Callable[[str], Any]:
    """Lets a module have classes under their old names, as its `__getattr__`.

    Args:
        module: its `__name__`.
        names: old name -> the class.
    """

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn_renamed(f"{module}.{name}", names[name].__name__)
        return names[name]

    return get


def renamed_arguments(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Lets a function take arguments by their old keywords: `renamed_arguments(old="new")`."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for old, new in names.items():
                if old in kwargs:
                    if new in kwargs:
                        raise ArgumentError(f"{old} and {new} are the same argument; give {new}")
                    warn_renamed(old, new)
                    kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        call.__dict__["renamed"] = names  # for the snapshot of the public API
        return call

    return decorate
