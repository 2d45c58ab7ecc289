"""Trains Sparse High Rank Adapters in any training loop (Bhardwaj et al., arXiv:2406.13175).

from shiradelta import train
tuner = train.attach(model, sparsity=0.01, mask="snip", targets=["q_proj", "v_proj"], calibration=batches)
...                                        # any loop: model.parameters() trains the nonzeros only
tuner.save("task.shd")
tuner.detach()                             # restores the base, bit for bit

Names are loaded when they are first used, so that listing the masks does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from shiradelta.util.optional import importing

if TYPE_CHECKING:
    from shiradelta.train.attaching import attach, reattach
    from shiradelta.train.masks import MaskInput, mask
    from shiradelta.train.tuner import Tuner

__all__ = ["MaskInput", "Tuner", "attach", "mask", "reattach"]

_HOMES = {"MaskInput": "masks", "Tuner": "tuner", "attach": "attaching", "mask": "masks", "reattach": "attaching"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with importing("training"):
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
