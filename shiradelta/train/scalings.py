"""What is trained beside the values of each weight: lengths of its rows, or a gate."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from shiradelta.errors import ArgumentError
from shiradelta.models.layers import is_conv1d
from shiradelta.nonzeros.gate import Gate
from shiradelta.nonzeros.magnitude import RowMagnitudes
from shiradelta.nonzeros.scaling import Scaling
from shiradelta.nonzeros.weight import WeightNonzeros
from shiradelta.train.choose import matrix_shape

#: (name of a weight, its nonzeros) -> its scaling; the weight holds the base.
MakeScaling = Callable[[str, WeightNonzeros], Scaling]


def magnitudes_of(model: nn.Module, weights: Mapping[str, nn.Parameter]) -> MakeScaling:
    """What makes the lengths of a weight's rows: of a convolution's outputs, of each matrix's rows in a stack.

    A row is a layer's output, so where a weight is stored as [in, out] (`Conv1D`) the lengths are those of columns.

    Raises:
        ArgumentError: a weight has no rows.
    """
    for name, weight in weights.items():
        if weight.dim() < 2:
            raise ArgumentError(
                f"tensor {name!r} of shape {list(weight.shape)} has no rows whose lengths could be trained; leave it"
                " out of the targets, or train without magnitude"
            )

    def make(name: str, nonzeros: WeightNonzeros) -> Scaling:
        weight = weights[name]
        layer = model.get_submodule(name.rpartition(".")[0])
        return RowMagnitudes(nonzeros, weight, matrix_shape(model, name, weight)[-1], is_conv1d(layer))

    return make


def gates_of(weights: Mapping[str, nn.Parameter]) -> MakeScaling:
    """What makes the gate of a weight."""
    return lambda name, nonzeros: Gate(weights[name].device)
