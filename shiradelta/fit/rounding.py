"""Rounds values as a reader of the file will see them."""

from __future__ import annotations

from torch import Tensor

from shiradelta.fit.quantise import Quantiser
from shiradelta.fit.tuned_weights import TunedWeights
from shiradelta.nonzeros.vector import Nonzeros


def rounded(values: Tensor, codec: str) -> Tensor:
    """The values of one tensor, rounded as the codec stores them."""
    return Quantiser(codec, [len(values)], values.device)(values)


def write_rounded(nonzeros: Nonzeros, weights: TunedWeights, codec: str) -> None:
    """Writes all nonzeros into the weights, with values rounded as the codec stores them."""
    nonzeros.write(weights.quantiser(nonzeros, codec)(nonzeros.values))
