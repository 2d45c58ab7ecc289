"""Chooses the backend that works on the live tensors of a device."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from shiradelta.backends.choose import AUTO, choose
from shiradelta.errors import ArgumentError, ShiraDeltaError
from shiradelta.hotswap.protocol import LiveBackend
from shiradelta.util.optional import require
from shiradelta.util.registry import Registry


@dataclass(frozen=True)
class DeviceBackend:
    """A row of `LIVE_BACKENDS`.

    Attributes:
        name: what a user calls it.
        works_on: whether it works on a device, given by torch's name for it.
        is_automatic_on: whether "auto" may take it there.
        check: raises ShiraDeltaError with the reason if it is not available on this machine.
        make: makes the backend of a device.
    """

    name: str
    works_on: Callable[[str], bool]
    is_automatic_on: Callable[[str], bool]
    check: Callable[[], object]
    make: Callable[[str], LiveBackend]


def _is_cpu(device: str) -> bool:
    return device == "cpu"


def _is_gpu(device: str) -> bool:
    return device.startswith("cuda")


def _runs_triton(device: str) -> bool:
    """GPUs, and the CPU where Triton's interpreter is on."""
    return _is_gpu(device) or (_is_cpu(device) and os.environ.get("TRITON_INTERPRET") == "1")


def _everywhere(device: str) -> bool:
    return True


def _libshd(device: str) -> LiveBackend:
    from shiradelta.hotswap.libshd import NativeBackend

    return NativeBackend()


def _numpy(device: str) -> LiveBackend:
    from shiradelta.hotswap.numpy import NumpyBackend

    return NumpyBackend()


def _triton(device: str) -> LiveBackend:
    from shiradelta.hotswap.triton.backend import TritonBackend

    return TritonBackend(device)


def _torch(device: str) -> LiveBackend:
    from shiradelta.hotswap.torch import TorchBackend

    return TorchBackend(device)


def _needs(package: str) -> Callable[[], None]:
    return lambda: require(package, f"backend {package!r}")


#: The fastest first: "auto" takes the first available one that is automatic on the device.
LIVE_BACKENDS: Registry[DeviceBackend] = Registry(
    "backend",
    (
        DeviceBackend("libshd", _is_cpu, _is_cpu, lambda: choose("libshd"), _libshd),
        DeviceBackend("numpy", _is_cpu, _is_cpu, lambda: None, _numpy),
        DeviceBackend("triton", _runs_triton, _is_gpu, _needs("triton"), _triton),
        DeviceBackend("torch", _everywhere, _everywhere, _needs("torch"), _torch),
    ),
)


def new_backend(choice: str, device: str) -> LiveBackend:
    """Makes the backend of a device, given by torch's name for it.

    Raises:
        ArgumentError: no backend has this name, or it does not work on the device.
        ShiraDeltaError: the backend is not available; the message says why.
    """
    if choice == AUTO:
        return _first(device).make(device)
    if choice not in LIVE_BACKENDS:
        raise ArgumentError(f"backend {choice!r} is unknown; take {', '.join((AUTO, *LIVE_BACKENDS))}")
    row = LIVE_BACKENDS[choice]
    if not row.works_on(device):
        others = ", ".join(name for name, other in LIVE_BACKENDS.items() if other.works_on(device))
        raise ArgumentError(f"backend {choice!r} does not work on {device}, where the model is; take {AUTO}, {others}")
    row.check()
    return row.make(device)


def _first(device: str) -> DeviceBackend:
    """The first available backend that is automatic on the device; if there is none, the last one's error is raised."""
    rows = [row for row in LIVE_BACKENDS.values() if row.is_automatic_on(device)]
    for row in rows:
        try:
            row.check()
        except ShiraDeltaError:
            continue
        return row
    rows[-1].check()
    return rows[-1]
