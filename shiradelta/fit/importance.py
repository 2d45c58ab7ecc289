"""Importance of weights by more than the magnitude of their change: times their inputs, or times their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from shiradelta.fit.behaviour import Behaviour
from shiradelta.fit.teacher import Teacher
from shiradelta.fit.tuned_weights import TunedWeights

#: (index of a target, |change| of its weights, flat) -> importance of each weight, flat.
Importance = Callable[[int, Tensor], Tensor]


class Scored(Protocol):
    """The inputs of importance scores; `shiradelta.fit.subject.Subject` has all of them."""

    model: nn.Module
    behaviour: Behaviour
    teacher: Teacher
    fitted: TunedWeights

    @property
    def calibration(self) -> Sequence[Sequence[int]]:
        """Texts by forward pass."""


def by_activation(subject: Scored) -> Importance:
    """|change| times the RMS of the input that the weight multiplies; |change| for weights of no linear layer."""
    weights = subject.fitted.weights

    def forward() -> None:
        for part in subject.calibration:
            subject.behaviour.outputs(subject.model, part)

    norms = input_norms(subject.model, weights, forward)

    def importance(index: int, magnitude: Tensor) -> Tensor:
        norm = norms.get(index)
        return magnitude if norm is None else (magnitude.view(-1, norm.numel()) * norm).reshape(-1)

    return importance


def by_gradient(subject: Scored) -> Importance:
    """|change| times the RMS of the gradient of the fitting loss at the base; |change| for buffers, which have none."""
    trained = {i: weight for i, weight in enumerate(subject.fitted.weights) if isinstance(weight, nn.Parameter)}
    gradients = rms_gradients(
        subject.model, list(trained.values()), subject.behaviour, subject.teacher, subject.calibration
    )
    found = dict(zip(trained, gradients, strict=True))
    return lambda index, magnitude: magnitude * found[index] if index in found else magnitude


def input_norms(model: nn.Module, weights: Sequence[Tensor], forward: Callable[[], None]) -> dict[int, Tensor]:
    """Index of a linear layer's weight -> RMS of each of the layer's inputs, over what `forward` runs."""
    index_of = {id(weight): index for index, weight in enumerate(weights)}
    sums: dict[int, Tensor] = {}
    rows: dict[int, int] = {}

    def hook(index: int, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not inputs:  # called by keyword, as no layer of torch is
            return
        x = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
        sums[index] = sums.get(index, torch.zeros_like(x[0])) + x.square().sum(0)
        rows[index] = rows.get(index, 0) + len(x)

    hooks = [
        module.register_forward_pre_hook(partial(hook, index_of[id(module.weight)]))
        for module in model.modules()
        if isinstance(module, nn.Linear) and id(module.weight) in index_of
    ]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in hooks:
            handle.remove()
    return {index: (total / rows[index]).sqrt() for index, total in sums.items()}


def rms_gradients(
    model: nn.Module,
    weights: Sequence[Tensor],
    behaviour: Behaviour,
    teacher: Teacher,
    parts: Iterable[Sequence[int]],
) -> list[Tensor]:
    """RMS over batches of the fitting loss's gradient at the base: one flat tensor per weight.

    Takes as much memory as the model in float32.
    """
    sums = [torch.zeros(weight.numel(), device=weight.device) for weight in weights]
    hooks = []
    for weight, total in zip(weights, sums, strict=True):
        weight.requires_grad_(True)
        hooks.append(weight.register_post_accumulate_grad_hook(partial(_add_square, total)))  # type: ignore[no-untyped-call]
    try:
        for part in parts:
            target = behaviour.target(teacher.outputs(part), part)
            behaviour.loss(part, behaviour.outputs(model, part), target).backward()  # type: ignore[no-untyped-call]
    finally:
        for handle in hooks:
            handle.remove()
        for weight in weights:
            weight.requires_grad_(False)
    return [total.sqrt_() for total in sums]


def _add_square(total: Tensor, weight: Tensor) -> None:
    assert weight.grad is not None
    total += weight.grad.reshape(-1).float().square()
    weight.grad = None
