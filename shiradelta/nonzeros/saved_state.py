"""The state of an unfinished run on disk: a safetensors file, so that loading unpickles nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from shiradelta.errors import SourceError
from shiradelta.util.files import replacing
from shiradelta.util.optional import importing


def save_state(
    path: str | os.PathLike[str], state: Mapping[str, Tensor], about: Mapping[str, str] | None = None
) -> None:
    """Writes a state atomically.

    Args:
        path: the file.
        state: tensors by name.
        about: strings to store with them.
    """
    with importing("saving an unfinished run"):
        from safetensors.torch import save

    with replacing(Path(path)) as stream:
        stream.write(save({name: tensor.contiguous() for name, tensor in state.items()}, dict(about or {})))


def load_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Reads a state: tensors by name.

    Raises:
        SourceError: the file is not a state.
    """
    return load_with_about(path)[0]


def load_with_about(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads a state: (tensors by name, the strings stored with them).

    Raises:
        SourceError: the file is not a state.
    """
    with importing("an unfinished run"):
        from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), "pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            return tensors, dict(stored.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise SourceError(f"{path}: is not the state of an unfinished run ({error}); move it away") from None
