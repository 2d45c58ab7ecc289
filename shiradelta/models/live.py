"""A live model as named tensors: a torch module, or a mapping of tensors, arrays and modules.

A tensor has the module's name for it.  Where transformers renames, stacks or splits on loading, the names of the
checkpoint are known too.  Where each of its tensors is one piece of a weight in memory, its name stands for that piece;
where it is several weights, or has its elements in another order, its name stands for its parts.  Torch is used only if
the caller has imported it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from shiradelta.errors import TargetError
from shiradelta.format import registry
from shiradelta.models import peft
from shiradelta.models.layout import Layout, parts_of
from shiradelta.models.memory import Span, bare, has_elements, is_array, is_sharded, own_part, span_of
from shiradelta.models.names import Shape
from shiradelta.models.places import Place, Places, is_module, modules_of
from shiradelta.models.refusals import (
    CONVERTED,
    GATHERED,
    SHARED,
    Refusal,
    RefusalKind,
    check_scripted,
    computed_tensors,
    gathered_by_fsdp,
    refusal_of,
)
from shiradelta.models.saved import SavedTensor, saved_tensors
from shiradelta.models.sentence import saved_prefixes
from shiradelta.models.sharded import Spread, refusal_of_placements
from shiradelta.models.shared import SharedMemory
from shiradelta.models.views import Box, View, contiguous

#: Stands for a tensor that a model does not have in one piece.
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
        places: everywhere that the model has the tensor; every switch checks that it is still there.
        view: how the tensor was taken from the holder; views of one kind share no element.
        extent: the checkpoint's shape of a tensor that is no piece of memory, and has parts; None for others.
        parts: the weights that have its elements, and which.  This process may have some of them only, or none.
        forms: shape -> the same tensor as the checkpoint may have it too, with dimensions exchanged.
        device: "cpu", "cuda:0" and so on; "meta" for a tensor in parts.
        address: the holder's, when the model was read; 0 if it cannot change.
    """

    name: str
    tensor: Any
    dtype: str
    refusal: Refusal | None = None
    holder: Any = None
    places: list[Place] = field(default_factory=list)
    view: str = ""
    extent: Shape | None = None
    parts: tuple[tuple[Target, View], ...] = ()
    forms: dict[Shape, Target] = field(default_factory=dict)
    device: str = field(init=False)
    address: int = field(init=False)

    def __post_init__(self) -> None:
        device = "meta" if self.tensor is _NOTHING else str(getattr(self.tensor, "device", "cpu"))
        object.__setattr__(self, "device", device)
        still = self.refusal is not None or is_array(self.tensor)
        object.__setattr__(self, "address", 0 if still else own_part(self.holder).data_ptr())

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return tuple(self.tensor.shape) if self.extent is None else self.extent

    @property
    def known_shape(self) -> Shape | None:
        """The tensor's shape; None for one that a layer computes or packs."""
        return None if self.extent is None and self.tensor is _NOTHING else self.shape

    @cached_property
    def memory(self) -> Span:
        """The range that its elements span, as `address` is: when it was asked for first."""
        return span_of(self.tensor)

    def leaves(self, above: tuple[View, ...] = ()) -> Iterator[tuple[Target, tuple[View, ...]]]:
        """The pieces of memory that have its elements, and which: views of one another, the tensor's own first."""
        if self.extent is None:
            yield self, above
        for weight, view in self.parts:
            yield from weight.leaves((*above, view))

    def in_form(self, shape: Shape) -> Target:
        """The tensor as the checkpoint has it that a delta of this shape was made for."""
        return self.forms.get(shape, self)

    def is_there(self) -> bool:
        """Whether the model still has the tensor at its address, in all its places."""
        holder, address = self.holder, self.address
        if not address:
            return all(things.get(name) is holder for things, name in self.places)
        for things, name in self.places or [Place({"": holder}, "")]:
            now = things.get(name)
            if now is None or (now is not holder and is_array(now)) or own_part(now).data_ptr() != address:
                return False
        return True

    def now(self) -> list[Any]:
        """What the model has in the tensor's places now."""
        return [things.get(name) for things, name in self.places] or [self.holder]

    def moved_error(self) -> TargetError:
        """The error for a tensor that is no longer there."""
        if any(is_sharded(thing) and thing is not self.holder for thing in self.now()):
            return TargetError(
                f"tensor {self.name!r} was replaced by a DTensor since HotSwap looked at the model; if adapters are"
                " active, call revert() in all processes, and then make a new HotSwap"
            )
        return TargetError(
            f"tensor {self.name!r} was moved or replaced, or its memory given back, since HotSwap looked at the model;"
            " revert before moving a model, and make a new HotSwap after it"
        )


