"""How much of a fine-tune's gain over its base a delta keeps, on held-out examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from shiradelta.fit.behaviour import Behaviour, Outputs

#: A difference counts if it is more than this many standard errors.
CERTAIN = 2
BASE, TUNED, TOPK, FITTED = "base", "tuned", "topk", "fitted"
#: The new base with the old delta as it was, where a delta is fitted to a new base.
OLD_DELTA = "old_delta"


@dataclass(frozen=True)
class Share:
    """The share of a fine-tune's gain that a model keeps: (base - model) / (base - fine-tune), by their losses.

    Attributes:
        kept: the share; 1 is as good as the fine-tune, 0 as the base.
        error: its standard error, over examples on which all models are measured.
    """

    kept: float
    error: float

    def __str__(self) -> str:
        return f"{self.kept:.1%} (standard error {self.error:.1%})"


@dataclass(frozen=True)
class Gain:
    """Losses on held-out examples, and what follows from them.

    Attributes:
        measure: what the losses are, in words.
        is_own: whether they are losses of the examples; or else they tell how far a model is from the fine-tune.
        examples: how many examples they are measured on.
        losses: mean loss of the base, of the fine-tune ("tuned"), of plain top-k and of the fit; and of the old delta,
            if there is one.
        shares: shares of the gain that these keep, without the base; empty if the fine-tune gains nothing here.
        worse_than: those of base, top-k and old delta than which the fit is worse, by more than two standard errors.
    """

    measure: str
    is_own: bool
    examples: int
    losses: dict[str, float]
    shares: dict[str, Share]
    worse_than: tuple[str, ...]

    @classmethod
    def of(cls, measure: str, is_own: bool, losses: Mapping[str, Tensor], weights: Tensor) -> Gain:
        """From the losses of each example [n] by model: sums, of tokens for example, whose number is the weight [n]."""
        doubles = {state: loss.double() for state, loss in losses.items()}
        gain = doubles[BASE] - doubles[TUNED]
        shares = {}
        others = [state for state in (TOPK, OLD_DELTA) if state in doubles]
        if is_positive(gain):
            shares = {state: _share(doubles[BASE] - doubles[state], gain) for state in (*others, FITTED)}
        worse = tuple(state for state in (BASE, *others) if is_positive(doubles[FITTED] - doubles[state]))
        total = float(weights.double().sum())
        means = {state: float(loss.sum()) / total for state, loss in doubles.items()}
        return cls(measure, is_own, len(gain), means, shares, worse)

    @property
    def kept(self) -> Share | None:
        """The share of the gain that the fit keeps; None if the fine-tune gains nothing on these examples."""
        return self.shares.get(FITTED)

    @property
    def share_of(self) -> str:
        """What a share is one of."""
        return "the fine-tune's gain" if self.is_own else "the way from the base to the fine-tune"

    @property
    def nothing(self) -> str:
        """That the fine-tune gains nothing, in words."""
        return (
            f"the fine-tune gains nothing on {self.examples} examples held out ({self.measure}:"
            f" {self.losses[TUNED]:.4g}, the base's {self.losses[BASE]:.4g})"
        )

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return asdict(self)

    @property
    def metadata(self) -> dict[str, str]:
        """Metadata of the file."""
        names = {FITTED: "loss", BASE: "loss_base", TUNED: "loss_tuned", TOPK: "loss_topk", OLD_DELTA: "loss_old_delta"}
        key = "gain_kept" if self.is_own else "agreement_kept"
        return {
            key: str(self.kept) if self.kept else f"unknown, as {self.nothing}",
            **{name: f"{self.losses[state]:.6g}" for state, name in names.items() if state in self.losses},
            "loss_measure": f"{self.measure}, {self.examples} examples held out",
        }


class Evidence:
    """Gathers what a gain is computed from, while models run on held-out examples.

    Args:
        behaviour: the behaviour that is fitted.
    """

    def __init__(self, behaviour: Behaviour) -> None:
        self._behaviour = behaviour
        self._found: dict[str, list[Tensor]] = {}

    def add(self, state: str, part: Sequence[int], outputs: Outputs) -> None:
        """Takes the outputs of a model on a batch; every model has to get the same batches in the same order."""
        if self._behaviour.example_loss is not None:
            self._found.setdefault(state, []).append(self._behaviour.evidence(part, outputs))

    def gain(self) -> Gain | None:
        """The gain; None if the behaviour knows no loss of examples, or nothing in them is predicted."""
        loss = self._behaviour.example_loss
        if loss is None:
            return None
        known = {state: torch.cat(parts) for state, parts in self._found.items()}
        weights = loss.weights(known[TUNED])
        return Gain.of(loss.measure, loss.is_own, loss.of(known), weights) if weights.any() else None


def is_positive(differences: Tensor) -> bool:
    """Whether the mean of paired differences [n] is above zero by more than two standard errors."""
    number = len(differences)
    if number < 2 or not bool(differences.isfinite().all()):
        return False
    return bool(differences.mean() > CERTAIN * differences.std() / number**0.5)


def _share(part: Tensor, whole: Tensor) -> Share:
    """The ratio of two sums over the same examples [n], with the standard error of a ratio estimator."""
    ratio = float(part.sum() / whole.sum())
    number = len(whole)
    left = (part - ratio * whole).square().sum() * number / (number - 1)
    return Share(ratio, float(left.sqrt() / whole.sum().abs()))
