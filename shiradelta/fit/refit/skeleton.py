"""A transformers model whose weights stay empty until a part of it is filled from the files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shiradelta.errors import SourceError
from shiradelta.fit.fitted import FitTarget
from shiradelta.fit.stored import LoadedWeights, Piece, group
from shiradelta.fit.tuned_weights import exact_homes, write_exact
from shiradelta.format.delta import TensorDelta
from shiradelta.models import loading
from shiradelta.models.checkpoint import Checkpoint, open_checkpoint
from shiradelta.models.dtypes import TORCH_DTYPES, to_torch
from shiradelta.models.sentence import folder_of, head_of
from shiradelta.models.views import Box, View


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
        stored: name of a parameter or buffer -> (name in the base's files, the elements that the two share).
    """

    def __init__(
        self, base: Path, source: Path, exact: Mapping[str, TensorDelta], device: torch.device, dtype: torch.dtype
    ) -> None:
        loader, config = loading.model_class(base, source)
        if head := head_of(folder_of(base)):
            raise CannotStreamError(f"its embedding goes through {head[0].path}")
        if getattr(config, "is_encoder_decoder", False):
            raise CannotStreamError("it has an encoder and a decoder")
        with _without_weights(dtype):
            model: nn.Module = loader(config)
        model.tie_weights()  # type: ignore[operator]
        config_of: Any = model.config
        config_of.use_cache = False
        self.model = model.eval().requires_grad_(False)
        self.blocks = _blocks(self.model)
        self._device, self._dtype = device, dtype
        self._checkpoint: Checkpoint = open_checkpoint(base)
        self._loaded = LoadedWeights(self.model)
        self.stored = self._in_files()
        self._exact: dict[str, list[tuple[View, TensorDelta]]] = {}
        for weight, view, delta in exact_homes(list(exact.items()), self._loaded):
            self._exact.setdefault(weight, []).append((view, delta))
        for name, parameter in self._all().items():
            views = [view for _, view in self.stored.get(name, ())] + [view for view, _ in self._exact.get(name, ())]
            if sum(box.numel for box in {view.weight for view in views}) < parameter.numel():
                raise CannotStreamError(f"the files have no {name!r}, which transformers makes from others")
        for name, buffer in self.model.named_buffers():
            if name in self.stored or name in self._exact:
                buffer.copy_(self._weights(name, buffer.shape, buffer.dtype))
        for module in self.model.modules():
            for name, tensor in module.named_buffers(recurse=False):
                module._buffers[name] = tensor.to(device)

    def _in_files(self) -> dict[str, list[tuple[str, View]]]:
        try:
            found = self._loaded.find(self._checkpoint.shapes).found
        except SourceError as error:
            raise CannotStreamError(str(error)) from None
        stored: dict[str, dict[Box, tuple[str, View]]] = {}
        for name, home in found.items():
            slot = self._checkpoint[name]
            if slot.dtype.name not in TORCH_DTYPES:
                raise CannotStreamError(f"the files have {name!r} as {slot.dtype.name} {list(slot.shape)}")
            for own, view in home:
                views = stored.setdefault(own, {})
                if view.weight not in views or view.name == own:  # of tied ones, the first has the values
                    views[view.weight] = name, view
        return {own: list(views.values()) for own, views in stored.items()}

    def pieces(self, targets: Sequence[FitTarget]) -> tuple[dict[str, list[Piece]], dict[str, str]]:
        """The targets as `shiradelta.fit.stored.group` returns them; each is in one block, or outside them.

        Raises:
            CannotStreamError: one is not.
        """
        homes = self._loaded.find({target.name: target.shape for target in targets})
        places: dict[str, int | None] = dict.fromkeys(self.of_rest())
        for index in range(len(self.blocks)):
            places |= dict.fromkeys(self.of_block(index), index)
        for target in targets:
            home = homes.found.get(target.name)
            if home is None:
                raise CannotStreamError(f"{target.name!r} is not fitted, because {homes.missing[target.name]}")
            own = [name for name, _ in home]
            if any(name not in places for name in own) or len({places[name] for name in own}) > 1:
                raise CannotStreamError(f"{target.name!r} is in several layers, or in a buffer")
        return group(targets, homes)

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
            filled[name] = self._place(names, self._weights(names[0], parameter.shape, self._dtype))
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

    def _weights(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        stored = self.stored.get(name, ())
        if len(stored) == 1 and stored[0][1].is_same:
            weights = self._read(stored[0][0]).to(self._device, dtype).view(shape)
        else:
            weights = torch.zeros(shape, device=self._device, dtype=dtype)
            for file, view in stored:
                at, source = view.weight, view.stored
                part = self._read(file).as_strided(source.shape, source.strides, source.offset)
                weights.as_strided(at.shape, at.strides, at.offset).copy_(part)
        for view, delta in self._exact.get(name, ()):
            write_exact(weights.view(-1), delta, view)
        return weights

    def _read(self, name: str) -> Tensor:
        """A tensor of the files, flat."""
        return to_torch(self._checkpoint.bits(name), self._checkpoint[name].dtype.name)


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
