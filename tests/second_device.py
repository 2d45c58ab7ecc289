"""A second device where there is none: tensors of the device `meta` that have elements, in a CPU's memory.

Within `second_device()`, what torch makes on `meta` has elements, and an operation on tensors of both devices is an
error, as with two GPUs.  Only copies take both, and operations with a number or an index on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

META = torch.device("meta")
#: What takes tensors from both: copies, and an index, which torch takes from a CPU as well.
_COPIES = {"_to_copy", "copy_"}
_INDICES = {"index", "index_put_", "index_put", "_index_put_impl_"}


class Elsewhere(Tensor):
    """A tensor on the second device; `inner` has its elements."""

    inner: Tensor
    is_meta = False  # it has elements

    @staticmethod
    def __new__(cls: Any, inner: Tensor) -> Any:
        found = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=META,
        )
        found.inner = inner.detach()
        return found

    @property
    def data(self) -> Any:  # type: ignore[override]
        return Elsewhere(self.inner)

    @data.setter
    def data(self, other: Elsewhere) -> None:
        assert other.shape == self.shape
        self.inner = other.inner

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Elsewhere({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def second_device() -> Iterator[None]:
    """The context in which the second device is there."""
    with _MadeThere(), _Dispatched():
        yield


class _MadeThere(TorchFunctionMode):
    """What is made of Python's numbers is dispatched without them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        device = (kwargs or {}).get("device")
        if func in (torch.tensor, torch.as_tensor) and device is not None and torch.device(device) == META:
            return func(*args, **{**kwargs, "device": "cpu"}).to(META)
        if func is Tensor.tolist and isinstance(args[0], Elsewhere):
            return args[0].inner.tolist()
        return func(*args, **(kwargs or {}))


class _Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
    there = [one for one in given if isinstance(one, Elsewhere)]
    device = kwargs.get("device")
    name = str(func).split(".")[1]
    if not there and device != META:
        return func(*args, **kwargs)
    if name not in _COPIES and not (name in _INDICES and isinstance(args[0], Elsewhere)):
        here = [one for one in given if not isinstance(one, Elsewhere) and one.dim()]
        if there and here:
            raise RuntimeError(f"{func}: tensors {list(there[0].shape)}, {list(here[0].shape)} are on two devices")
    own = {id(one.inner): one for one in there}

    def unwrapped(value: Any) -> Any:
        return value.inner if isinstance(value, Elsewhere) else torch.device("cpu") if value == META else value

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return own[id(value)] if id(value) in own else Elsewhere(value)

    args_of, kwargs_of = tree_map(unwrapped, (list(args), kwargs))
    found = func(*args_of, **kwargs_of)
    back = (name == "_to_copy" and device is not None and device != META) or (
        name == "copy_" and not isinstance(args[0], Elsewhere)
    )
    if name == "copy_" and back:
        return args[0]
    return found if back else tree_map(wrapped, found)
