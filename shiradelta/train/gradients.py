"""Gradients over a calibration set, summed weight by weight while they are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shiradelta.errors import DeltaError, ShiraDeltaError

#: Bytes of sums that are kept at a time: one pass over the calibration set for as many weights as fit.
SUMS = 2 << 30

#: loss(model, batch) -> scalar.
Loss = Callable[[nn.Module, Any], Tensor]
Tell = Callable[[str, int, int], None]


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss that the model itself computes, as those of transformers do of batches with labels.

    Raises:
        DeltaError: it gives none.
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
    tell: Tell,
    all_needed: bool = True,
) -> Iterator[tuple[str, Tensor]]:
    """(name, magnitudes of a weight's gradient summed over the batches, flat, float32), weight by weight.

    A gradient is folded into its sum as soon as it is there, and freed: of dense gradients there is one at a time.
    Sums are kept for as many weights as `SUMS` holds; the batches are gone through once for each such group.  In a
    distributed run they are summed over all processes.

    Args:
        model: in evaluation mode while this runs.
        weights: by name; they take gradients while this runs.
        batches: what `loss` takes; tensors in them are brought to the model's device.
        loss: of a batch.
        tell: is told how far it is.
        all_needed: whether a weight that the loss does not depend on is an error, or is left out.

    Raises:
        DeltaError: no batches.
        ShiraDeltaError: a gradient that is not finite; a weight that the loss does not depend on.
    """
    if not batches:
        raise DeltaError("the calibration set is empty; give some batches of the task, or a mask without gradients")
    groups = _groups(weights)
    for number, group in enumerate(groups):
        totals = _pass(model, {name: weights[name] for name in group}, batches, loss, tell, number, len(groups))
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
    tell: Tell,
    number: int,
    count: int,
) -> dict[str, Tensor]:
    totals: dict[str, Tensor] = {}
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    training = [module for module in model.modules() if module.training]
    model.requires_grad_(False).eval()
    for module in training:
        # Where activations are made anew they have to be here, too; transformers does so in training mode alone.
        module.training = bool(getattr(module, "gradient_checkpointing", False))
    hooks, before = [], {weight: weight.grad for weight in weights.values()}
    for name, weight in weights.items():
        weight.grad = None  # what the user has there is none of the mask's
        weight.requires_grad_(True)
        hooks.append(weight.register_post_accumulate_grad_hook(partial(_fold, totals, name)))  # type: ignore[no-untyped-call]
    device = next(iter(weights.values())).device
    try:
        with torch.enable_grad():
            for done, batch in enumerate(batches):
                tell("gradients for the mask", number * len(batches) + done, count * len(batches))
                found = loss(model, to_device(batch, device))
                if found.requires_grad:  # if not, none of the weights has a part in it
                    found.backward()  # type: ignore[no-untyped-call]
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for weight, grad in before.items():
            weight.grad = grad
        for module in training:
            module.training = True
    return totals


def _fold(totals: dict[str, Tensor], name: str, weight: Tensor) -> None:
    assert weight.grad is not None
    gradient = weight.grad.to_dense() if weight.grad.is_sparse else weight.grad
    magnitude = gradient.reshape(-1).float().abs()
    if name in totals:
        totals[name] += magnitude
    else:
        totals[name] = magnitude
    weight.grad = None


def to_device(batch: Any, device: torch.device) -> Any:
    """Tensors within mappings, lists and tuples, on the device."""
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