def elsewhere(name: str, shape: Shape, dtype: str) -> Target:
    """A tensor of which other processes have all elements."""
    return Target(name, _NOTHING, dtype, extent=shape)


def live_tensors(
    model: Any, *, allow_shared: bool = True, layout: Mapping[str, Layout] | None = None
) -> dict[str, Target]:
    """All tensors of a model by name; names of the same memory have the same `Target`.

    Args:
        model: a torch module, or a mapping of names to tensors, arrays and modules.  Tensors of a module in a mapping,
            such as a pipeline's `components`, are named `component/name`.  Other values are ignored.
        allow_shared: take tensors in memory that other processes share; otherwise they have a refusal.
        layout: names of tensors in the checkpoint -> where they are in memory, where the model does not tell.

    Raises:
        ArgumentError: a region of a layout does not lie in its tensor.
        TargetError: the model is neither, or TorchScript; or a region does not lie in a tensor of the model.
    """
    if not isinstance(model, Mapping) and not is_module(model):
        raise TargetError(
            f"HotSwap takes a torch module, a pipeline or a mapping of tensors, not {type(model).__name__}; give one of"
            " these"
        )
    for root in modules_of(model):
        check_scripted(root)
    found: dict[str, Target] = {}
    same: dict[tuple[object, ...], Target] = {}
    spread = Spread()
    places = Places(model)
    gathered = {id(tensor) for root in modules_of(model) for tensor in gathered_by_fsdp(root)}

    shared = () if allow_shared else SharedMemory()

    def stored(named: _Named) -> Target:
        target = _target(named, places, gathered)
        if target.refusal is None and _is_shared(target, shared):
            target = replace(target, refusal=SHARED)
        key = id(named.tensor) if target.refusal else _identity(target.tensor)
        first = same.setdefault((key, target.dtype), target)
        first.places.extend(place for place in target.places if place not in first.places)
        if not is_sharded(named.tensor) or first.refusal is not None:
            return first
        extent, views = tuple(named.tensor.shape), spread.of(named.tensor)
        if len(views) == 1 and views[0].is_same:
            return first
        parts = tuple((first, view) for view in views)
        whole = Target(named.name, _NOTHING, first.dtype, holder=named.tensor, extent=extent, parts=parts)
        return same.setdefault((first, extent, views), whole)

    every = list(_named(model))
    for named in [*_laid_out(layout, every), *every] if layout else every:
        target = _in_parts(named, stored) if named.tensor is _NOTHING else stored(named)
        found.setdefault(named.name, target)
        if named.turned is not None:
            other = _in_parts(named.turned, stored)
            found[named.name].forms.setdefault(other.shape, other)
    for name, refusal in _computed(model):
        found.setdefault(name, Target(name, _NOTHING, "?", refusal))
    return found


def _laid_out(layout: Mapping[str, Layout], every: Iterable[_Named]) -> Iterator[_Named]:
    """The tensors whose layout a caller has given."""
    named = {one.name: one.tensor for one in every if one.holder is None and one.tensor is not _NOTHING}
    own = {name: tensor for name, tensor in named.items() if has_elements(tensor)}
    given = parts_of(layout, own).items()
    yield from _in_checkpoint([SavedTensor(name, *parts) for name, parts in given], own, given=True)


