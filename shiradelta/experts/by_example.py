"""Gradients of each example of a batch from one backward pass, for linear layers whose inputs have a row an example."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shiradelta.train.gradients import frozen

#: Bytes of dense gradients held at a time.
DENSE = 256 << 20

#: take(name of the weight, float32 [examples, positions]).
Take = Callable[[str, Tensor], None]


class NotByExampleError(Exception):
    """A layer's input does not have a row an example."""


def linear_layers(model: nn.Module, names: Mapping[nn.Parameter, str]) -> dict[str, nn.Linear] | None:
    """The layer of each weight; None unless all are weights of linear layers, one layer each."""
    found: dict[str, nn.Linear] = {}
    for module in model.modules():
        for own, parameter in module._parameters.items():
            if parameter is None or parameter not in names:
                continue
            name = names[parameter]
            if type(module) is not nn.Linear or own != "weight" or name in found or "forward" in module.__dict__:
                return None
            found[name] = module
    return found


@contextmanager
def gradients_by_example(
    model: nn.Module, layers: Mapping[str, nn.Linear], positions: Mapping[str, Tensor], examples: int, take: Take
) -> Iterator[None]:
    """Within this context, a backward pass gives each example's gradients at positions of the layers' weights.

    Args:
        model: as `frozen` has it within.
        layers: name of a weight -> its layer.
        positions: the same names -> int64, flat in the weight.
        examples: rows of the layers' inputs.
        take: called with the gradients; more than once for a layer that runs more than once.

    Raises:
        NotByExampleError: by the forward pass: an input has another shape, such as one with rows of several examples.
    """
    shapes: set[int] = set()
    with frozen(model):
        for name, layer in layers.items():
            # Without it, no gradient is asked of a layer after frozen ones.
            anchor = torch.zeros((), device=layer.weight.device, requires_grad=True)
            own = partial(take, name)
            layer.__dict__["forward"] = partial(_forward, layer, own, positions[name], anchor, examples, shapes)
        try:
            yield
        finally:
            for layer in layers.values():
                layer.__dict__.pop("forward", None)


def _forward(
    layer: nn.Linear,
    take: Callable[[Tensor], None],
    positions: Tensor,
    anchor: Tensor,
    examples: int,
    shapes: set[int],
    x: Tensor,
) -> Tensor:
    shapes.add(x.ndim)
    # Layers of experts get tokens, of any number, and other layers a row an example.
    if x.ndim < 2 or len(x) != examples or len(shapes) > 1:
        raise NotByExampleError
    result: Tensor = _Linear.apply(x, anchor, layer, take, positions)  # type: ignore[no-untyped-call]
    return result


class _Linear(torch.autograd.Function):
    """A linear layer; its backward pass gives the gradients of the weight away, by example."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, layer: nn.Linear, take: Any, positions: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer, ctx.take, ctx.positions = layer, take, positions
        return nn.functional.linear(x, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        weight, count = ctx.layer.weight, len(gradient)
        rows, inputs = (one.to(gradient.dtype).reshape(count, -1, one.shape[-1]) for one in (gradient, x))
        together = max(1, DENSE // (weight.numel() * gradient.element_size()))
        parts = []
        for start in range(0, count, together):
            part = slice(start, start + together)
            dense = torch.bmm(rows[part].transpose(1, 2), inputs[part])
            parts.append(dense.reshape(len(dense), -1)[:, ctx.positions].float())
        ctx.take(torch.cat(parts))
        needed = ctx.needs_input_grad[0]
        return (gradient @ weight.to(gradient.dtype)).to(x.dtype) if needed else None, None, None, None, None
