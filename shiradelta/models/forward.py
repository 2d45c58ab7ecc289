"""Forward passes of layers that are replaced for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

#: Called with the arguments of a layer.
Forward = Callable[..., Any]


@contextmanager
def forward_replaced(layers: Iterable[nn.Module], replacement: Callable[[int, Forward], Forward]) -> Iterator[None]:
    """Within the block, layers have other forward passes.  Afterwards they have their own, such as accelerate's.

    Args:
        layers: the layers; one that is there several times is replaced once.
        replacement: gets the number of a layer in `layers`, the first it has there, and its own forward pass.
    """
    numbers: dict[nn.Module, int] = {}
    for number, layer in enumerate(layers):
        numbers.setdefault(layer, number)
    own = {layer: vars(layer).get("forward") for layer in numbers}
    try:
        for layer, number in numbers.items():
            layer.forward = replacement(number, layer.forward)
        yield
    finally:
        for layer, before in own.items():
            vars(layer).pop("forward", None)
            if before is not None:
                layer.forward = before
