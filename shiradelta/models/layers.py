"""Recognises layers that store their weight transposed."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.conv import _ConvNd


def is_conv1d(layer: nn.Module | type[nn.Module]) -> bool:
    """Whether a layer, or its class, is transformers' `Conv1D`: a linear layer whose weight is [in, out] (GPT-2)."""
    kind = layer if isinstance(layer, type) else type(layer)
    return kind.__name__ == "Conv1D" and not issubclass(kind, _ConvNd)  # a convolution may have the same name
