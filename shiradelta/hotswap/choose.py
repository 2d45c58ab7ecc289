"""Which backend a device's live tensors get."""

from __future__ import annotations

from importlib.util import find_spec

from shiradelta.backends.choose import choose
from shiradelta.errors import DeltaError, ShiraDeltaError
from shiradelta.hotswap.numpy import NumpyBackend
from shiradelta.hotswap.protocol import LiveBackend

BACKENDS = ("auto", "libshd", "numpy", "torch", "triton")


def new_backend(choice: str, device: str) -> LiveBackend:
    """A backend for a device, named as torch names it.

    Raises:
        DeltaError: no backend of this name, or it does not work there.
        ShiraDeltaError: it cannot be had, and why.
    """
    if choice not in BACKENDS:
        raise DeltaError(f"backend {choice!r} is unknown; take {', '.join(BACKENDS)}")
    on_cpu = device == "cpu"
    if choice in ("numpy", "libshd") and not on_cpu:
        raise DeltaError(f"backend {choice!r} works on a CPU, the model is on {device}; take torch, triton or auto")
    if choice == "auto":
        choice = choose().name if on_cpu else "triton" if device.startswith("cuda") and _has_triton() else "torch"
    if choice == "numpy":
        return NumpyBackend()
    if choice == "libshd":
        choose("libshd")  # says why, if it cannot be had
        from shiradelta.hotswap.libshd import NativeBackend

        return NativeBackend()
    if choice == "torch":
        from shiradelta.hotswap.torch import TorchBackend

        return TorchBackend(device)
    if not _has_triton():
        raise ShiraDeltaError("backend 'triton' cannot be had; install triton, or take torch")
    from shiradelta.hotswap.triton.backend import TritonBackend

    return TritonBackend(device)


def _has_triton() -> bool:
    return find_spec("triton") is not None
