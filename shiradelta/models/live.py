"""A live model as named tensors: a torch module, or a mapping of tensors, arrays and modules.

A tensor has the module's name for it.  Where transformers stacks, concatenates or transposes on loading, the names of
the checkpoint are known too: each stands for a view of the tensor in memory, so that a position in the checkpoint's
tensor is the same position in the view.  Torch is used only if the caller has imported it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shiradelta.errors import TargetError
from shiradelta.format import registry
from shiradelta.models import peft
from shiradelta.models.refusals import CONVERTED, Refusal, RefusalKind, computed_tensors, refusal_of
from shiradelta.models.saved import SavedTensor, saved_tensors
from shiradelta.models.views import contiguous

#: (names -> tensors of a module, a name there).
Home = tuple[Mapping[str, Any], str]
#: Stands for a tensor that a model does not store.
_NOTHING = np.zeros(0, np.uint8)


@dataclass(frozen=True, eq=False)
class Target:
    """One tensor in memory, which may have several names.

    Attributes:
        name: the first of its names.
        tensor: an ndarray, or a torch tensor without gradient; it shares the model's memory.
        dtype: by torch's name; "?" if the format does not know it.
        refusal: why it cannot be written; None if it can.
        holder: the module's own tensor.
        home: where the model keeps the tensor; every switch checks that it is still there.  For a tensor without a
            module, a mapping that holds it alone.
        view: how the tensor was taken from the holder; views of one kind share no element.
        device: "cpu", "cuda:0" and so on.
        address: the holder's, when the model was read; 0 if it cannot change.
    """

    name: str
    tensor: Any
    dtype: str
    refusal: Refusal | None = None
    holder: Any = None
    home: Home = ({}, "")
    view: str = ""
    device: str = field(init=False)
    address: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", str(getattr(self.tensor, "device", "cpu")))
        still = self.refusal is not None or is_array(self.tensor)
        object.__setattr__(self, "address", 0 if still else self.holder.data_ptr())

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return tuple(self.tensor.shape)

    @property
    def memory(self) -> tuple[str, int, int]:
        """(device, first byte, byte after the last) of the range that its elements span."""
        tensor = self.tensor
        strides = tensor.strides if is_array(tensor) else [s * tensor.element_size() for s in tensor.stride()]
        itemsize = tensor.itemsize if is_array(tensor) else tensor.element_size()
        reach = [stride * (size - 1) for stride, size in zip(strides, tensor.shape, strict=True)]
        start = tensor.ctypes.data if is_array(tensor) else tensor.data_ptr()
        low, high = sum(r for r in reach if r < 0), sum(r for r in reach if r > 0)
        return self.device, start + low, start + high + itemsize

    def is_there(self) -> bool:
        """Whether the model still has the tensor at its address."""
        tensors, name = self.home
        now = tensors.get(name)
        return now is not None and now.data_ptr() == self.address

    def moved_error(self) -> TargetError:
        """The error for a tensor that is no longer there."""
        return TargetError(
            f"tensor {self.name!r} was moved or replaced, or its memory given back, since HotSwap looked at the model;"
            " revert before moving a model, and make a new HotSwap after it"
        )


def is_array(tensor: Any) -> bool:
    """Whether the tensor is a NumPy array."""
    return isinstance(tensor, np.ndarray)


def live_tensors(model: Any) -> dict[str, Target]:
    """All tensors of a model by name; names of the same memory have the same `Target`.

    Args:
        model: a torch module, or a mapping of names to tensors, arrays and modules.  Tensors of a module in a mapping,
            such as a pipeline's `components`, are named `component/name`.  Other values are ignored.

    Raises:
        TargetError: the model is neither.
    """
    if not isinstance(model, Mapping) and not _is_module(model):
        raise TargetError(
            f"HotSwap takes a torch module or a mapping of tensors, not {type(model).__name__}; for a pipeline, give"
            " its components"
        )
    found: dict[str, Target] = {}
    same: dict[tuple[object, ...], Target] = {}
    homes = _homes(model)
    for name, tensor, view in _named(model):
        if isinstance(view, Refusal):
            found.setdefault(name, Target(name, _NOTHING, "?", view))
            continue
        target = _target(name, tensor, view, homes)
        key = id(tensor) if target.refusal else _identity(target.tensor)
        found.setdefault(name, same.setdefault((key, target.dtype), target))
    for name, refusal in _computed(model):
        found.setdefault(name, Target(name, _NOTHING, "?", refusal))
    return found


def _computed(model: Any) -> Iterator[tuple[str, Refusal]]:
    """Names of tensors that a model does not store, and why they cannot be written."""
    if isinstance(model, Mapping):
        for part, value in model.items():
            yield from ((f"{part}/{name}", why) for name, why in _computed(value))
    elif _is_module(model):
        for name, why in computed_tensors(model):
            yield name.replace(peft.BASE_LAYER, "."), why


def _homes(model: Any) -> dict[int, Home]:
    """id of a tensor -> the tensors of the first module that has it, and its name there."""
    homes: dict[int, Home] = {}
    for root in model.values() if isinstance(model, Mapping) else [model]:
        for module in root.modules() if _is_module(root) else []:
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    homes.setdefault(id(tensor), (tensors, name))
    return homes


def _is_module(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.nn.Module)


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return is_array(value) or (torch is not None and isinstance(value, torch.Tensor))


def _named(model: Any) -> Iterator[tuple[str, Any, tuple[str, Any] | Refusal | None]]:
    """(name, tensor, (kind of view, tensor that it views) or why there is none); the module's own names come first."""
    if _is_module(model):
        own = dict(model.named_parameters(remove_duplicate=False))
        own |= model.named_buffers(remove_duplicate=False)
        saved = {tensor.name: tensor for tensor in saved_tensors(model) if not _is_own(tensor, own)}
        for name, tensor in own.items():
            if name not in saved:
                yield name, tensor, None
        for name, tensor in own.items():  # PEFT puts this between a layer and its weight
            if peft.BASE_LAYER in name:
                yield name.replace(peft.BASE_LAYER, "."), tensor, None
        for name, stored in saved.items():
            yield name, *_as_saved(stored, own)
        return
    for name, value in model.items():
        if _is_module(value):
            for inner, tensor, view in _named(value):
                yield f"{name}/{inner}", tensor, view
        elif _is_tensor(value):
            yield name, value, None


