"""Rounds values as a reader of the file will see them."""

from __future__ import annotations

from shiradelta.fit.tuned_weights import TunedWeights
from shiradelta.nonzeros.vector import Nonzeros


def write_rounded(nonzeros: Nonzeros, weights: TunedWeights, codec: str) -> None:
    """Writes all nonzeros into the weights, with values rounded as the codec stores them."""
    nonzeros.write(weights.quantiser_of(nonzeros, codec)(nonzeros.values))
