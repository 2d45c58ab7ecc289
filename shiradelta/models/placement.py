"""Where a model is: on one device, or its layers spread over several of one machine, one after the other.

The devices work in turn, as with accelerate's `device_map="auto"`.  Here hooks move the inputs of a layer only, and no
module's forward pass is replaced, so that whatever else changes a forward pass still can.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from shiradelta.errors import ArgumentError, SourceError
from shiradelta.util.text import brief

#: Share of a GPU's free memory that what is known beforehand may take; the rest is for activations and gradients.
ROOM = 0.75


def pick_device(name: str | None) -> torch.device:
    """The device of that name, or the best available one.

    Raises:
        ArgumentError: the device cannot be used.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:  # its message lists all that torch has names for
        raise ArgumentError(f"{name!r} is no device; take {_available()}", argument="device") from None
    if device.type == "meta":
        raise ArgumentError(f"'{device}' computes nothing; take {_available()}", argument="device")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = brief(str(error).partition("\n")[0].partition(". ")[0], 80)
        raise ArgumentError(
            f"'{device}' cannot be used here ({reason}); take {_available()}", argument="device"
        ) from None


def _available() -> str:
    """The devices that are there, in words: "cpu, cuda:0 or cuda:1"."""
    there = torch.accelerator.is_available()
    other = torch.accelerator.current_accelerator() if there else None
    count = torch.accelerator.device_count() if there else 0
    *most, last = ["cpu", *(f"{other}:{index}" for index in range(count))]
    return f"{', '.join(most)} or {last}" if most else last


def pick_devices(names: str | Sequence[str] | None, need: Callable[[torch.device], float]) -> list[torch.device]:
    """The devices to work on.

    Args:
        names: "cpu", "cuda:1", "cuda:0,cuda:1", a list of such names, ...  "cuda", and None where there is a GPU, take
            one GPU if `need` is at most `ROOM` of what is free there, and otherwise all.
        need: bytes that are needed on a device beside activations and gradients.

    Raises:
        ArgumentError: a device cannot be used, or a GPU is named twice.
    """
    given = [name.strip() for name in (names.split(",") if isinstance(names, str) else names or ())]
    if len(given) > 1:
        devices = list(map(pick_device, given))
        gpus = [device for device in devices if device.type != "cpu"]
        if len(set(gpus)) < len(gpus):
            raise ArgumentError(f"{','.join(given)!r} names a GPU twice; name each once", argument="device")
        return devices
    name = given[0] if given else None
    first = pick_device(name)
    every = [torch.device("cuda", index) for index in range(torch.cuda.device_count())] if first.type == "cuda" else []
    if name in (None, "cuda") and len(every) > 1 and need(first) > ROOM * _free(first):
        return every
    return [first]


def main_device(devices: Sequence[torch.device]) -> torch.device:
    """The device that decides about precision and pace: the first that is no CPU, if there is one."""
    return next((device for device in devices if device.type != "cpu"), devices[0])


def named(devices: Sequence[torch.device]) -> str:
    """Devices in words: "cuda:0 and cuda:1"."""
    *most, last = map(str, devices)
    return f"{', '.join(most)} and {last}" if most else last


def devices_of(model: nn.Module) -> list[torch.device]:
    """The devices that a model's parameters are on.

    Raises:
        SourceError: some of them are nowhere, as after accelerate's offloading.
    """
    if lacking := next((name for name, parameter in model.named_parameters() if parameter.is_meta), None):
        raise SourceError(f"the model has no weights for {lacking!r}; load it without offloading")
    return list(dict.fromkeys(parameter.device for parameter in model.parameters()))


