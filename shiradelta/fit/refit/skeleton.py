"""A transformers model whose weights stay empty until a part of it is filled from the files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shiradelta.fit.tuned_weights import can_write_exact, write_exact
from shiradelta.format.delta import TensorDelta
from shiradelta.models import loading
from shiradelta.models.checkpoint import Checkpoint, open_checkpoint
from shiradelta.models.dtypes import TORCH_DTYPES
from shiradelta.models.names import find_names


class CannotStreamError(Exception):
    """Internal: why a model cannot be run layer by layer; `shiradelta.fit.run` then loads it whole."""


class Skeleton:
    """A model without weights, and its repeated blocks, which can be filled and emptied.

    Args:
        base, source: where the model and its fine-tune are.
        exact: name -> exact change, written onto the base's weights.
        device, dtype: the device and dtype of the weights.

    Attributes:
        model: the model; it has no weights at first.
        blocks: the list of layers with the most weights; the model calls them in order.
        names: parameter's name -> name in the base's files.
    """

    def __init__(
        self, base: Path, source: Path, exact: Mapping[str, TensorDelta], device: torch.device, dtype: torch.dtype
    ) -> None:
        loader, config = loading.model_class(base, source)
        with _without_weights(dtype):
            model: nn.Module = loader(config)
        model.tie_weights()  # type: ignore[operator]
        config_of: Any = model.config
        config_of.use_cache = False
        self.model = model.eval().requires_grad_(False)
        self.blocks = _blocks(self.model)
        self._device, self._dtype = device, dtype
        self._checkpoint: Checkpoint = open_checkpoint(base)
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        stored = {name: slot.shape for name, slot in self._checkpoint.items()}
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        self.names = find_names(shapes, stored).names
        self._exact = {own: exact[name] for name, own in find_names(dict.fromkeys(exact), shapes).names.items()}
        known = {id(parameters[name]) for name in (*self.names, *self._exact)}
        for name, parameter in parameters.items():
            if id(parameter) not in known:
                raise CannotStreamError(f"the files have no {name!r}, which transformers makes from others")
            slot = self._checkpoint[self.names[name]] if name in self.names else None
            if slot and (slot.shape != parameter.shape or slot.dtype.name not in TORCH_DTYPES):
                raise CannotStreamError(f"the files have {name!r} as {slot.dtype.name} {list(slot.shape)}")
        for buffer, tensor in self.model.named_buffers():
            if buffer in self._checkpoint and self._checkpoint[buffer].dtype.name in TORCH_DTYPES:
                tensor.copy_(self._read(buffer))
        for module in self.model.modules():
            for name, tensor in module.named_buffers(recurse=False):
                module._buffers[name] = tensor.to(device)

    def of_block(self, index: int) -> dict[str, nn.Parameter]:
        """Name -> parameter, empty or filled, of one block."""
        block = self.blocks[index]
        return {name: p for name, p in self._all().items() if any(p is own for own in block.parameters())}

    def of_rest(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of everything outside the blocks; tied parameters under their first name."""
        inside = {id(p) for p in self.blocks.parameters()}
        return {name: p for name, p in self._all().items() if id(p) not in inside}

    def _all(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    def fill(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Fills parameters with the base's weights and the exact changes; returns the new parameters by name."""
        every: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            every.setdefault(id(parameter), []).append(name)
        filled = {}
        for name, parameter in parameters.items():
            names = every[id(parameter)]
            filled[name] = self._place(names, self._weights(names, parameter.shape))
        return filled

    def empty(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Frees the weights of filled parameters."""
        for name, parameter in parameters.items():
            self._place([name], parameter.data.to("meta"))

    def _place(self, names: list[str], weights: Tensor) -> nn.Parameter:
        parameter = nn.Parameter(weights, requires_grad=False)
        for name in names:
            module, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(module), leaf, parameter)
        return parameter

    def _weights(self, names: list[str], shape: torch.Size) -> Tensor:
        stored = next((self.names[name] for name in names if name in self.names), None)
        weights = torch.zeros(shape) if stored is None else self._read(stored)
        weights = weights.to(self._device, self._dtype)
        exact = next((self._exact[name] for name in names if name in self._exact), None)
        if exact is not None and can_write_exact(names[0], shape, exact):
            write_exact(weights.view(-1), exact)
        return weights

    def _read(self, name: str) -> Tensor:
        slot = self._checkpoint[name]
        bits = np.array(self._checkpoint.bits(name))
        kind = {2: np.int16, 4: np.int32}[slot.dtype.size]
        return torch.from_numpy(bits.view(kind)).view(TORCH_DTYPES[slot.dtype.name]).view(slot.shape)


def _blocks(model: nn.Module) -> nn.ModuleList:
    """The list of layers that holds most of the weights."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len({type(block) for block in m}) == 1]
    blocks = max((m for m in lists if len(m) > 1), key=_numel, default=None)
    if blocks is None:
        raise CannotStreamError("it has no list of layers")
    ids = [id(parameter) for block in blocks for parameter in block.parameters()]
    outside = {id(p) for m in _others(model, blocks) for p in m.parameters(recurse=False)}
    if len(set(ids)) < len(ids) or outside & set(ids):
        raise CannotStreamError("its layers share weights")
    return blocks


def _others(model: nn.Module, blocks: nn.ModuleList) -> Iterator[nn.Module]:
    inside = {id(module) for module in blocks.modules()}
    return (module for module in model.modules() if id(module) not in inside)


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@contextmanager
def _without_weights(dtype: torch.dtype) -> Iterator[None]:
    """Within the block, new parameters are on the meta device; buffers are real, because no file has them."""
    register, default = nn.Module.register_parameter, torch.get_default_dtype()

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.data.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    torch.set_default_dtype(dtype)  # for buffers, as when transformers loads a model
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
        torch.set_default_dtype(default)
