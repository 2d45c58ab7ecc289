"""Fitting: the values (and the mask) of a delta trained so that the model behaves like the fine-tune.

No labels are needed, only texts.  This module holds the settings and imports neither torch nor transformers; the
work is in `shiradelta.fit.run`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from shiradelta.errors import DeltaError

METHODS = ("train", "refit")
MASKS = ("falling", "magnitude", "activation", "gradient")


@dataclass(frozen=True)
class Fit:
    """How values are fitted.  The defaults are one recipe for every kind of fine-tune.

    Attributes:
        texts: a JSON Lines file with the key `text`, or a sequence of texts (of anything, if `forward` is given).
        method: "train" takes gradients; "refit" solves least squares layer by layer, from forward passes alone.
        mask: which weights change.  "falling" starts dense and drops, while it trains, what matters least; "magnitude",
            "activation" (change times the norm of its input) and "gradient" (change times rms gradient) are fixed from
            the start.  "refit" finds its own.
        steps: optimizer steps; None takes 1,000 on a GPU, and on a CPU what fits into ten minutes.
        batch: texts a step.
        micro: texts a forward pass, of which a step sums the gradients; None takes `batch`.
        rate: the largest learning rate, as a share of the size that a tensor's nonzeros would need to carry the energy
            of the fine-tune's whole change.
        tokens: longer texts are cut.
        text_share: of what a language model is trained to predict, the share that is the token that follows in the
            text; the rest is what the fine-tune predicts.  It is made as much smaller as the fine-tune predicts these
            texts less well than its own; 0 takes the fine-tune's word alone.
        held_out: texts kept from fitting, on which distances are measured; at most a fifth of all.
        seed: of the order of the texts.
        device: "cpu", "cuda", ...; None takes a GPU if there is one.
        state: where an interrupted run is kept, and found again; None puts it beside the output.
        model: the base as a torch module, where transformers cannot load it by itself.
        forward: forward(model, examples) -> tensor or tensors, in place of tokenizer and hidden states.
        loss: loss(student's, teacher's) -> scalar tensor, in place of the relative error of what `forward` gives.
        say: is told, once, how long it will take, and other things worth knowing.
    """

    texts: str | os.PathLike[str] | Sequence[Any]
    method: str = "train"
    mask: str = "falling"
    steps: int | None = None
    batch: int = 128
    micro: int | None = None
    rate: float = 0.3
    tokens: int = 128
    text_share: float = 0.1
    held_out: int = 256
    seed: int = 0
    device: str | None = None
    state: str | os.PathLike[str] | None = None
    model: Any = None
    forward: Callable[[Any, Sequence[Any]], Any] | None = None
    loss: Callable[[Any, Any], Any] | None = None
    say: Callable[[str], None] = lambda message: None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise DeltaError(f"fitting method {self.method!r} is unknown; take {' or '.join(METHODS)}")
        if self.mask not in MASKS:
            raise DeltaError(f"mask {self.mask!r} is unknown; take {', '.join(MASKS)}")
        if self.method == "refit" and self.mask != "falling":
            raise DeltaError(f"the closed form finds its own mask; leave {self.mask!r} out, or train")
        if not self.rate > 0:
            raise DeltaError(f"a learning rate of {self.rate} fits nothing; give one above 0")
        if not 0 <= self.text_share < 1:
            raise DeltaError(f"a text share of {self.text_share} is out of range; give 0, or a number below 1")
        for name in ("steps", "batch", "micro", "tokens", "held_out"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise DeltaError(f"{name} is {count}; give 1 or more")
