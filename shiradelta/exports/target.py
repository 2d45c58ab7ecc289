"""The files that exports write: what may be replaced."""

from __future__ import annotations

from pathlib import Path

from shiradelta.errors import SourceError, TargetError
from shiradelta.models.safetensors import read_shard
from shiradelta.util.files import check_target


def check_file(path: Path) -> None:
    """Checks, before long work, that a safetensors file can be written and replaces none of another kind.

    Raises:
        TargetError: it cannot be written, or a file of another kind is there.
    """
    check_target(path, b"", "a safetensors file")
    if path.exists() and path.stat().st_size:
        try:
            read_shard(path)
        except SourceError:
            raise TargetError(
                f"{path}: is there and is not a safetensors file, so it is not replaced; give another name"
            ) from None
