"""Which elements of a model in memory each tensor of its checkpoint holds.

transformers' own code for saving takes stacked and concatenated weights apart and puts split ones together.  It is run
on tensors whose copies are recorded instead of made, so that the elements of every result can be followed back.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from shiradelta.models.memory import is_sharded, own_part
from shiradelta.models.names import Shape
from shiradelta.models.peft import BASE_LAYER
from shiradelta.models.refusals import PLAIN
from shiradelta.models.views import Box, View, whole_view


@dataclass(frozen=True)
class SavedTensor:
    """A tensor as the library saves it.

    Attributes:
        name: its name in the checkpoint.
        shape: its shape there.
        parts: (name of a weight in memory, the elements that it has); None if the library computes elements anew.
        turns: two dimensions that the library exchanges on loading where they are stored the other way round.
    """

    name: str
    shape: Shape
    parts: tuple[tuple[str, View], ...] | None
    turns: tuple[int, int] | None = None

    @property
    def renamed(self) -> str | None:
        """The weight in memory that is the same, element by element; None if there is none."""
        if self.parts is None or len(self.parts) != 1:
            return None
        name, view = self.parts[0]
        return name if view.is_same else None

    @property
    def turned(self) -> SavedTensor | None:
        """The tensor as the library reads it too, with two dimensions exchanged; None if it does not."""
        if self.renamed is None or self.turns is None or not self.parts:
            return None
        ((weight, view),) = self.parts
        other = view.turned(self.turns)
        return None if other.shape == self.shape else SavedTensor(self.name, other.shape, ((weight, other),))


def saved_tensors(model: Any) -> Iterator[SavedTensor]:
    """The tensors that transformers would save of each of its models within a torch module.

    There are none for a model of another library, of transformers before version 5, or with wrapped tensors.
    A model without weights, on the meta device, is as good as one with; of DTensors only the whole shapes count.
    """
    if "transformers" not in sys.modules:
        return
    try:
        from transformers import PreTrainedModel
        from transformers.core_model_loading import revert_weight_conversion
    except ModuleNotFoundError:  # versions before 5.0 load weights as they are
        return
    roots: list[tuple[str, Any]] = []
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and not any(path.startswith(root) for root, _ in roots):
            roots.append((path + "." if path else "", module))
    for prefix, root in roots:
        stand_ins: dict[int, Any] = {}
        own = {name: _whole(tensor, stand_ins) for name, tensor in root.state_dict(keep_vars=True).items()}
        if any(type(tensor).__name__ not in PLAIN for tensor in own.values()):
            continue
        copies = _Copies()
        with _recording(copies):  # layers that PEFT wraps are converted under their own names
            bare = {name.replace(BASE_LAYER, "."): tensor.detach() for name, tensor in own.items()}
            saved = revert_weight_conversion(root, bare)
        turns = _turns(root)
        weights: dict[int, list[tuple[str, Any]]] = {}
        for name, tensor in own.items():
            weights.setdefault(_storage(tensor), []).append((name, tensor))
        # Of tied tensors, those that the library leaves out come last.
        tied = getattr(root, "all_tied_weights_keys", None) or {}
        left_out = {id(tensor) for name, tensor in bare.items() if name in tied}
        for name, tensor in sorted(saved.items(), key=lambda item: id(item[1]) in left_out):
            parts = _parts(name, tensor, weights, copies)
            named = None if parts is None else tuple((prefix + weight, view) for weight, view in parts)
            yield SavedTensor(prefix + name, tuple(tensor.shape), named, turns(name))


def _whole(tensor: Any, stand_ins: dict[int, Any]) -> Any:
    """A tensor, or for a DTensor one of its whole shape without elements; names of one DTensor have the same."""
    if not is_sharded(tensor):
        return tensor
    shape, dtype = tuple(tensor.shape), tensor.dtype
    return stand_ins.setdefault(id(tensor), own_part(tensor).new_empty(shape, dtype=dtype, device="meta"))


def _turns(root: Any) -> Callable[[str], tuple[int, int] | None]:
    """Name in the checkpoint -> two dimensions that the library exchanges on loading if the shape asks for it."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import Transpose

    mapping = getattr(root, "_weight_conversions", None) or get_model_conversion_mapping(root, add_legacy=False)
    found = []
    for conversion in mapping:
        operations: list[Any] = getattr(conversion, "operations", [])
        if (
            len(operations) == 1
            and isinstance(operations[0], Transpose)
            and getattr(operations[0], "check_dims", False)
        ):
            # A copy, because a conversion remembers that it was used.
            found.append((deepcopy(conversion), (operations[0].dim0, operations[0].dim1)))

    def turns(name: str) -> tuple[int, int] | None:
        return next((dims for one, dims in found if one.rename_source_key(name)[1] is not None), None)

    return turns