def place(model: nn.Module, devices: Sequence[torch.device]) -> nn.Module:
    """Moves a model to a device; or its layers to several, in order, each as many as it has memory for.

    What comes before the layers is on the first device, what comes after them on the last.  A forward pass leaves
    each output where it was made.

    Raises:
        SourceError: a model for several devices has no lists of layers, or these share weights.
    """
    if len(devices) == 1:
        return model.to(devices[0])
    holders, homes = _plan(model, devices)
    for module, number in homes:
        device = devices[number]
        module.to(device)
        module.register_forward_pre_hook(partial(_move_inputs, device), with_kwargs=True)
    for holder in holders:  # what they have themselves
        holder._apply(lambda tensor: tensor.to(devices[0]), recurse=False)  # type: ignore[no-untyped-call]
    return model


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers of a model, in order: what is in its lists of several modules, but not in lists within these."""
    return [layer for layers in layer_lists(model) for layer in layers]


def layer_lists(model: nn.Module) -> list[list[nn.Module]]:
    """The same, list by list."""
    found: list[list[nn.Module]] = []
    for child in model.children():
        found += [list(child.children())] if _is_list(child) else layer_lists(child)
    return found


def layers_by_device(model: nn.Module) -> str:
    """How many layers each device has, in words: "16 on cuda:0, 16 on cuda:1"."""
    first = (next(layer.parameters(), None) for layer in layers_of(model))
    where = [parameter.device for parameter in first if parameter is not None]
    return ", ".join(f"{where.count(device)} on {device}" for device in dict.fromkeys(where))


@dataclass(frozen=True)
class _Unit:
    """Modules that have to be on one device: a layer, or what a model has between two lists of layers."""

    modules: list[nn.Module]
    is_layer: bool

    @property
    def nbytes(self) -> int:
        """Bytes of the weights; at least 1, so that layers without any are shared out as well."""
        return max(1, sum(parameter.nbytes for module in self.modules for parameter in module.parameters()))


def _parts(model: nn.Module) -> tuple[list[nn.Module], list[_Unit]]:
    """(modules that have lists of layers in them, all others in order)."""
    holders: list[nn.Module] = []
    units: list[_Unit] = []

    def walk(module: nn.Module) -> None:
        holders.append(module)
        for child in module.children():
            if _is_list(child):
                units.extend(_Unit([layer], True) for layer in child.children())
            elif any(map(_is_list, child.modules())):
                walk(child)
            elif units and not units[-1].is_layer:
                units[-1].modules.append(child)
            else:
                units.append(_Unit([child], False))

    walk(model)
    return holders, units


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList) and len(module) > 1


def _plan(model: nn.Module, devices: Sequence[torch.device]) -> tuple[list[nn.Module], list[tuple[nn.Module, int]]]:
    """(modules that have lists of layers in them, (module, the number of its device) for all others)."""
    holders, units = _parts(model)
    if not any(unit.is_layer for unit in units):
        raise SourceError(f"{type(model).__name__} has no list of layers to spread over devices; name one device")
    where = _shared_out([unit.nbytes for unit in units], _room(devices))
    where[0] = 0
    where[-1] = len(devices) - 1
    homes: list[tuple[nn.Module, int]] = []
    seen: dict[int, int] = {}
    for unit, number in zip(units, where, strict=True):
        if not unit.is_layer:  # a head that is tied to the embedding is beside it, with whatever is beside the head
            tied = (seen.get(id(parameter)) for module in unit.modules for parameter in module.parameters())
            number = next((home for home in tied if home is not None), number)
        for module in unit.modules:
            for name, parameter in module.named_parameters():
                if seen.setdefault(id(parameter), number) != number:
                    raise SourceError(f"layers on two devices share {name!r}; name one device")
            if any(True for _ in module.parameters()):
                homes.append((module, number))
            elif any(True for _ in module.buffers()):  # makes something of the inputs, such as angles of positions
                homes.append((module, 0))
    return holders, homes


def _shared_out(sizes: Sequence[int], room: Sequence[float]) -> list[int]:
    """The number of a device for each of some things in order, so that each has its share by the room there is."""
    total, whole = sum(sizes), sum(room)
    ends = [total * end / whole for end in accumulate(room)]
    middles = [end - size / 2 for size, end in zip(sizes, accumulate(sizes), strict=True)]
    last = len(room) - 1
    return [min(last, sum(middle > end for end in ends)) for middle in middles]


def _room(devices: Sequence[torch.device]) -> list[float]:
    """What share of a model each device is to have: a GPU by its free memory, another device as much as a GPU."""
    free = {device: _free(device) for device in devices if device.type == "cuda"}
    other = sum(free.values()) / len(free) if free else 1.0
    return [free.get(device, other) for device in devices]


def _free(device: torch.device) -> float:
    """Bytes that are free on a GPU."""
    return float(torch.cuda.mem_get_info(device)[0])


def _move_inputs(
    device: torch.device, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[Any, Any]:
    """A hook: a module gets its inputs on its own device."""
    return _moved(arguments, device), _moved(keywords, device)


def _moved(value: Any, device: torch.device) -> Any:
    """Tensors, in tuples, lists and dicts, on a device; anything else as it is: caches follow what is put into them."""
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(_moved(item, device) for item in value)
    if type(value) is dict:
        return {key: _moved(item, device) for key, item in value.items()}
    return value
