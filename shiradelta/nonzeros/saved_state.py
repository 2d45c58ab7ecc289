"""Tensors of an unfinished run on disk: a safetensors file, so that nothing is unpickled."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from shiradelta.errors import SourceError
from shiradelta.util.files import replacing


def save_state(
    path: str | os.PathLike[str], state: Mapping[str, Tensor], about: Mapping[str, str] | None = None
) -> None:
    """Puts it in place atomically.

    Args:
        path: the file.
        state: tensors by name.
        about: strings to keep with them.
    """
    from safetensors.torch import save

    with replacing(Path(path)) as stream:
        stream.write(save({name: tensor.contiguous() for name, tensor in state.items()}, dict(about or {})))


def load_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Tensors by name.

    Raises:
        SourceError: it is no such file.
    """
    return load_with_about(path)[0]


def load_with_about(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors by name, the strings that were kept with them).

    Raises:
        SourceError: it is no such file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), "pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            return tensors, dict(stored.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise SourceError(f"{path}: is no state of an unfinished run ({error}); move it away") from None
