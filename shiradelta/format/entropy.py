"""What positions cost at least, if nothing but their number is known."""

from __future__ import annotations

import math


def entropy(nnz: int, numel: int) -> float:
    """The entropy of positions drawn independently at this density, in bits per nonzero."""
    if not 0 < nnz < numel:
        return 0.0
    p = nnz / numel
    return -(math.log2(p) + (1 - p) / p * math.log2(1 - p))