def _computed(model: Any) -> Iterator[tuple[str, Refusal]]:
    """Names of tensors that a model does not store, and why they cannot be written."""
    if isinstance(model, Mapping):
        for part, value in model.items():
            yield from ((f"{part}/{name}", why) for name, why in _computed(value))
    elif is_module(model):
        for name, why in computed_tensors(model):
            yield name.replace(peft.BASE_LAYER, "."), why


def _is_shared(target: Target, shared: SharedMemory | tuple[()]) -> bool:
    """Whether other processes may write a tensor.  Pinned memory looks so, but is this process's alone."""
    if target.device != "cpu" or target.memory[1] not in shared:
        return False
    return is_array(target.tensor) or not target.tensor.is_pinned()


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return is_array(value) or (torch is not None and isinstance(value, torch.Tensor))


@dataclass(frozen=True)
class _Named:
    """A name of a tensor.

    Attributes:
        name: the name.
        tensor: the tensor, with or without gradient.
        holder: the module's own tensor that it is a view of; None for itself.
        view: how it was taken from the holder.
        given: whether a caller has given the layout, so that memory has the elements as they are, whatever its class.
        extent: the shape of a tensor that a caller has given the layout of.
        parts: the weights that have its elements, where no piece of memory is the tensor; empty if that is not known.
        turned: the same tensor as the checkpoint may have it too, with dimensions exchanged.
    """

    name: str
    tensor: Any
    holder: Any = None
    view: str = ""
    given: bool = False
    extent: Shape | None = None
    parts: tuple[tuple[_Named, View], ...] = ()
    turned: _Named | None = None

    def inside(self, component: str) -> _Named:
        """The same with names as in a mapping of components."""
        parts = tuple((weight.inside(component), view) for weight, view in self.parts)
        turned = None if self.turned is None else self.turned.inside(component)
        return replace(self, name=f"{component}/{self.name}", parts=parts, turned=turned)


def _named(model: Any) -> Iterator[_Named]:
    """All names of tensors; the module's own come first."""
    if is_module(model):
        named = list(_named_in(model))
        yield from named
        for prefix, folder in saved_prefixes(model).items():
            some = (one for one in named if one.name.startswith(prefix))
            yield from (replace(one, name=folder + one.name[len(prefix) :]) for one in some)
        return
    for name, value in model.items():
        if is_module(value):
            yield from (named.inside(name) for named in _named(value))
        elif _is_tensor(value):
            yield _Named(name, value)


def _named_in(model: Any) -> Iterator[_Named]:
    """The names of a module's tensors; the module's own come first."""
    own = dict(model.named_parameters(remove_duplicate=False))
    own |= model.named_buffers(remove_duplicate=False)
    in_checkpoint = list(_in_checkpoint(list(saved_tensors(model)), own))
    taken = {named.name for named in in_checkpoint}
    for name, tensor in own.items():
        if name not in taken:
            yield _Named(name, tensor)
    for name, tensor in own.items():  # PEFT puts this between a layer and its weight
        if peft.BASE_LAYER in name:
            yield _Named(name.replace(peft.BASE_LAYER, "."), tensor)
    yield from in_checkpoint


def _in_checkpoint(saved: Sequence[SavedTensor], own: Mapping[str, Any], given: bool = False) -> Iterator[_Named]:
    """The names of the checkpoint's tensors that are not the same in memory; `given` says that a caller told so."""
    # A weight and a piece of it cannot both be patched, so all tensors in a weight count as parts if one has to.
    cut = {weight for tensor in saved for weight, view in tensor.parts or () if not _is_piece(tensor, view)}
    for tensor in saved:
        parts = tuple((_Named(weight, own[weight], given=given), view) for weight, view in tensor.parts or ())
        whole = None if tensor.renamed is None else own[tensor.renamed]
        if whole is not None and tuple(whole.shape) == tensor.shape:
            other = tensor.turned
            turned = [(_Named(weight, own[weight]), view) for weight, view in (other and other.parts) or ()]
            if turned or given or whole is not own.get(tensor.name):
                as_turned = _Named(tensor.name, _NOTHING, parts=tuple(turned)) if turned else None
                yield _Named(tensor.name, whole, given=given, turned=as_turned)
        elif parts and cut.isdisjoint(weight.name for weight, _ in parts) and not is_sharded(parts[0][0].tensor):
            ((weight, view),) = parts
            piece = _piece(weight.tensor, view.weight)
            yield _Named(tensor.name, piece, weight.tensor, "as in the checkpoint", given=given)
        else:
            yield _Named(tensor.name, _NOTHING, extent=tensor.shape if given else None, parts=parts)


