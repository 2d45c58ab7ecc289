"""The learning rate over a run, relative to its peak."""

from __future__ import annotations

import math

#: Share of all steps in which the learning rate rises.
WARM_UP = 0.1


def cycle(step: int, steps: int) -> float:
    """Learning rate at a step, as a share of the peak: linear warm-up, then cosine decay to zero."""
    return min(1.0, (step + 1) / (WARM_UP * steps)) * (1 + math.cos(math.pi * step / steps)) / 2
