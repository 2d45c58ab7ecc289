"""JSON that may come from anywhere: each object has exactly the keys that it should have, each value its form."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

_DIGEST = re.compile(r"[0-9a-f]{64}")
#: The largest number: JSON's are exact up to there everywhere.
_LARGEST = (1 << 53) - 1


def parsed(raw: bytes) -> Any:
    """What JSON says.

    Raises:
        ValueError: it is damaged, or a key occurs twice.
        RecursionError: it is too deep.
    """
    return json.loads(raw.decode(), object_pairs_hook=_without_repeats, parse_constant=_refuse_constant)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def fields(found: Any, kinds: Mapping[str, Callable[[Any], Any]]) -> list[Any]:
    """The values of an object that has exactly these keys, checked.

    Raises:
        ValueError: it has other ones, or a value has another form.
    """
    if not isinstance(found, dict) or found.keys() != kinds.keys():
        keys = sorted(found) if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"{keys} in place of {sorted(kinds)}")
    values = []
    for key, kind in kinds.items():
        try:
            values.append(kind(found[key]))
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
    return values


def number(value: Any) -> int:
    """A whole number from 0 to 2^53 - 1; ValueError for anything else."""
    if type(value) is not int or not 0 <= value <= _LARGEST:
        raise ValueError(f"{str(value)[:40]!r} is no whole number from 0 to 2^53 - 1")
    return value


def text(form: re.Pattern[str]) -> Callable[[Any], str]:
    """A check of text of a form; ValueError for anything else."""

    def check(value: Any) -> str:
        if not isinstance(value, str) or not form.fullmatch(value):
            raise ValueError(f"{str(value)[:40]!r} has another form")
        return value

    return check


#: 64 hexadecimal digits.
digest = text(_DIGEST)


def mapping(value: Any) -> dict[str, Any]:
    """An object; ValueError for anything else."""
    if not isinstance(value, dict):
        raise ValueError("is no object")
    return value


def sequence(value: Any) -> list[Any]:
    """A list; ValueError for anything else."""
    if not isinstance(value, list):
        raise ValueError("is no list")
    return value
