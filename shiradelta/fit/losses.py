"""Losses of held-out examples, from what is known of each of them under several models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shiradelta.fit.divergence import divergence, divergence_of_labels
from shiradelta.text.examples import TEMPERATURE

#: How many of a text's nearest others are compared.
NEAREST = 10

#: Model -> what is known of each example [n, k], by model; the fine-tune is "tuned".
Known = Mapping[str, Tensor]


@dataclass(frozen=True)
class ExampleLoss:
    """A way to compute losses of examples.

    Attributes:
        measure: what the loss is, in words.
        is_own: whether it is a loss of the examples themselves; or else how far a model is from the fine-tune.
        of: from what is known of the examples to the losses [n] by model.
        weights: from what is known to what the losses are divided by [n].
    """

    measure: str
    is_own: bool
    of: Callable[[Known], dict[str, Tensor]]
    weights: Callable[[Tensor], Tensor] = lambda known: torch.ones(len(known))


def _agreement(known: Known) -> dict[str, Tensor]:
    near = {state: _nearest(vectors) for state, vectors in known.items()}
    return {
        state: 1 - (own[:, :, None] == near["tuned"][:, None, :]).any(2).float().mean(1) for state, own in near.items()
    }


def _nearest(vectors: Tensor) -> Tensor:
    """Of each text the others that are most similar to it [n, few]."""
    unit = nn.functional.normalize(vectors.float(), dim=-1)
    alike = (unit @ unit.T).fill_diagonal_(-torch.inf)
    return alike.topk(max(1, min(NEAREST, len(alike) // 2)), dim=1).indices


def _of_pairs(known: Known) -> dict[str, Tensor]:
    return {state: _of_partners(*vectors.float().chunk(2, dim=1)) for state, vectors in known.items()}


def _of_partners(one: Tensor, other: Tensor) -> Tensor:
    one, other = (nn.functional.normalize(side, dim=-1) for side in (one, other))
    alike = one @ other.T / TEMPERATURE
    labels = torch.arange(len(alike))
    ways = [nn.functional.cross_entropy(way, labels, reduction="none") for way in (alike, alike.T)]
    return sum(ways, torch.zeros(len(alike))) / 2


def _divergences(known: Known) -> dict[str, Tensor]:
    rows = {state: _rows(own, known["tuned"]) for state, own in known.items()}
    return {state: torch.stack([divergence(*pair) for pair in pairs]) for state, pairs in rows.items()}


def _rows(own: Tensor, tuned: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(torch.split(own, 1), torch.split(tuned, 1), strict=True)


def _divergences_of_labels(known: Known) -> dict[str, Tensor]:
    return {state: divergence_of_labels(own, known["tuned"]) for state, own in known.items()}


#: Of a language model: the examples have (nats of all tokens that count, their number).
LIKELIHOOD = ExampleLoss(
    "nats per token that counts",
    True,
    lambda known: {state: found[:, 0] for state, found in known.items()},
    lambda found: found[:, 1],
)
#: Of embeddings of texts: the share of a text's nearest others that are not its nearest others to the fine-tune.
AGREEMENT = ExampleLoss(f"share of a text's {NEAREST} nearest others that are not the fine-tune's", False, _agreement)
#: Of embeddings of pairs: the examples have both.
PARTNERS = ExampleLoss("nats to find a text's partner among all held out", True, _of_pairs)
#: Of answers, one for each text, of which the right ones are unknown.
ANSWERS = ExampleLoss("divergence from the fine-tune's answer", False, _divergences)
LABELS = ExampleLoss("divergence from the fine-tune's labels, nats", False, _divergences_of_labels)
