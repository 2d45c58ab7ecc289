"""The strength of a delta: one number, or one for each tensor by patterns of names, by components or by layers."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase

from shiradelta.errors import ArgumentError

#: A number; or pattern of tensors' names, component of a pipeline, or "layers 0-15" -> a number.  The first pattern
#: that matches a tensor counts.
Strength = float | Mapping[str, float]

_LAYERS = re.compile(r"layers?[ :](\d+)(?:-(\d+))?")


def first_patterns(patterns: Collection[str], names: Collection[str], label: str) -> dict[str, str]:
    """Tensor -> the first pattern that matches it.

    Args:
        patterns: globs of tensors' names; "unet" for all in a folder `unet/`; "layers 0-15" for the first number in a
            name.
        names: the delta's tensors.
        label: the delta's file, for messages.

    Raises:
        ArgumentError: a pattern matches no tensor, or is the first one for none, or no pattern matches a tensor.
    """
    for pattern in patterns:
        if not any(_matches(pattern, name) for name in names):
            raise ArgumentError(f"{label}: no tensor is called {pattern!r}{_like(pattern, names)}; correct the pattern")
    found = {}
    for name in names:
        matching = next((one for one in patterns if _matches(one, name)), None)
        if matching is None:
            raise ArgumentError(
                f"{label}: no pattern matches tensor {name!r}, so its strength is unknown; end with '*', as in"
                " {'*.mlp.*': 0.8, '*': 1}"
            )
        found[name] = matching
    for pattern in patterns:
        if pattern not in found.values():
            raise ArgumentError(f"{label}: pattern {pattern!r} comes after others that match all of it; put it first")
    return found


def strengths_by_name(strength: Strength, names: Collection[str], label: str) -> dict[str, float]:
    """Tensor -> its strength, without the tensors that a pattern leaves out by strength 0.

    Args:
        strength: what was given for a delta.
        names: the delta's tensors.
        label: the delta's file, for messages.

    Raises:
        ArgumentError: a pattern matches no tensor, or no pattern matches a tensor.
    """
    if not isinstance(strength, Mapping):
        return dict.fromkeys(names, strength)
    patterns = first_patterns(strength, names, label)
    return {name: float(strength[pattern]) for name, pattern in patterns.items() if strength[pattern]}


def described(strength: Strength) -> str:
    """A strength in a line of metadata: 0.7, or the patterns."""
    if isinstance(strength, Mapping):
        return "{" + ", ".join(f"{pattern}: {value:g}" for pattern, value in strength.items()) + "}"
    return f"{strength:g}"


def _matches(pattern: str, name: str) -> bool:
    """Whether a pattern is of a tensor's name, of a folder in it, or of its layer: the first number among its parts."""
    layers = _LAYERS.fullmatch(pattern)
    if layers is None:
        return fnmatchcase(name, pattern) or name.startswith(f"{pattern}/")
    number = re.search(r"(?:^|[._/])(\d+)(?=[._/])", name)
    first, last = int(layers[1]), int(layers[2] or layers[1])
    return number is not None and first <= int(number[1]) <= last


def _like(pattern: str, names: Collection[str]) -> str:
    near = difflib.get_close_matches(pattern, names, 1, 0.5) or list(names)[:1]
    return f" (there is {near[0]!r})" if near else ""
