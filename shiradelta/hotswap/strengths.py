"""The strengths of adapters, as `HotSwap.switch` is given them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from shiradelta.errors import ArgumentError
from shiradelta.models.strengths import Strength


def strengths_of(adapters: str | Mapping[str, float] | None, strength: float | None) -> dict[str, float]:
    """Adapter -> strength, from the arguments of `switch`.

    Raises:
        ArgumentError: a strength beside a mapping.
    """
    if isinstance(adapters, str):
        return {adapters: 1.0 if strength is None else strength}
    if strength is not None:
        raise ArgumentError(
            f"strength {strength} is for one adapter given by name; give the strengths as {{name: strength}}"
        )
    return dict(adapters or {})


def call_of(wanted: Mapping[str, float]) -> str:
    """The call of `switch`, for messages."""
    return f"switch({dict(sorted(wanted.items()))})"


def by_part(name: str, strength: Strength) -> dict[str, float]:
    """Adapter -> strength, where each part of a delta is an adapter "name/part"; a number is for all of it."""
    if isinstance(strength, Mapping):
        return {f"{name}/{part}": one for part, one in strength.items()}
    return {name: strength}


def are_same(some: Mapping[str, float], others: Mapping[str, float]) -> bool:
    """Whether both give the same weights: -0 and 0 give different ones."""
    return _bits(some) == _bits(others)


def _bits(strengths: Mapping[str, float]) -> dict[str, bytes]:
    return {name: np.float32(strength).tobytes() for name, strength in strengths.items()}
