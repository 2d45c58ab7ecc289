"""Tensors in memory, such as a state dictionary, as a checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from shiradelta.errors import SourceError
from shiradelta.format import registry
from shiradelta.format.arithmetic import Array
from shiradelta.models.checkpoint import Checkpoint
from shiradelta.models.memory import bare, flat_bits, has_elements, is_array, is_sharded
from shiradelta.models.safetensors import Slot
from shiradelta.util.text import brief


class HeldCheckpoint(Checkpoint):
    """Torch tensors on any device, or NumPy arrays, by name.  One tensor at a time is copied where it is not plain.

    Args:
        called: what it is called in messages.
        tensors: the tensors; nobody may write to them meanwhile.

    Raises:
        SourceError: something among them is no tensor, has no elements, or is of a dtype that `.shd` files do not know.
    """

    def __init__(self, called: str, tensors: Mapping[str, Any]) -> None:
        self.root = Path(called)
        self.shards = ()
        self.folders = {}
        self._slots = {name: _slot(self.root, name, tensor) for name, tensor in tensors.items()}

    def config(self, name: str) -> dict[str, Any]:
        return {}


def _slot(root: Path, name: object, tensor: Any) -> Slot:
    where, torch = f"{root}: {brief(repr(name), 120)}", sys.modules.get("torch")
    if not isinstance(name, str) or not (is_array(tensor) or (torch and isinstance(tensor, torch.Tensor))):
        raise SourceError(f"{where} is a {type(tensor).__name__}, no tensor; give tensors by name")
    if is_sharded(tensor):
        raise SourceError(f"{where} is a part of a tensor (a DTensor); give all of it, as full_tensor() does")
    if not has_elements(tensor) or (not is_array(tensor) and (tensor.is_conj() or tensor.is_neg())):
        raise SourceError(f"{where} is sparse, without elements or a view that torch computes; give plain tensors")
    plain = bare(tensor)
    dtype = registry.DTYPE_OF_NAME.get(str(plain.dtype).removeprefix("torch."))
    if dtype is None or not dtype.size:
        raise SourceError(f"{where} has dtype {plain.dtype}, which .shd files do not know")
    read = partial(_array_bits, plain, dtype) if is_array(plain) else partial(flat_bits, plain)
    return Slot(name, root, 0, tuple(plain.shape), dtype, read)


def _array_bits(array: Array, dtype: registry.DType) -> Array:
    return np.ascontiguousarray(array).reshape(-1).view(dtype.bits)
