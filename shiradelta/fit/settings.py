"""The settings of a fit.  Importing them needs neither torch nor transformers."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from shiradelta.errors import ArgumentError
from shiradelta.fit.choices import MASKS, METHODS, RENAMED_MASKS
from shiradelta.text.kinds import check_prompt_share
from shiradelta.util.arguments import (
    ANY,
    CALL,
    NUMBER,
    PATH,
    TEXT,
    TEXTS,
    WHOLE,
    ArgumentKind,
    check_least,
    checked,
    is_path,
)
from shiradelta.util.deprecated import renamed_arguments, warn_renamed


@dataclass(frozen=True)
class Fit:
    """How the values of a delta are fitted.  The defaults are one recipe for every kind of fine-tune.

    Attributes:
        texts: a file of examples, or a sequence of them.  A file is JSON Lines, or a data set of Hugging Face; its
            examples have `text`; `prompt` and `completion`; `messages`; or, for encoders, `anchor` and `positive`.
            An encoder-decoder takes `prompt` and `completion`, or `messages`; Whisper `audio` and `text`; a
            vision-language model `image`, `prompt` and `completion`; CLIP `image` and `text`.
            FILE:COLUMN takes one column.  A sequence has strings, or mappings with these keys (anything, if `forward`
            is given).
        method: "train" uses gradients; "refit" solves least squares layer by layer, from forward passes alone.
        mask: which weights change, for "train".  "refit" starts with what the method "refit" gives for twice the
            nonzeros, and prunes the least important while it trains; "prune" starts with the largest changes; None
            takes "refit", but "prune" for 300 steps or more where least squares leave over a quarter of the distance,
            and least squares where "prune" ends worse;
            "magnitude", "activation" (change times the RMS of its input) and "gradient" (change times RMS gradient)
            keep one mask from the start.
        steps: optimizer steps; None takes 1,000 on a GPU, and as many as fit into ten minutes on a CPU.
        batch: examples per step.
        micro: examples per forward pass; a step sums the gradients of several.  None takes `batch`.
        relative_lr: largest learning rate, relative to the size that a tensor's nonzeros would need to carry the
            energy of the fine-tune's whole change; None takes the mask's own.
        tokens: longer texts are cut.
        text_share: for language models, the share of the target that is the text's next token; the rest is what the
            fine-tune predicts.  It is scaled down when the texts differ from the fine-tune's training data; 0 takes
            the fine-tune's predictions alone.
        prompt_share: how much a prompt's token counts in losses and measures, where one that the model is to say has 1:
            a completion's, or an assistant's.  0 leaves prompts out, 1 makes no difference.
        held_out: texts kept from fitting, on which distances are measured; at most a fifth of all.
        seed: of the order of the texts, and of generated ones.
        device: "cpu", "cuda", "cuda:1", ...; several, such as "cuda:0,cuda:1" or a list of names, share out the layers
            of the model.  None takes a GPU if there is one, and all GPUs where the weights do not fit into one.
        state: where the state of an interrupted run is kept; None puts it beside the output.
        model: the base as a torch module, where transformers cannot load it by itself.
        forward: forward(model, examples) -> tensor or tensors, instead of tokenizer and hidden states.
        loss: loss(student's, teacher's) -> scalar tensor, instead of the relative error of what `forward` gives.
        log: called with a line of text, such as an estimate of the time.
        generate: texts to fit on beside the examples, which a fine-tuned language model generates from prompts of those
            it is fitted on, or from the start token where these have none; they are never held out.

    Raises:
        ArgumentError: a setting is unknown or out of range.
    """

    texts: str | os.PathLike[str] | Sequence[Any]
    method: str = "train"
    mask: str | None = None
    steps: int | None = None
    batch: int = 128
    micro: int | None = None
    relative_lr: float | None = None
    tokens: int = 512
    text_share: float = 0.1
    prompt_share: float = 0.0
    held_out: int = 256
    seed: int = 0
    device: str | Sequence[str] | None = None
    state: str | os.PathLike[str] | None = None
    model: Any = None
    forward: Callable[[Any, Sequence[Any]], Any] | None = None
    loss: Callable[[Any, Any], Any] | None = None
    log: Callable[[str], None] = lambda message: None
    generate: int = 0

    def __post_init__(self) -> None:
        if self.mask is not None and self.mask in RENAMED_MASKS:
            # Behind this method, the dataclass's `__init__` and its two wrappers stands the caller.
            warn_renamed(f"mask {self.mask!r}", repr(RENAMED_MASKS[self.mask]), stacklevel=5)
            object.__setattr__(self, "mask", RENAMED_MASKS[self.mask])
        method = METHODS.find(self.method)
        if self.mask is not None and MASKS.find(self.mask).begin == 1 and not method.trains:
            raise ArgumentError(f"fitting method {self.method!r} finds its own mask; leave {self.mask!r} out, or train")
        if self.relative_lr is not None and not self.relative_lr > 0:
            raise ArgumentError(f"a learning rate of {self.relative_lr} fits nothing; give one above 0")
        if not 0 <= self.text_share < 1:
            raise ArgumentError(f"a text share of {self.text_share} is out of range; give 0, or a number below 1")
        check_prompt_share(self.prompt_share)
        if self.generate < 0:
            raise ArgumentError(f"is {self.generate}; give a number of texts, or 0 for none", argument="generate")
        if self.generate and self.forward is not None:
            raise ArgumentError("no texts can be generated for a forward function; leave generate or forward out")
        check_least(1, **{name: getattr(self, name) for name in ("steps", "batch", "micro", "tokens", "held_out")})

    @property
    def per_pass(self) -> int:
        """Examples per forward pass."""
        return self.micro or self.batch

    @property
    def rate(self) -> float | None:
        """Deprecated name of `relative_lr`."""
        warn_renamed("Fit.rate", "relative_lr")
        return self.relative_lr

    @property
    def say(self) -> Callable[[str], None]:
        """Deprecated name of `log`."""
        warn_renamed("Fit.say", "log")
        return self.log


_TEXTS = ArgumentKind(
    "a file of examples, or a list of them", lambda value: is_path(value) or hasattr(value, "__getitem__")
)
_COUNTS = dict.fromkeys(("steps", "batch", "micro", "tokens", "held_out", "generate"), WHOLE)
_FUNCTIONS = dict.fromkeys(("forward", "loss", "log"), CALL)
_NUMBERS = dict.fromkeys(("relative_lr", "text_share", "prompt_share"), NUMBER)
_OTHERS = {"texts": _TEXTS, "mask": TEXT, "device": TEXTS, "state": PATH}
_checked = checked(**_OTHERS, **_NUMBERS, **_COUNTS, **_FUNCTIONS, model=ANY)(Fit.__init__)
Fit.__init__ = renamed_arguments(rate="relative_lr", say="log")(_checked)  # type: ignore[method-assign]
