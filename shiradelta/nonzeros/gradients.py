"""Autograd functions whose backward passes keep a weight's gradient at its nonzeros and discard the rest.

A backward pass makes the dense gradient of one weight, a few rows at a time, and gathers it at the positions.

Sampled products, which compute the gradient at the positions alone, do not pay at the densities of adapters.  At 1 %,
each tile of 128 x 128 has about 160 nonzeros, so both operands are read in full anyway.  Gathering two columns of 4,096
tokens moves 16 KB per nonzero: 5 microseconds per thousand nonzeros at an H100's 3.3 TB/s.  The dense product of a
4096 x 4096 layer takes 0.2 ms: about 1 microsecond per thousand.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from shiradelta.errors import DeltaError
from shiradelta.nonzeros.weight import WeightNonzeros


class LinearFunction(torch.autograd.Function):
    """A linear layer.  `transposed` if the weight is stored as [in, out], as Conv1D does."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        nonzeros: WeightNonzeros,
        transposed: bool,
    ) -> Tensor:
        # FSDP gathers a weight for one pass, and gathers it without the values again for the backward pass.
        ctx.temporary = weight is not nonzeros.parameter
        ctx.save_for_backward(x, weight, values if ctx.temporary else None)
        ctx.nonzeros, ctx.transposed = nonzeros, transposed
        matrix = weight.to(x.dtype)
        outputs = nn.functional.linear(x.reshape(-1, x.shape[-1]), matrix.T if transposed else matrix, bias)
        # A view of the outputs could not be changed in place by what follows (x += y).
        result: Tensor = torch.ops.aten._unsafe_view.default(outputs, [*x.shape[:-1], outputs.shape[-1]])
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise DeltaError(
                "second derivatives (create_graph=True) do not reach the nonzeros of linear layers; take first"
                " derivatives only"
            )
        (grad,) = grads
        x, weight, values = ctx.saved_tensors
        if ctx.temporary:
            ctx.nonzeros.write(values, weight)
        outputs, inputs = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        left, right = (inputs, outputs) if ctx.transposed else (outputs, inputs)
        found = ctx.nonzeros.gather(lambda start, stop: left[:, start:stop].T @ right)
        if not torch.compiler.is_compiling():
            ctx.nonzeros.written = None
        back = None
        if ctx.needs_input_grad[0]:
            matrix = weight.to(grad.dtype)
            back = grad @ (matrix.T if ctx.transposed else matrix)
        return back, found, None, outputs.sum(0) if ctx.needs_input_grad[3] else None, None, None


class EmbeddingFunction(torch.autograd.Function):
    """An embedding.  A batch uses few rows of the table, and only their gradients are made."""

    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, values: Tensor, weight: Tensor, padding: int | None, nonzeros: WeightNonzeros
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.padding, ctx.nonzeros = padding, nonzeros
        return nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (ids,) = grads, ctx.saved_tensors
        nonzeros: WeightNonzeros = ctx.nonzeros
        used, inverse = ids.reshape(-1).unique(return_inverse=True)
        positions = nonzeros.positions.long()
        nonzeros.written = None
        if not len(used):
            return None, torch.zeros(len(positions), dtype=torch.float32, device=grad.device), None, None, None
        sums = torch.zeros(len(used), grad.shape[-1], dtype=torch.float32, device=grad.device)
        sums.index_add_(0, inverse, grad.reshape(-1, grad.shape[-1]).float())
        if ctx.padding is not None:
            sums[used == ctx.padding] = 0
        rows, columns = positions // nonzeros.columns, positions % nonzeros.columns
        at = torch.searchsorted(used, rows).clamp(max=len(used) - 1)
        return None, nonzeros.masked(torch.where(used[at] == rows, sums[at, columns], 0)), None, None, None


class AliasFunction(torch.autograd.Function):
    """The weight itself, for any other use; its whole dense gradient is made before it is gathered."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, nonzeros: WeightNonzeros) -> Tensor:
        ctx.nonzeros = nonzeros
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        nonzeros: WeightNonzeros = ctx.nonzeros
        grad = grads[0] if nonzeros.spread is None else nonzeros.spread.gradient(grads[0])
        matrix = grad.reshape(-1, max(nonzeros.columns, 1))
        found = nonzeros.gather(lambda start, stop: matrix[start:stop])
        if not torch.compiler.is_compiling():
            nonzeros.written = None
        return found, None, None
