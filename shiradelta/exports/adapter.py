"""Writes PEFT's adapter folders: the weights and the configuration, both or neither."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from shiradelta.format.arithmetic import Array
from shiradelta.format.registry import DTYPE_OF_NAME
from shiradelta.models.peft import CONFIG, WEIGHTS
from shiradelta.models.safetensors import Unwritten, write_tensors
from shiradelta.util.files import os_errors, replacing
from shiradelta.util.progress import Progress


def stored(name: str, shape: tuple[int, ...], dtype: str, read: Callable[[], Array]) -> Unwritten:
    """A tensor of an adapter; `read` gives an array of numbers of that dtype, by torch's name."""
    return Unwritten(name, shape, DTYPE_OF_NAME[dtype], read)


def write_adapter(
    folder: str | os.PathLike[str],
    config: Mapping[str, Any],
    modules: Iterable[str],
    base: str,
    tensors: Iterable[Unwritten],
    progress: Progress | None = None,
) -> None:
    """Writes an adapter's folder, which is created if it does not exist.

    Args:
        folder: the folder.
        config: what the configuration says of the adapter's type.
        modules: the names of the layers.
        base: `base_model_name_or_path`.
        tensors: the weights.
        progress: called with (tensor, done, total).

    Raises:
        TargetError: it cannot be written.
    """
    about = {
        **config,
        "target_modules": sorted(modules),
        "base_model_name_or_path": base,
        "task_type": None,
        "inference_mode": True,
    }
    target = Path(folder)
    existed = target.exists()
    with os_errors(target):
        target.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(target / CONFIG) as stream, replacing(target / WEIGHTS) as weights:
            stream.write(json.dumps(about, indent=1).encode())
            write_tensors(weights, tensors, {"format": "pt"}, progress)
    except BaseException:
        if not existed:
            with suppress(OSError):
                target.rmdir()
        raise
