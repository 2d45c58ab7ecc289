"""A masked direction with a length for each row: SHiRA-DoRA (arXiv:2407.16712, arXiv:2402.09353).

DoRA trains a weight as m (W + D) / |W + D|, with a length m for each row.  Here D has nonzeros at a mask's positions
only, and so has the change: an element of the mask becomes m (W + D) / |W + D|, and any other element stays W.  The
length of a row is that of all its elements, inside the mask and outside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shiradelta.nonzeros.scaling import Scaling
from shiradelta.nonzeros.weight import CHUNK, WeightNonzeros, flat


class RowMagnitudes(Scaling):
    """The lengths of the rows of one weight; the scales are what training adds to them, [rows], zero at first.

    Args:
        nonzeros: of the weight.
        weight: the weight, which holds the base.
        columns: elements of a row.
        by_column: whether the lengths are those of columns: a weight stored as [in, out] has its outputs there.
    """

    name = "magnitudes"

    def __init__(self, nonzeros: WeightNonzeros, weight: Tensor, columns: int, by_column: bool) -> None:
        self._nonzeros, self._columns, self._by_column = nonzeros, columns, by_column
        self.move(weight)

    def move(self, weight: Tensor) -> None:
        """Computes the squared length that is outside of the mask, in float64."""
        nonzeros, matrix = self._nonzeros, flat(weight).view(-1, self._columns)
        count = self._columns if self._by_column else len(matrix)
        groups = self._groups()
        self._lengths = torch.bincount(groups, minlength=count)
        # Sums are taken of neighbours, so that they do not depend on the order of threads.
        self._order = groups.argsort(stable=True) if self._by_column else None
        squares = torch.zeros(count, dtype=torch.float64, device=weight.device)
        step = max(1, CHUNK // self._columns)
        for first in range(0, len(matrix), step):
            part = matrix[first : first + step].double().square_()
            if self._by_column:
                squares += part.sum(0)
            else:
                squares[first : first + step] = part.sum(1)
        inside = self._sums(nonzeros.base.double().square())
        self._outside = (squares - inside).clamp_(min=0).float()
        base = nonzeros.base.float()
        self._start = self._norms(base)

    def _groups(self) -> Tensor:
        """The row of each nonzero; its column if the lengths are those of columns."""
        positions = self._nonzeros.positions.long()
        return positions % self._columns if self._by_column else positions // self._columns

    def _sums(self, numbers: Tensor) -> Tensor:
        """Sums of numbers at the nonzeros, by row."""
        ordered = numbers if self._order is None else numbers[self._order]
        return torch.segment_reduce(ordered, "sum", lengths=self._lengths, unsafe=True, initial=0)

    def _norms(self, direction: Tensor) -> Tensor:
        """Lengths of the rows with a direction [n] at the nonzeros."""
        return (self._outside + self._sums(direction.square())).sqrt_()

    def start(self) -> Tensor:
        """Zeros: the rows have their own lengths."""
        return torch.zeros_like(self._start)

    @property
    def unit(self) -> float:
        """The root mean square of the rows' lengths."""
        return float(self._start.square().mean().sqrt()) or 1.0

    def scales_at(self, values: Tensor) -> Tensor:
        """How much longer the rows are with the values than those of the base."""
        self._follow(values)
        return self._norms(self._nonzeros.base.float() + values) - self._start

    def changes(self, values: Tensor, scales: Tensor) -> Tensor:
        """m / |W + D| (W + D) - W at the nonzeros."""
        if not torch.compiler.is_compiling():
            self._follow(values)
        found: Tensor = _Changes.apply(values, scales, self)  # type: ignore[no-untyped-call]
        return found

    def _follow(self, other: Tensor) -> None:
        if self._start.device != other.device:
            self._nonzeros.follow(other)
            self._start, self._outside = self._start.to(other.device), self._outside.to(other.device)
            self._lengths = self._lengths.to(other.device)
            self._order = None if self._order is None else self._order.to(other.device)


class _Changes(torch.autograd.Function):
    """The changes, and their exact gradients: the length of a direction is no constant, as in DoRA's shortcut."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, scales: Tensor, rows: RowMagnitudes) -> Tensor:
        base = rows._nonzeros.base.float()
        norms = rows._norms(base + values)
        # A row of zeros has no direction; it trains as without lengths.
        factors = torch.where(norms > 0, (rows._start + scales) / norms, 1)
        ctx.save_for_backward(values, norms, factors)
        ctx.rows = rows
        own = factors[rows._groups()]
        # Not as one product: the factor is 1 at first, and then the change is the values, whatever the base.
        return (own - 1) * base + own * values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (values, norms, factors) = grads, ctx.saved_tensors
        rows: RowMagnitudes = ctx.rows
        direction, groups = rows._nonzeros.base.float() + values, rows._groups()
        inverse = torch.where(norms > 0, 1 / norms, 0)
        along = rows._sums(grad * direction) * inverse
        back = factors[groups] * grad - direction * (factors * along * inverse)[groups]
        return back, along, None