def _is_own(saved: SavedTensor, own: Mapping[str, Any]) -> bool:
    """Whether the checkpoint holds a tensor under its name in memory, as it is."""
    return saved.renamed is not None and own[saved.renamed] is own.get(saved.name)


def _as_saved(saved: SavedTensor, own: Mapping[str, Any]) -> tuple[Any, tuple[str, Any] | Refusal]:
    """(a checkpoint's tensor as a view of a weight, (kind of view, the weight)), or why it is no view."""
    if saved.parts is not None and len(saved.parts) == 1:
        weight, view = saved.parts[0]
        if view.is_whole and view.stored == contiguous(view.shape):
            box, holder = view.weight, own[weight]
            tensor = holder.detach().as_strided(box.shape, box.strides, holder.storage_offset() + box.offset)
            return tensor, ("as in the checkpoint", holder)
    return _NOTHING, CONVERTED


def _identity(tensor: Any) -> tuple[object, ...]:
    if is_array(tensor):
        return "cpu", tensor.ctypes.data, tensor.shape, tensor.strides
    strides = tuple(stride * tensor.element_size() for stride in tensor.stride())
    address = tensor.data_ptr() if tensor.numel() else id(tensor)
    return str(tensor.device), address, tuple(tensor.shape), strides


def _target(name: str, tensor: Any, view: tuple[str, Any] | None, homes: Mapping[int, Home]) -> Target:
    if is_array(tensor):
        known = tensor.dtype.name in registry.DTYPE_OF_NAME
        refusal = None
        if tensor.dtype.byteorder == ">":
            refusal = Refusal(RefusalKind.BYTE_ORDER, "has its bytes in big-endian order", "convert it first")
        elif not tensor.flags.writeable:
            refusal = Refusal(RefusalKind.READ_ONLY, "is a read-only array", "give a writable one")
        return Target(name, tensor, tensor.dtype.name if known else "?", refusal, tensor)
    kind, holder = view or ("", tensor)
    refusal = refusal_of(holder)
    dtype = str(tensor.dtype).removeprefix("torch.")
    known = dtype in registry.DTYPE_OF_NAME
    home = homes.get(id(holder), ({"": holder}, ""))
    return Target(name, tensor.detach(), dtype if known else "?", refusal, holder, home, kind)
