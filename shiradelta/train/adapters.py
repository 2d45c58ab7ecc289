"""Reads the adapters that training starts from: `.shd` files, and PEFT's SHiRA adapters."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from shiradelta.errors import SourceError
from shiradelta.format.arithmetic import Float32, Positions
from shiradelta.format.draw import Draw
from shiradelta.io.reader import open_delta
from shiradelta.models.names import Shape, find_names
from shiradelta.models.peft import WEIGHTS, parse_shira_key
from shiradelta.nonzeros.saved_state import load_state
from shiradelta.train.given import WeightNames, is_outside
from shiradelta.util.arrays import RepeatedPositionError, join_sorted

#: (name, shape if it is known, positions, values, the draw that the positions are of).
_Listed = tuple[str, Shape | None, Positions, Float32, Draw | None]


def read_adapter(
    source: str | os.PathLike[str], weights: Mapping[str, nn.Parameter], names: WeightNames, draws: dict[str, Draw]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Reads the nonzeros of an adapter: name of a weight -> positions [n], increasing, and float32 values [n].

    Args:
        source: a `.shd` file, or a PEFT SHiRA adapter (its folder or its safetensors file).
        weights: the model's weights by name.
        names: finds these weights by any of their names.
        draws: to it are added the draws that positions are of, by the checkpoint's names.

    Raises:
        SourceError: the source is neither, has tensors that the model does not have, or holds more than additions.
    """
    path = Path(source)
    tensors = list(_from_shd(path) if path.suffix == ".shd" else _from_peft(path, weights))
    found_names, unclear = names.find({name: shape for name, shape, _, _, _ in tensors})
    if unclear:
        raise SourceError(f"{path}: {next(iter(unclear.values()))} of the model; attach to the one that is meant")
    parts: dict[str, list[tuple[Positions, Float32]]] = {}
    for other, shape, positions, values, draw in tensors:
        if other not in found_names:
            raise SourceError(f"{path}: tensor {other!r} is not a target; attach to the model it was made for")
        held = 0
        for name, view in found_names[other]:
            if shape not in (None, view.shape):
                raise SourceError(
                    f"{path}: tensor {other!r} has shape {list(view.shape)} in the model, the adapter was made for"
                    f" {list(shape)}; attach to the model it was made for"
                )
            if is_outside(positions, view):
                raise SourceError(f"{path}: tensor {other!r} has positions outside of the model's {list(view.shape)}")
            if draw is not None and view.is_whole:
                draws[view.name] = draw
            order, where = view.to_weight(positions)
            parts.setdefault(name, []).append((where, values[order]))
            held += order.size
        if held < positions.size:  # the checkpoint has several weights in one tensor
            raise SourceError(
                f"{path}: tensor {other!r} changes weights that are not targets, beside"
                f" {', '.join(repr(name) for name, _ in found_names[other])}; give them all as targets"
            )
    found = {}
    for name, some in parts.items():
        try:
            positions, values = join_sorted(some)
        except RepeatedPositionError:
            raise SourceError(f"{path}: tensor {name!r} has a position twice; save the adapter again") from None
        found[name] = torch.from_numpy(positions), torch.from_numpy(values)
    return found


def _from_shd(path: Path) -> Iterator[_Listed]:
    with open_delta(path) as delta:
        for name, tensor in delta.items():
            if not tensor.operation.adds:
                raise SourceError(f"{path}: tensor {name!r} is {tensor.op}, not add; only additions can be trained on")
            yield name, tensor.shape, tensor.positions(), tensor.values().copy(), tensor.draw


def _from_peft(path: Path, weights: Mapping[str, nn.Parameter]) -> Iterator[_Listed]:
    held: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_state(path / WEIGHTS if path.is_dir() else path).items():
        parsed = parse_shira_key(key)
        if parsed is not None:
            held.setdefault(parsed[0], {})[parsed[1]] = tensor
    renamed = find_names(dict.fromkeys(held), dict.fromkeys(weights)).names
    for name, found in held.items():
        if set(found) != {"values", "indices"} or name not in renamed:
            raise SourceError(f"{path}: {name!r} is not a SHiRA layer of this model; give a SHiRA adapter or a .shd")
        columns = weights[renamed[name]].shape[-1]
        row, column = found["indices"].long().reshape(2, -1).numpy()  # PEFT stores float32 on Windows
        if column.size and (column.max() >= columns or column.min() < 0):
            raise SourceError(f"{path}: {name!r} has a column outside of the model's {columns}")
        yield renamed[name], None, row * columns + column, found["values"].float().numpy(), None
    if not held:
        raise SourceError(f"{path}: holds no SHiRA layers; give a PEFT SHiRA adapter or a .shd file")
