"""Which weights to change, by more than their magnitude."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from shiradelta.fit.behaviour import Behaviour
from shiradelta.fit.teacher import Teacher
from shiradelta.nonzeros.weight import flat


def input_norms(model: nn.Module, weights: Sequence[nn.Parameter], forward: Callable[[], None]) -> dict[int, Tensor]:
    """Index of a linear layer's weight -> rms of each of its inputs, over a forward pass."""
    index_of = {id(weight): index for index, weight in enumerate(weights)}
    sums: dict[int, Tensor] = {}
    rows: dict[int, int] = {}

    def hook(index: int, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
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
    weights: Sequence[nn.Parameter],
    behaviour: Behaviour,
    teacher: Teacher,
    parts: Iterable[Sequence[int]],
) -> list[Tensor]:
    """Flat, one a weight: rms of the fitting loss's gradient at the base over batches.  Takes a model's memory."""
    sums = [torch.zeros(weight.numel(), device=weight.device) for weight in weights]
    hooks = []
    for weight, total in zip(weights, sums, strict=True):
        weight.requires_grad_(True)
        hooks.append(weight.register_post_accumulate_grad_hook(partial(_add_square, total)))  # type: ignore[no-untyped-call]
    try:
        for part in parts:
            target = behaviour.target(teacher.outputs(part), part)
            behaviour.loss(behaviour.outputs(model, part), target).backward()  # type: ignore[no-untyped-call]
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


def by_input(delta: Tensor, weight: nn.Parameter, norms: Tensor | None) -> Tensor:
    """|delta| times the rms of the input that it multiplies; |delta| where there is no such input."""
    magnitude = delta.abs()
    return magnitude if norms is None else (magnitude.view(-1, norms.numel()) * norms).reshape(flat(weight).shape)
