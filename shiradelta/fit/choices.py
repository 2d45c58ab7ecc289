"""The masks and methods that a fit can take, one row each.

Rows name their functions as "module:function", so that importing them needs no torch.  Rows added from outside may hold
the function itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

from shiradelta.util.registry import Registry

#: A function, or its path "module:function".
Implementation = str | Callable[..., Any]


@dataclass(frozen=True)
class FitMask:
    """A fit's mask: how the weights that change are chosen.

    Attributes:
        name: what a user calls it.
        help: a few words for the command line.
        score: (`Subject`) -> function (index of a target, |change|) -> importance of each weight; None takes |change|.
        begin: times the nonzeros that are kept to start training with; those above 1 are pruned.
        solves: whether training starts with the mask and the values that least squares give.
        relative_lr: the learning rate that suits it, as `Fit.relative_lr`; what is solved already takes small steps.
    """

    name: str
    help: str
    score: Implementation | None = None
    begin: float = 1
    solves: bool = False
    relative_lr: float = 0.3

    @property
    def by_magnitude(self) -> bool:
        """Whether importance is |change| alone."""
        return self.score is None

    def importance(self, subject: Any) -> Callable[[int, Any], Any]:
        """The function from (index of a target, |change|) to the importance of each weight."""
        if self.score is None:
            return lambda index, magnitude: magnitude
        score: Callable[[int, Any], Any] = _resolved(self.score)(subject)
        return score


@dataclass(frozen=True)
class FitMethod:
    """A fit's method: how the values are found.

    Attributes:
        name: what a user calls it.
        help: a few words for the command line.
        function: (`FitJob`, `Subject`, `Nonzeros`, `Fitted`) -> None; it leaves the values in `Nonzeros` and in the
            weights.
        streamed: (`FitJob`) -> `Fitted`, for models that do not fit into memory; it raises `CannotStreamError` where
            that is impossible.  None if there is no such way.
        trains: whether it takes optimizer steps, so that their settings count; others find their own mask.
    """

    name: str
    help: str
    function: Implementation
    streamed: Implementation | None = None
    trains: bool = True

    def fit(self, *arguments: Any) -> None:
        """Runs `function`."""
        _resolved(self.function)(*arguments)

    def stream(self, job: Any) -> Any:
        """Runs `streamed`, which must not be None."""
        assert self.streamed is not None
        return _resolved(self.streamed)(job)


def _resolved(implementation: Implementation) -> Callable[..., Any]:
    found: Callable[..., Any] = resolve_name(implementation) if isinstance(implementation, str) else implementation
    return found


MASKS: Registry[FitMask] = Registry(
    "mask",
    [
        FitMask("refit", "by least squares, pruned while training", begin=2, solves=True, relative_lr=0.03),
        FitMask("prune", "the largest changes, pruned while training", begin=5),
        FitMask("magnitude", "by change"),
        FitMask("activation", "by change x input", "shiradelta.fit.importance:by_activation"),
        FitMask("gradient", "by change x gradient", "shiradelta.fit.importance:by_gradient"),
    ],
)
#: Old names of masks -> new names.
RENAMED_MASKS = {"falling": "prune"}

METHODS: Registry[FitMethod] = Registry(
    "fitting method",
    [
        FitMethod("train", "by gradients", "shiradelta.fit.by_training:fit"),
        FitMethod(
            "refit",
            "in closed form, from forward passes alone",
            "shiradelta.fit.refit.whole:fit",
            "shiradelta.fit.refit.stream:stream",
            trains=False,
        ),
    ],
)
