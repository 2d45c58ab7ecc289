"""Checks what callers of the public functions give: a wrong type is one line that names the argument."""

from __future__ import annotations

import inspect
import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np

from shiradelta.errors import ArgumentError
from shiradelta.util.text import brief

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class ArgumentKind:
    """What an argument has to be.

    Attributes:
        what: for messages, to follow "give": "a number".
        holds: whether a value is right.
    """

    what: str
    holds: Callable[[Any], bool]


def is_path(value: Any) -> bool:
    """Whether a value is a path that may exist."""
    return isinstance(value, str | os.PathLike) and str(value) != "" and "\0" not in str(value)


def as_patterns(skip: str | Sequence[str] | None) -> tuple[str, ...]:
    """The patterns of a `skip` argument, which may be one, or None for no pattern."""
    return (skip,) if isinstance(skip, str) else tuple(skip or ())


def matches(patterns: Sequence[str], *names: str) -> bool:
    """Whether one of the patterns of a `skip` argument matches one of a tensor's names."""
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, bool | str | bytes) and isinstance(float(value), float)
    except (TypeError, ValueError, OverflowError):
        return False


def _is_whole(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)


def _is_open(value: Any) -> bool:
    readable = callable(getattr(value, "read", None)) and not isinstance(value, io.TextIOBase)
    is_array = hasattr(value, "__array_interface__")
    return is_path(value) or isinstance(value, bytes) or is_array or readable


def _are(value: Any, holds: Callable[[Any], bool]) -> bool:
    """Whether a value is several of a kind; an iterator is not looked into, since that would use it up."""
    if isinstance(value, Iterator) or not isinstance(value, Iterable) or isinstance(value, str | bytes):
        return False
    return all(map(holds, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _maps(value: Any, key: Callable[[Any], bool], to: Callable[[Any], bool]) -> bool:
    return isinstance(value, Mapping) and all(map(key, value)) and all(map(to, value.values()))


def check_least(least: int, **numbers: float | None) -> None:
    """Raises ArgumentError if one of the numbers is less than another; None is none."""
    for name, number in numbers.items():
        if number is not None and number < least:
            raise ArgumentError(f"is {number}; give {least} or more", argument=name)


def _is_list(value: Any) -> bool:
    return hasattr(value, "__len__") and hasattr(value, "__getitem__") and not isinstance(value, str | bytes | Mapping)


def _is_array(value: Any) -> bool:
    try:
        return np.asarray(value).dtype.kind in "biufcV"
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return False


ANY = ArgumentKind("anything", lambda value: True)
ARRAY = ArgumentKind("an array of numbers", _is_array)
BOOL = ArgumentKind(
    "True or False", lambda value: isinstance(value, bool | np.bool_) or (type(value) is int and value in (0, 1))
)
CALL = ArgumentKind("a function", callable)
LIST = ArgumentKind("a list", _is_list)
MODEL = ArgumentKind("a path, or tensors by name", lambda value: is_path(value) or isinstance(value, Mapping))
NAMES = ArgumentKind(
    "a mapping of names to names, or a function", lambda value: isinstance(value, Mapping) or callable(value)
)
NUMBER = ArgumentKind("a number", _is_number)
OPEN = ArgumentKind("a path, bytes or a binary file", _is_open)
PAIRS = ArgumentKind("a mapping of strings to strings", lambda value: _maps(value, _is_text, _is_text))
PATH = ArgumentKind("a path", is_path)
PATHS = ArgumentKind("a path, or a list of paths", lambda value: is_path(value) or _are(value, is_path))
PATTERNS = ArgumentKind(
    "a pattern such as '*.norm', a list of patterns, or None",
    lambda value: value is None or _is_text(value) or _are(value, _is_text),
)
SHAPE = ArgumentKind("a shape, such as (4, 4)", lambda value: _are(value, _is_whole))
SIZE = ArgumentKind("a number of bytes, or a size such as '2MB'", lambda value: _is_text(value) or _is_whole(value))
STRENGTHS = ArgumentKind(
    "a mapping of files to strengths, such as {'a.shd': 1.0}", lambda v: _maps(v, is_path, _is_number)
)
STRENGTH = ArgumentKind(
    "a number, or a mapping of patterns to numbers, such as {'unet': 0.8, '*': 1.0}",
    lambda value: _is_number(value) or _maps(value, _is_text, _is_number),
)
STRENGTHS_BY_TENSOR = ArgumentKind(
    "a mapping of files to strengths, such as {'a.shd': 1.0} or {'a.shd': {'*.mlp.*': 0.8, '*': 1.0}}",
    lambda value: _maps(value, is_path, STRENGTH.holds),
)
SWITCHED = ArgumentKind(
    "an adapter's name, a mapping of names to strengths, or None",
    lambda value: value is None or _is_text(value) or _maps(value, _is_text, _is_number),
)
TEXT = ArgumentKind("a string", _is_text)
TEXTS = ArgumentKind("a string, or a list of strings", lambda value: _is_text(value) or _are(value, _is_text))
WHOLE = ArgumentKind("a whole number", _is_whole)

#: Arguments that mean the same in every function -> what they have to be.
COMMON: dict[str, ArgumentKind] = {
    **dict.fromkeys(("allow_dtype", "check", "force", "forget", "full", "lock", "lossless", "zstd"), BOOL),
    **dict.fromkeys(("backend", "context", "kind", "method", "name", "scope", "values"), TEXT),
    **dict.fromkeys(("base", "from_base", "model_dir", "out", "path", "plot", "png", "signature", "source"), PATH),
    **dict.fromkeys(("alpha", "drop", "sparsity", "strength", "target_error", "target_kept"), NUMBER),
    "key": PATHS,
    "limit": SIZE,
    "metadata": PAIRS,
    "progress": CALL,
    "seed": WHOLE,
    "skip": PATTERNS,
    "whole": PATTERNS,
    "target_size": SIZE,
}


def checked(**own: ArgumentKind) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Lets a function refuse arguments of wrong types with an ArgumentError.  None is right where it is the default.

    Args:
        own: what its arguments have to be, where `COMMON` does not say it.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        parameters = [
            each for each in inspect.signature(function).parameters.values() if each.name not in ("self", "cls")
        ]
        kinds = {each.name: (COMMON | own)[each.name] for each in parameters}
        optional = {each.name for each in parameters if each.default is None}
        names = list(inspect.signature(function).parameters)
        called = function.__qualname__.removesuffix(".__init__")

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            given: Iterable[tuple[str, Any]] = (*zip(names, args, strict=False), *kwargs.items())
            for name, value in given:
                kind = kinds.get(name, ANY)
                if not kind.holds(value) and not (value is None and name in optional):
                    raise ArgumentError(f"{called}: {name} is {brief(repr(value), 80)}; give {kind.what}")
            return function(*args, **kwargs)

        call.__dict__["kinds"] = kinds  # for a test of all public functions
        return call

    return decorate
