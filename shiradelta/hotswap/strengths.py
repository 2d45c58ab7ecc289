"""The strengths of adapters, as `HotSwap.switch` is given them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from shiradelta.errors import ArgumentError


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


def are_same(some: Mapping[str, float], others: Mapping[str, float]) -> bool:
    """Whether both give the same weights: -0 and 0 give different ones."""
    return _bits(some) == _bits(others)


def _bits(strengths: Mapping[str, float]) -> dict[str, bytes]:
    return {name: np.float32(strength).tobytes() for name, strength in strengths.items()}
