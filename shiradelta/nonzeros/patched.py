"""Patched modules: forward passes use weights that hold base + values, backward passes reach the values only.

A forward pass uses the weights in place, with the values written in; nothing is cloned.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from shiradelta.errors import DeltaError, TargetError
from shiradelta.models.layers import is_conv1d
from shiradelta.models.memory import is_sharded
from shiradelta.nonzeros.gradients import AliasFunction, EmbeddingFunction, LinearFunction
from shiradelta.nonzeros.weight import WeightNonzeros

#: (module, name of its weight) -> (values [n] that take the gradients, the weight's nonzeros).
NonzerosOf = Callable[[nn.Module, str], tuple[Tensor, WeightNonzeros]]


def patch(model: nn.Module, weights: Mapping[nn.Parameter, NonzerosOf]) -> None:
    """Makes weights pass their gradients on to nonzeros, whatever module uses them, until `unpatch`.

    A module that holds such a weight gets a class derived from its own, in which the weight is a property.
    Parameters, names and the state dict stay as they were.
    """
    for module in model.modules():
        own = {name: weights[p] for name, p in module._parameters.items() if p is not None and p in weights}
        if own:
            module.__dict__["_nonzeros"] = own
            module.__class__ = _derived(type(module), tuple(own))  # type: ignore[arg-type]


def unpatch(modules: Iterable[nn.Module]) -> None:
    """Undoes `patch` in the modules that are patched."""
    for module in modules:
        if is_patched(module):
            module.__class__ = type(module).__mro__[1]
            del module.__dict__["_nonzeros"]


def is_patched(module: nn.Module) -> bool:
    """Whether a module has weights that pass their gradients on to nonzeros."""
    return "_nonzeros" in module.__dict__


@cache
def _derived(kind: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    members: dict[str, Any] = {name: _property(name) for name in names}
    members["register_parameter"] = _register
    if "weight" in names:
        if kind is nn.Linear or (is_conv1d(kind) and kind.__module__ == "transformers.pytorch_utils"):
            members["forward"] = _linear_forward
        elif kind is nn.Embedding:
            members["forward"] = _embedding_forward
    return type(kind.__name__, (kind,), {**members, "__module__": kind.__module__, "__reduce_ex__": _reduce})


def _reduce(module: nn.Module, protocol: Any) -> Any:
    """Restores a copied or pickled module; pickle cannot find its derived class by name, so it is derived again."""
    kind: Any = type(module).__mro__[1]
    make, given, *state = kind.__reduce_ex__(module, protocol)
    if make is copyreg.__newobj__:  # type: ignore[attr-defined]
        make, given = _made, (kind, tuple(module._nonzeros), *given[1:])  # type: ignore[arg-type]
    return (make, given, *state)


def _made(kind: type[nn.Module], names: tuple[str, ...], *given: Any) -> nn.Module:
    made = _derived(kind, names)  # type: ignore[arg-type]
    return made.__new__(made, *given)


def _property(name: str) -> property:
    def get(module: nn.Module) -> Tensor:
        weight, values, nonzeros = _current(module, name)
        part = nonzeros.part(weight)
        if not torch.is_grad_enabled() or not values.requires_grad or part is None:
            return weight
        if part is nonzeros.parameter:
            result: Tensor = AliasFunction.apply(values, weight, nonzeros)  # type: ignore[no-untyped-call]
            return result
        # FSDP gathered the weight for this pass only; the backward pass would read it without the values.
        total = nonzeros.total(values).to(weight.dtype)
        changed = part.reshape(-1).index_put([nonzeros.positions.long()], total).view_as(part)
        return changed if part is weight or nonzeros.spread is None else nonzeros.spread.like(weight, changed)

    return property(get)


def _register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    """Registers a parameter, but not the DTensor that `parallelize_module` puts in the place of another one.

    Raises:
        TargetError: it is.
    """
    if is_sharded(parameter) and not is_sharded(module._parameters.get(name)):
        raise TargetError(
            f"parameter {name!r} is in a layer with values that are trained, so it cannot be made tensor parallel;"
            " detach() the tuner, call parallelize_module on a model that was loaded again, and attach to that"
        )
    type(module).__mro__[1].register_parameter(module, name, parameter)  # type: ignore[attr-defined]


def _linear_forward(module: nn.Module, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return _plain(module, x)
    weight, values, nonzeros = _current(module, "weight")
    if nonzeros.spread is not None:
        return _plain(module, x)
    bias: Tensor | None = module.bias  # type: ignore[assignment]
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
        bias = None if bias is None else bias.to(x.dtype)
    result: Tensor = LinearFunction.apply(x, values, weight, bias, nonzeros, is_conv1d(module))  # type: ignore[no-untyped-call]
    return result


def _embedding_forward(module: nn.Embedding, ids: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return _plain(module, ids)
    weight, values, nonzeros = _current(module, "weight")
    if module.max_norm is not None or module.scale_grad_by_freq:
        raise DeltaError("an embedding with max_norm or scale_grad_by_freq rewrites its weights; switch that off")
    # Tracing does not know which rows a batch uses, and a part of a table does not have all of them.
    if torch.compiler.is_compiling() or nonzeros.spread is not None:
        return nn.functional.embedding(ids, module.weight, module.padding_idx)
    padding = module.padding_idx
    result: Tensor = EmbeddingFunction.apply(ids, values, weight, padding, nonzeros)  # type: ignore[no-untyped-call]
    return result


def _plain(module: nn.Module, x: Tensor) -> Tensor:
    """The forward pass of the module's own class."""
    result: Tensor = type(module).__mro__[1].forward(module, x)  # type: ignore[attr-defined]
    return result


def _current(module: nn.Module, name: str) -> tuple[Tensor, Tensor, WeightNonzeros]:
    """A module's weight with the values written in, the values, and the weight's nonzeros."""
    weight = module._parameters[name]
    values, nonzeros = module._nonzeros[name](module, name)  # type: ignore[index, operator]
    assert weight is not None
    part = nonzeros.part(weight)
    if not torch.compiler.is_compiling() and part is not None:
        nonzeros.refresh(part, values)
    return weight, values, nonzeros
