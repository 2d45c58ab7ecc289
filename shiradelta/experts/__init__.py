"""Families of deltas: a base delta, an expert delta for each cluster of examples, and a route for each prompt.

After ELREA (arXiv:2502.00089), with sparse deltas in place of LoRAs.

from shiradelta import experts
family = experts.train_family(model, examples, loss, "family", prompt_loss=prompt_loss)
router = experts.ExpertRouter(model, experts.open_family("family"), prompt_loss)
router.swap.switch(router.route([prompt]))

Names are loaded when they are first used, so that looking at a family's folder does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from shiradelta.util.optional import importing

if TYPE_CHECKING:
    from shiradelta.experts.assembling import assemble_family
    from shiradelta.experts.family import ExpertFamily, open_family
    from shiradelta.experts.routing import ExpertRouter, route_weights
    from shiradelta.experts.texts import prompt_loss, text_loss
    from shiradelta.experts.training import train_family
    from shiradelta.train.settings import TrainSettings

__all__ = [
    "ExpertFamily",
    "ExpertRouter",
    "TrainSettings",
    "assemble_family",
    "open_family",
    "prompt_loss",
    "route_weights",
    "text_loss",
    "train_family",
]

_HOMES = {
    "ExpertFamily": "experts.family",
    "ExpertRouter": "experts.routing",
    "TrainSettings": "train.settings",
    "assemble_family": "experts.assembling",
    "open_family": "experts.family",
    "prompt_loss": "experts.texts",
    "route_weights": "experts.routing",
    "text_loss": "experts.texts",
    "train_family": "experts.training",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with importing("families of experts"):
        return getattr(import_module(f"shiradelta.{_HOMES[name]}"), name)
