"""Sums the gradients of each weight over a calibration set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shiradelta.errors import ArgumentError, DeltaError, ShiraDeltaError
from shiradelta.util.progress import Progress

#: Bytes of sums held at a time.  Each pass over the calibration set serves as many weights as fit.
SUMS = 2 << 30

#: loss(model, batch) -> scalar.
Loss = Callable[[nn.Module, Any], Tensor]


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss that the model itself computes, as models of transformers do for batches with labels.

    Raises:
        DeltaError: the model does not compute a loss.
    """
    if isinstance(batch, Mapping):
        result = model(**batch)
    else:
        result = model(*batch) if isinstance(batch, list | tuple) else model(batch)
    loss = result.get("loss") if isinstance(result, Mapping) else getattr(result, "loss", None)
    if not isinstance(loss, Tensor):
        raise DeltaError(
            "the model gives no loss for a calibration batch; put labels into the batches, or give"
            " loss=lambda model, batch: ..."
        )
    return loss


def sums(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    batches: Sequence[Any],
    loss: Loss,
    progress: Progress,
    all_needed: bool = True,
) -> Iterator[tuple[str, Tensor]]:
    """(name, |gradient| summed over the batches, flat, float32), weight by weight.

    A gradient is added to its sum as soon as it is made, and freed, so there is one dense gradient at a time.  `SUMS`
    limits how many weights have sums at a time; each such group takes a pass over the batches.  In a distributed run
    the sums are those over all processes.

    Args:
        model: is in evaluation mode while this runs.
        weights: by name; they take gradients while this runs.
        batches: arguments for `loss`; tensors in them are moved to the model's device.
        loss: loss(model, batch).
        progress: called with (what, done, total).
        all_needed: whether it is an error if the loss does not depend on a weight; else the weight is left out.

    Raises:
        DeltaError: there are no batches.
        ShiraDeltaError: a gradient is not finite, or the loss does not depend on a weight.
    """
    if not batches:
        raise ArgumentError("the calibration set is empty; give some batches of the task, or a mask without gradients")
    groups = _groups(weights)
    for number, group in enumerate(groups):
        totals = _pass(model, {name: weights[name] for name in group}, batches, loss, progress, number, len(groups))
        for name in group:
            total = totals.pop(name, None)
            if total is None and not all_needed:
                continue
            if total is None:
                raise ShiraDeltaError(f"tensor {name!r} has no part in the loss; leave it out of the targets")
            _sum_over_processes(total)
            if not torch.isfinite(total).all():
                raise ShiraDeltaError(
                    f"tensor {name!r} has a gradient with NaN or infinity on the calibration set; look for broken"
                    " batches (labels all masked, empty texts), or calibrate in float32 or bfloat16"
                )
            yield name, total


def _groups(weights: Mapping[str, nn.Parameter]) -> list[list[str]]:
    groups: list[list[str]] = []
    room = 0
    for name, weight in weights.items():
        if not groups or room < 4 * weight.numel():
            groups.append([])
            room = SUMS
        groups[-1].append(name)
        room -= 4 * weight.numel()
    return groups


def _pass(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    batches: Sequence[Any],
    loss: Loss,
    progress: Progress,
    number: int,
    count: int,
) -> dict[str, Tensor]:
    totals: dict[str, Tensor] = {}
    device = next(iter(weights.values())).device
    with taking_gradients(model, weights, partial(_add, totals)), torch.enable_grad():
        for done, batch in enumerate(batches):
            progress("gradients for the mask", number * len(batches) + done, count * len(batches))
            found = loss(model, to_device(batch, device))
            if found.requires_grad:  # otherwise the loss depends on none of the weights
                found.backward()  # type: ignore[no-untyped-call]
    return totals


@contextmanager
def taking_gradients(
    model: nn.Module, weights: Mapping[str, nn.Parameter], take: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Within this context, backward passes give each weight's gradient to a function, and free it.

    Args:
        model: is in evaluation mode within; its parameters' own gradients and flags are restored.
        weights: by name; they alone take gradients.
        take: take(name, gradient of the weight's shape), as soon as the gradient is made.
    """
    with frozen(model):
        hooks, before = [], {weight: weight.grad for weight in weights.values()}
        for name, weight in weights.items():
            weight.grad = None  # keep the user's gradients out of the mask
            weight.requires_grad_(True)
            hooks.append(weight.register_post_accumulate_grad_hook(partial(_give, take, name)))  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for weight, grad in before.items():
                weight.grad = grad


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within this context, a model is in evaluation mode, and no parameter takes gradients."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    training = [module for module in model.modules() if module.training]
    model.requires_grad_(False).eval()
    for module in training:
        # Gradient checkpointing is needed here, too, and transformers does it in training mode only.
        module.training = bool(getattr(module, "gradient_checkpointing", False))
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module in training:
            module.training = True


def _give(take: Callable[[str, Tensor], None], name: str, weight: Tensor) -> None:
    assert weight.grad is not None
    take(name, weight.grad.to_dense() if weight.grad.is_sparse else weight.grad)
    weight.grad = None


def _add(totals: dict[str, Tensor], name: str, gradient: Tensor) -> None:
    magnitude = gradient.reshape(-1).float().abs()
    if name in totals:
        totals[name] += magnitude
    else:
        totals[name] = magnitude


def to_device(batch: Any, device: torch.device) -> Any:
    """Moves the tensors of a batch, also in mappings, lists and tuples, to a device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        parts = [to_device(value, device) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch


def _sum_over_processes(total: Tensor) -> None:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(total)
