"""Torch's dtypes by the names that files give them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from shiradelta.errors import SourceError
from shiradelta.format import registry
from shiradelta.format.arithmetic import Array

#: Name -> torch's dtype, of the weights to which a delta can be added.
TORCH_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in registry.ADD_DTYPES}


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of weights to which a delta can be added; float32 where a delta leaves it open.

    Raises:
        SourceError: no delta can be added to weights of that dtype.
    """
    if name == registry.UNSPECIFIED.name:
        return torch.float32
    if name not in TORCH_DTYPES:
        raise SourceError(f"no delta can be added to weights in {name}; take a model in {', '.join(TORCH_DTYPES)}")
    return TORCH_DTYPES[name]


def to_torch(bits: Array, dtype: str) -> Tensor:
    """Stored elements, copied into a flat tensor.

    Args:
        bits: the elements as unsigned integers.
        dtype: the dtype that they stand for.

    Raises:
        SourceError: no delta can be added to weights of that dtype.
    """
    kind = torch_dtype(dtype)
    return torch.from_numpy(np.array(bits).view(f"i{bits.itemsize}")).view(kind)
