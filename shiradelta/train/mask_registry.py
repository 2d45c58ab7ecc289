"""The registry of masks, and the input of a mask's function."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from shiradelta.errors import ArgumentError
from shiradelta.format.arithmetic import Positions
from shiradelta.format.draw import Draw
from shiradelta.models.views import View
from shiradelta.select.shares import count_for
from shiradelta.util.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

    from shiradelta.train.choose import Choice


@dataclass(frozen=True)
class MaskInput:
    """The input of a mask's function: one weight, and how much to choose from it.

    Attributes:
        weight: the weight, without autograd; the function must not change it.
        shape: the weight's shape as a matrix; for a convolution [out, everything else].
        share: share of the elements to choose.
        gradients: |gradient| summed over the calibration batches, flat, float32; None unless the mask asks for it.
        seed: differs between weights and between the user's seeds; the same on every machine.
        avoid: positions not to choose, increasing; None for none.  They are removed from what the function returns.
        views: the tensors of the checkpoint that together have the weight's elements; none where these are not known.
    """

    weight: Tensor
    shape: tuple[int, ...]
    share: float
    gradients: Tensor | None
    seed: str
    avoid: Positions | None
    views: Sequence[View] = ()

    @property
    def count(self) -> int:
        """Number of elements to choose."""
        return count_for(self.share, self.weight.numel())

    @property
    def number(self) -> int:
        """The seed as a number of 63 bits, for a random generator."""
        return seed_of(self.seed)


#: Scores of all elements, float32, in the weight's shape or flat, at least 0.  The largest are chosen.
Scores = Callable[[MaskInput], "Tensor"]


@dataclass(frozen=True)
class Chosen:
    """Chosen positions, and the draws that they are of, so that a file can name these instead.

    Attributes:
        positions: flat in the weight, increasing; NumPy or torch.
        draws: by the checkpoint's names, of tensors that lie in the weight as a whole.
    """

    positions: Positions | Tensor
    draws: Mapping[str, Draw] = field(default_factory=dict)


#: Positions, flat in the weight, increasing; NumPy or torch, or `Chosen`.
Choose = Callable[[MaskInput], "Positions | Tensor | Chosen"]


@dataclass(frozen=True)
class Ticket:
    """What a search leaves of one weight: elements, and values to train behind a gate (`shiradelta.nonzeros.gate`).

    Attributes:
        positions: int64 [n], flat in the weight, increasing, on its device.
        values: float32 [n], to begin with.
    """

    positions: Tensor
    values: Tensor


#: Trains to find the mask: of all weights at once, from the batches that the user gave for calibration.
Search = Callable[["Choice"], Mapping[str, Ticket]]
F = TypeVar("F", bound=Callable[[Any], Any])


@dataclass(frozen=True)
class Mask:
    """The row of a mask: its name, what it can do, and its function.

    Attributes:
        name: what users call it.
        help: which weights it chooses, in a few words.
        scores: its function, where it gives scores.
        positions: its function, where it gives positions.  A mask that has both gives scores for N:M sparsity.
        search: its function, where it searches.
        needs_gradients: whether the function needs calibration batches.
        can_be_larger: whether a mask several times as large makes sense to start from, and to prune while training.
        whole_model: whether the share may be that of all weights together.
        weight_decay: what `shiradelta train` pulls the values to zero with, relative to the learning rate.
    """

    name: str
    help: str
    scores: Scores | None
    positions: Choose | None
    search: Search | None
    needs_gradients: bool
    can_be_larger: bool
    whole_model: bool
    weight_decay: float = 0.0

    @property
    def gives(self) -> str:
        """What the function returns: "scores", "positions" or "tickets"."""
        return "tickets" if self.search is not None else "scores" if self.positions is None else "positions"


#: Every mask by name.
MASKS: Registry[Mask] = Registry("mask")


def mask(
    name: str,
    help: str,
    *,
    gives: str = "scores",
    needs_gradients: bool = False,
    can_be_larger: bool | None = None,
    whole_model: bool | None = None,
    pattern_scores: Scores | None = None,
    weight_decay: float = 0.0,
) -> Callable[[F], F]:
    """Registers the decorated function as a mask.

    Args:
        name: what users call it.
        help: which weights it chooses, in a few words.
        gives: "scores", "positions" or "tickets": what the function returns.  Scores suit every sparsity: a share of
            each weight, a share of the model, N:M, and a larger mask to prune from.  Positions suit a share of each
            weight, and so do tickets: positions with values to begin with, of all weights by name, from a function of a
            `shiradelta.train.choose.Choice`.
        needs_gradients: whether the function needs calibration batches.
        can_be_larger: whether a larger mask makes sense to prune from; by default yes for scores, no for positions.
        whole_model: whether the share may be that of all weights together; by default as `can_be_larger`.
        pattern_scores: for positions, a function that gives scores where N:M is asked for.
        weight_decay: what `shiradelta train` pulls the values to zero with, relative to the learning rate.

    Raises:
        ArgumentError: the name is taken, or `gives` is unknown.
    """
    if gives not in ("scores", "positions", "tickets"):
        raise ArgumentError(f"a mask cannot give {gives!r}; take scores, positions or tickets")
    by_score = gives == "scores"

    def register(function: F) -> F:
        MASKS.add(
            Mask(
                name=name,
                help=help,
                scores=function if by_score else pattern_scores,
                positions=function if gives == "positions" else None,
                search=function if gives == "tickets" else None,
                needs_gradients=needs_gradients,
                can_be_larger=by_score if can_be_larger is None else can_be_larger,
                whole_model=by_score if whole_model is None else whole_model,
                weight_decay=weight_decay,
            )
        )
        return function

    return register


def find_mask(name: str, pattern: tuple[int, int] | None, whole_model: bool) -> Mask:
    """Finds a mask by name, and checks that it supports the given options.

    Args:
        name: the name that the user gave.
        pattern: (n, m) for N:M sparsity.
        whole_model: whether the share is that of all weights together.

    Raises:
        ArgumentError: the mask is unknown, or does not support an option.
    """
    if name not in MASKS:
        raise ArgumentError(f"mask {name!r} is unknown; take {', '.join(MASKS)}, or give your own by name")
    found = MASKS[name]
    if pattern is not None and found.scores is None:
        raise ArgumentError(
            f"mask {name!r} gives {found.gives}, not scores, so N:M cannot be chosen by it; give a share"
        )
    if whole_model and not found.whole_model:
        raise ArgumentError(f"mask {name!r} is chosen in each weight by itself; take scope='tensor'")
    return found


def can_be_larger(mask: object, pattern: tuple[int, int] | None) -> bool:
    """Whether a mask (a name, or the user's own) can start larger, to be pruned while training."""
    return isinstance(mask, str) and mask in MASKS and MASKS[mask].can_be_larger and pattern is None


def is_searched(mask: str) -> bool:
    """Whether a mask is searched by training, which takes long."""
    return MASKS.find(mask).search is not None


def seed_of(text: str) -> int:
    """A number of 63 bits that is the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