def _piece(whole: Any, box: Box) -> Any:
    """A box of a contiguous tensor or array, as a view."""
    if is_array(whole):
        return box.of(whole.reshape(-1))
    return bare(whole).as_strided(box.shape, box.strides, whole.storage_offset() + box.offset)


def _is_piece(saved: SavedTensor, view: View) -> bool:
    """Whether a checkpoint's tensor is one contiguous piece of a weight, but not all of it."""
    strides = zip(view.shape, view.weight.strides, view.stored.strides, strict=False)
    in_order = all(size == 1 or one == other for size, one, other in strides)
    is_only = len(saved.parts or ()) == 1 and saved.renamed is None
    return view.stored == contiguous(view.shape) and in_order and is_only


def _in_parts(named: _Named, stored: Callable[[_Named], Target]) -> Target:
    """A tensor that consists of weights in memory, or has its elements in another order there."""
    parts = tuple((stored(weight), view) for weight, view in named.parts)
    refusal = next((weight.refusal for weight, _ in parts if weight.refusal is not None), None)
    dtypes = sorted({weight.dtype for weight, _ in parts})
    extent = named.extent
    if extent is None:
        extent = parts[0][1].shape if parts else ()
        if sum(view.weight.numel for _, view in parts) != math.prod(extent):
            return Target(named.name, _NOTHING, "?", CONVERTED)
    if refusal is None and len(dtypes) > 1:
        what = f"consists of weights of different dtypes ({', '.join(dtypes)})"
        refusal = Refusal(RefusalKind.CONVERTED, what, "cast the model to one dtype first")
    return Target(named.name, _NOTHING, next(iter(dtypes), "?"), refusal, extent=extent, parts=parts)


def _identity(tensor: Any) -> tuple[object, ...]:
    if is_array(tensor):
        return "cpu", tensor.ctypes.data, tensor.shape, tensor.strides
    strides = tuple(stride * tensor.element_size() for stride in tensor.stride())
    address = tensor.data_ptr() if tensor.numel() else id(tensor)
    return str(tensor.device), address, tuple(tensor.shape), strides


def _target(named: _Named, places: Places, gathered: Container[int]) -> Target:
    name, tensor = named.name, named.tensor
    if is_array(tensor):
        known = tensor.dtype.name in registry.DTYPE_OF_NAME
        refusal = None
        if tensor.dtype.byteorder == ">":
            refusal = Refusal(RefusalKind.BYTE_ORDER, "has its bytes in big-endian order", "convert it first")
        elif not tensor.flags.writeable:
            refusal = Refusal(RefusalKind.READ_ONLY, "is a read-only array", "give a writable one")
        return Target(name, tensor, tensor.dtype.name if known else "?", refusal, tensor, list(places.of(tensor)))
    holder = tensor if named.holder is None else named.holder
    refusal = GATHERED if id(holder) in gathered else refusal_of(bare(holder) if named.given else holder)
    if refusal is None and is_sharded(holder):
        refusal = refusal_of_placements(holder)
    dtype = str(tensor.dtype).removeprefix("torch.")
    dtype = dtype if dtype in registry.DTYPE_OF_NAME else "?"
    if refusal is not None and is_sharded(holder):
        return Target(name, _NOTHING, dtype, refusal, holder, extent=tuple(tensor.shape))
    own = bare(tensor) if named.given else own_part(tensor).detach()
    return Target(name, own, dtype, refusal, holder, list(places.of(holder)), named.view)
