"""Routes prompts to the experts of a family, in the weights of a live model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from shiradelta.errors import ArgumentError
from shiradelta.experts.family import BASE, ExpertFamily
from shiradelta.experts.features import Sketch, unit
from shiradelta.experts.gradients import NonzeroGradients
from shiradelta.format.arithmetic import Array, Float32
from shiradelta.hotswap.session import HotSwap
from shiradelta.train.gradients import Loss
from shiradelta.util.arguments import ANY, CALL, SWITCHED, WHOLE, ArgumentKind, check_least, checked
from shiradelta.util.progress import Progress

_FAMILY = ArgumentKind("an ExpertFamily, such as open_family reads", lambda value: isinstance(value, ExpertFamily))
_WEIGHTS = ArgumentKind(
    "a mapping of members to weights, such as route gives",
    lambda value: isinstance(value, Mapping) and SWITCHED.holds(value),
)


def route_weights(cosines: Array) -> Float32:
    """Weights of experts: softmax of the standardised cosines.

    Args:
        cosines: [..., experts], of a prompt to each centroid.  They are standardised over the experts: less their mean,
            over their standard deviation.  Where all are equal, all experts weigh the same.

    Returns:
        float32 [..., experts]; their sum is 1 up to rounding.
    """
    given = np.asarray(cosines, np.float64)
    centred = given - given.mean(-1, keepdims=True)
    deviation = given.std(-1, keepdims=True)
    standard = centred / np.where(deviation > 0, deviation, 1)
    powers = np.exp(standard - standard.max(-1, keepdims=True))
    result: Float32 = (powers / powers.sum(-1, keepdims=True)).astype(np.float32)
    return result


@dataclass(frozen=True)
class RoutedGroup:
    """Prompts that go to the model together.

    Attributes:
        expert: the expert that weighs most for each of them.
        indices: which prompts.
        strengths: for `HotSwap.switch`: the route of the group.
    """

    expert: str
    indices: list[int]
    strengths: dict[str, float]


class ExpertRouter:
    """Routes prompts to the experts of a family.

    A prompt's gradient at the base delta's nonzeros is compared with the centroids, which takes a forward and a
    backward pass; the experts' average then takes one switch.  While a route is found, the base delta is active.

    Args:
        model: the base model; its weights must be parameters.
        family: the family.
        prompt_loss: loss(model, [prompt]) on the prompt's tokens alone, as the family was made with.
        prompt_batch: prompts whose gradients are taken together, as `train_family` takes it.

    Attributes:
        swap: a session with the members loaded, under their names.

    Raises:
        ArgumentError: an argument is of a wrong type or out of range.
        BaseMismatchError: the family is another model's.
        SourceError: a tensor of the base delta is not a parameter of the model.
    """

    @checked(model=ANY, family=_FAMILY, prompt_loss=CALL, prompt_batch=WHOLE)
    def __init__(self, model: nn.Module, family: ExpertFamily, prompt_loss: Loss, prompt_batch: int = 1) -> None:
        check_least(1, prompt_batch=prompt_batch)
        self.family = family
        self._loss, self._batch = prompt_loss, prompt_batch
        self._sketch = Sketch(
            NonzeroGradients(model, family.path(BASE)), family.scales, family.centroids.shape[1], family.seed
        )
        self.swap = HotSwap(model)
        for name in family.digests:
            self.swap.load(name, family.path(name))

    def cosines(self, prompts: Sequence[Any], progress: Progress = lambda what, done, total: None) -> Float32:
        """Cosine of each prompt's feature to each centroid: float32 [prompts, experts]."""
        return self._features(prompts, progress) @ self.family.centroids.T

    def route(self, prompts: Sequence[Any], progress: Progress = lambda what, done, total: None) -> dict[str, float]:
        """The route of prompts that go to the model together: expert -> strength, for `swap.switch`.

        The feature of a group is the mean direction of its prompts' features.

        Raises:
            ArgumentError: there are no prompts.
            ShiraDeltaError: the gradient of a prompt is not finite, or zero.
        """
        return self._strengths(self._features(prompts, progress))

    def each(
        self, prompts: Sequence[Any], progress: Progress = lambda what, done, total: None
    ) -> list[dict[str, float]]:
        """The route of each prompt by itself."""
        return [self._strengths(feature[None]) for feature in self._features(prompts, progress)]

    def groups(self, prompts: Sequence[Any], progress: Progress = lambda what, done, total: None) -> list[RoutedGroup]:
        """Groups prompts by the expert that weighs most, so that each group takes one switch; largest group first."""
        features = self._features(prompts, progress)
        best = (features @ self.family.centroids.T).argmax(1)
        found = []
        for number, name in enumerate(self.family.experts):
            indices = np.flatnonzero(best == number)
            if indices.size:
                found.append(RoutedGroup(name, indices.tolist(), self._strengths(features[indices])))
        return sorted(found, key=lambda group: -len(group.indices))

    @checked(run=CALL, strengths=_WEIGHTS)
    def ensemble(self, run: Callable[[], Tensor], strengths: Mapping[str, float]) -> Tensor:
        """The weighted sum of outputs, as in ELREA: the members one after the other, each at strength 1.

        It takes a switch and a run for each member, where the average of their weights takes one of each.

        Args:
            run: runs the model and gives its outputs, such as logits.
            strengths: member -> weight of its outputs, as `route` gives them.

        Raises:
            ArgumentError: there are no members, one is unknown, or a weight is not finite.
        """
        odd = [f"{name} has {strength}" for name, strength in strengths.items() if not math.isfinite(strength)]
        if odd:
            raise ArgumentError(f"weights of outputs are finite numbers, and {odd[0]}; give the strengths of `route`")
        total: Tensor | None = None
        for name, strength in strengths.items():
            with self.swap.applied(name):
                part = run() * strength
            total = part if total is None else total + part
        if total is None:
            raise ArgumentError("an ensemble of no members has no outputs; give the strengths of `route`")
        return total

    def _features(self, prompts: Sequence[Any], progress: Progress) -> Float32:
        if isinstance(prompts, str) or not len(prompts):
            raise ArgumentError("give a list of one prompt or more")
        with self.swap.applied(BASE):
            return self._sketch.features(prompts, self._loss, progress, self._batch)

    def _strengths(self, features: Float32) -> dict[str, float]:
        weights = route_weights(unit(features.mean(0)) @ self.family.centroids.T)
        return dict(zip(self.family.experts, weights.tolist(), strict=True))
