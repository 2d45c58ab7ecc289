"""The learning rate over a run."""

from __future__ import annotations

import math

#: Share of all steps in which the learning rate rises.
WARM_UP = 0.1


def cycle(step: int, steps: int) -> float:
    """Linear up, cosine down to zero."""
    return min(1.0, (step + 1) / (WARM_UP * steps)) * (1 + math.cos(math.pi * step / steps)) / 2