#: Pairs of tensors of one shape: elements of a source, and the same elements in a tensor that was made of it.
_Pairs = list[tuple[Any, Any]]


class _Copies:
    """Copies that were not made: storage of a result -> (result, a function that pairs sources with a result)."""

    def __init__(self) -> None:
        self.made: dict[int, tuple[Any, Callable[[Any], _Pairs]]] = {}

    def record(self, shape: Sequence[int], like: Any, pairs: Callable[[Any], _Pairs]) -> Any:
        """A tensor without elements that stands for a copy; it is kept, so that no other gets its storage's number."""
        result = like.new_empty(tuple(shape), device="meta")
        self.made[_storage(result)] = result, pairs
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
        views = list(found[name].values())
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
    for weight, own in weights.get(_storage(tensor), []):
        if _place(own) == _place(tensor):  # whatever its strides
            return [(weight, whole_view(name, shape))]
    parts = []
    for part, stored in _sources(tensor, tensor.new_empty(shape, device="meta"), weights, copies) or ():
        found = _holder(part, weights[_storage(part)])
        repeats = any(size > 1 and not stride for size, stride in zip(part.shape, part.stride(), strict=True))
        if found is None or repeats:
            return None
        weight, holder = found
        box = Box(tuple(part.shape), tuple(part.stride()), part.storage_offset() - holder.storage_offset())
        parts.append((weight, View(name, shape, box, _box(stored), holder.numel())))
    return parts or None


def _sources(tensor: Any, stored: Any, weights: Collection[int], copies: _Copies) -> _Pairs | None:
    """Pairs pieces of weights with a saved tensor, whose elements `tensor` has; None if that cannot be told.

    Args:
        tensor: elements of a weight or of a copy.
        stored: the same elements in the saved tensor.
        weights: the weights' storages.
        copies: what was copied.
    """
    if _storage(tensor) in weights:
        return [(tensor, stored)]
    if _storage(tensor) not in copies.made:
        return None
    copy, pairs = copies.made[_storage(tensor)]
    try:
        whole = tensor.is_contiguous() and tensor.numel() == copy.numel()
        found = pairs(stored.view(copy.shape)) if whole else _cut(tensor, stored, pairs(copy))
    except RuntimeError:  # no view has the elements in this order
        return None
    deeper = [_sources(source, piece, weights, copies) for source, piece in found or ()]
    return None if not deeper or None in deeper else [pair for some in deeper for pair in some or ()]


def _cut(tensor: Any, stored: Any, pairs: _Pairs) -> _Pairs | None:
    """Pairs the sources of a copy with a saved tensor that has some of the copy's elements, in another order.

    Args:
        tensor: a view of the copy.
        stored: the same elements in the saved tensor.
        pairs: the copy's sources, and where it has them.
    """
    for dim in sorted(range(tensor.dim()), key=lambda dim: int(tensor.shape[dim])):
        found: list[tuple[int, int, int]] = []  # (number of the source, first index, index after the last one)
        for i in range(tensor.shape[dim]):
            fits = (n for n, pair in enumerate(pairs) if _moved(tensor.narrow(dim, i, 1), *pair) is not None)
            number = next(fits, None)
            if number is None:
                break
            first = found.pop()[1] if found and found[-1][0] == number else i
            found.append((number, first, i + 1))
        else:
            cut = [((dim, first, stop - first), pairs[number]) for number, first, stop in found]
            moved = [(_moved(tensor.narrow(*where), *pair), stored.narrow(*where)) for where, pair in cut]
            if all(source is not None for source, _ in moved):
                return moved
    return None


def _moved(tensor: Any, source: Any, region: Any) -> Any:
    """The elements of a source that a view of a copy has; None if not all of them lie in the source's region."""
    dims = sorted((dim for dim in range(region.dim()) if region.shape[dim] > 1), key=lambda dim: -region.stride(dim))

    def along(distance: int) -> list[int] | None:
        """A distance in the copy, as steps along the region's dimensions."""
        steps = [0] * region.dim()
        for dim in dims:
            steps[dim], distance = divmod(distance, region.stride(dim))
        return None if distance else steps

    start = along(tensor.storage_offset() - region.storage_offset())
    ways = [along(stride if size > 1 else 0) for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    if start is None or None in ways or min(start, default=0) < 0:
        return None
    last = list(start)
    for size, way in zip(tensor.shape, ways, strict=True):
        last = [at + step * (size - 1) for at, step in zip(last, way or (), strict=True)]
    if any(at >= size for at, size in zip(last, region.shape, strict=True)):
        return None

    def reach(steps: Sequence[int]) -> int:
        return sum(step * stride for step, stride in zip(steps, source.stride(), strict=True))

    strides = [reach(way or ()) for way in ways]
    return source.as_strided(tensor.shape, strides, source.storage_offset() + reach(start))


def _place(tensor: Any) -> tuple[Any, ...]:
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()


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
