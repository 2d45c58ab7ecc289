"""One error for running out of memory, on the CPU or a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from shiradelta.errors import ShiraDeltaError

#: Messages of torch and its libraries for running out of memory, in lower case.
_SIGNS = ("out of memory", "not enough memory", "can't allocate memory", "alloc_failed")


@contextmanager
def advising_on_memory(advice: str) -> Iterator[None]:
    """Turns running out of memory into one line: "out of memory" and `advice`.

    Raises:
        ShiraDeltaError: memory ran out in the block.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ShiraDeltaError(f"out of memory{advice}") from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or not."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's own
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)


def gpu_peak(devices: Sequence[Any]) -> str:
    """What GPUs have held at most since the process began, as the end of a sentence; nothing of other devices."""
    import torch

    gpus = [device for device in map(torch.device, devices) if device.type == "cuda"]
    if not gpus:
        return ""
    held = [f"{torch.cuda.max_memory_allocated(device) / 1e9:.1f}" for device in gpus]
    return f", in {', '.join(held)} GB of {'its memory' if len(held) == 1 else 'theirs'} so far"
