"""The files that exports write: what may be replaced."""

from __future__ import annotations

import os
from pathlib import Path

from shiradelta.errors import SourceError, TargetError
from shiradelta.models.safetensors import read_shard
from shiradelta.util.files import check_target


def check_file(path: Path, model: str | os.PathLike[str] | None = None) -> None:
    """Checks, before long work, that a safetensors file can be written and replaces none of another kind.

    Args:
        path: the file to write.
        model: a model that is read, whose own files are not replaced.

    Raises:
        TargetError: it cannot be written, or a file of another kind or of the model is there.
    """
    if model is not None and path.exists() and path.resolve().is_relative_to(Path(model).resolve()):
        raise TargetError(f"{path}: is a file of the model that is read, so it is not replaced; give another name")
    check_target(path, b"", "a safetensors file")
    if path.exists() and path.stat().st_size:
        try:
            read_shard(path)
        except SourceError:
            raise TargetError(
                f"{path}: is there and is not a safetensors file, so it is not replaced; give another name"
            ) from None
