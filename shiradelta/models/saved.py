"""Which elements of a model in memory each tensor of its checkpoint holds.

transformers' own code for saving takes stacked and concatenated weights apart and puts split ones together.  It is run
on tensors whose copies are recorded instead of made, so that the elements of every result can be followed back.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from shiradelta.models.names import Shape
from shiradelta.models.peft import BASE_LAYER
from shiradelta.models.refusals import PLAIN
from shiradelta.models.views import Box, View, contiguous, whole_view


@dataclass(frozen=True)
class SavedTensor:
    """A tensor as the library saves it.

    Attributes:
        name: its name in the checkpoint.
        shape: its shape there.
        parts: (name of a weight in memory, the elements that it has); None if the library computes elements anew.
    """

    name: str
    shape: Shape
    parts: tuple[tuple[str, View], ...] | None

    @property
    def renamed(self) -> str | None:
        """The weight in memory that is the same, element by element; None if there is none."""
        if self.parts is None or len(self.parts) != 1:
            return None
        name, view = self.parts[0]
        return name if view.is_same else None


def saved_tensors(model: Any) -> Iterator[SavedTensor]:
    """The tensors that transformers would save of each of its models within a torch module.

    There are none for a model of another library, of transformers before version 5, or with wrapped tensors.
    A model without weights, on the meta device, is as good as one with.
    """
    if "transformers" not in sys.modules:
        return
    try:
        from transformers import PreTrainedModel
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # versions before 5.0 load weights as they are
        return
    roots: list[tuple[str, Any]] = []
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and not any(path.startswith(root) for root, _ in roots):
            roots.append((path + "." if path else "", module))
    for prefix, root in roots:
        own = root.state_dict(keep_vars=True)
        if any(type(tensor).__name__ not in PLAIN for tensor in own.values()):
            continue
        copies = _Copies()
        with _recording(copies):
            saved = revert_weight_conversion(root, {name: tensor.detach() for name, tensor in own.items()})
        weights: dict[int, list[tuple[str, Any]]] = {}
        for name, tensor in own.items():
            weights.setdefault(_storage(tensor), []).append((name, tensor))
        for name, tensor in saved.items():
            parts = _parts(name, tensor, weights, copies)
            named = None if parts is None else tuple((prefix + weight, view) for weight, view in parts)
            yield SavedTensor(prefix + name, tuple(tensor.shape), named)


class _Copies:
    """Copies that were not made: storage of a result -> (tensor, the part of the result that it fills)."""

    def __init__(self) -> None:
        self.made: dict[int, list[tuple[Any, Any]]] = {}
        self._results: list[Any] = []  # keeps the storages alive, so that no other gets the same number

    def record(self, shape: Sequence[int], like: Any, fill: Callable[[Any], list[tuple[Any, Any]]]) -> Any:
        """A tensor without elements that stands for a copy."""
        result = like.new_empty(tuple(shape), device="meta")
        self._results.append(result)
        self.made[_storage(result)] = fill(result)
        return result


def stored_views(model: Any, weights: Mapping[str, Any]) -> dict[str, list[View]]:
    """Finds where the checkpoint has the elements of weights.

    Args:
        model: a torch module.
        weights: contiguous weights of it, by name.

    Returns:
        A weight's name -> its elements in tensors of the checkpoint; the weight itself where these are not known.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    names = {id(weight): name for name, weight in weights.items()}
    found: dict[str, dict[Box, View]] = {name: {} for name in weights}
    for saved in saved_tensors(model):
        for weight, view in saved.parts or ():
            if (name := names.get(id(own.get(weight)))) is not None:
                found[name].setdefault(view.weight, view)
    result = {}
    for name, weight in weights.items():
        views = [replace(view, name=view.name.replace(BASE_LAYER, ".")) for view in found[name].values()]
        whole = sum(view.weight.numel for view in views) == weight.numel()
        result[name] = views if whole else [whole_view(name.replace(BASE_LAYER, "."), tuple(weight.shape))]
    return result


def _storage(tensor: Any) -> int:
    number: int = tensor.untyped_storage()._cdata
    return number


def _parts(
    name: str, tensor: Any, weights: dict[int, list[tuple[str, Any]]], copies: _Copies
) -> list[tuple[str, View]] | None:
    """The weights that a saved tensor was made of; None if that cannot be told."""
    shape = tuple(tensor.shape)
    if _storage(tensor) in weights:
        sources = [(tensor, contiguous(shape))]
    elif _storage(tensor) in copies.made and tensor.is_contiguous() and not tensor.storage_offset():
        sources = [(part, _box(region)) for part, region in copies.made[_storage(tensor)]]
    else:
        return None
    parts = []
    for part, stored in sources:
        found = _holder(part, weights.get(_storage(part), []))
        if found is None:
            return None
        weight, holder = found
        box = Box(tuple(part.shape), tuple(part.stride()), part.storage_offset() - holder.storage_offset())
        parts.append((weight, View(name, shape, box, stored, holder.numel())))
    return parts


def _box(tensor: Any) -> Box:
    return Box(tuple(tensor.shape), tuple(tensor.stride()), tensor.storage_offset())


def _holder(part: Any, weights: list[tuple[str, Any]]) -> tuple[str, Any] | None:
    """The weight that a view lies in; layers such as torch's LSTM keep several in one storage."""
    for name, weight in weights:
        start = part.storage_offset() - weight.storage_offset()
        if weight.is_contiguous() and weight.dtype == part.dtype and 0 <= start < max(weight.numel(), 1):
            return name, weight
    return None


def _recording(copies: _Copies) -> Any:
    """A context in which copies are recorded instead of made."""
    import torch
    from torch import Tensor
    from torch.overrides import TorchFunctionMode

    def joined(tensors: Sequence[Tensor], dim: int = 0) -> Any:
        sizes = [tensor.shape[dim] for tensor in tensors]
        shape = list(tensors[0].shape)
        shape[dim] = sum(sizes)
        return copies.record(
            shape, tensors[0], lambda result: list(zip(tensors, result.split(sizes, dim), strict=True))
        )

    def stacked(tensors: Sequence[Tensor], dim: int = 0) -> Any:
        return joined([tensor.unsqueeze(dim) for tensor in tensors], dim)

    def reshaped(tensor: Tensor, *shape: Any) -> Any:
        wanted = tuple(shape[0]) if shape and not isinstance(shape[0], int) else shape
        try:
            return tensor.view(wanted)
        except RuntimeError:  # takes a copy
            like = torch.empty(tensor.shape, device="meta").view(wanted)
            return copies.record(like.shape, tensor, lambda result: [(tensor, result.view(tensor.shape))])

    instead: dict[Any, Callable[..., Any]] = {
        Tensor.contiguous: lambda tensor, *_, **__: tensor,
        Tensor.clone: lambda tensor, *_, **__: tensor,
        Tensor.reshape: reshaped,
        torch.reshape: reshaped,
        torch.cat: joined,
        torch.stack: stacked,
    }

    class Recording(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return instead.get(function, function)(*args, **(kwargs or {}))

    return Recording()
