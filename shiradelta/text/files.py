"""Files that examples name: sounds and pictures."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from shiradelta.errors import SourceError


def path_from(path: str, folder: Path | None, where: str) -> str:
    """A path from a folder on.

    Args:
        path: as an example has it.
        folder: the folder that it starts from; None leaves it as it is.
        where: the example, for messages.

    Raises:
        SourceError: it is a web address.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", path):
        raise SourceError(f"{where}: {path} is a web address, and nothing is downloaded; give the path of a file")
    return path if folder is None else str(folder / path)


def file_digest(path: str) -> str:
    """SHA-256 of a file.

    Raises:
        SourceError: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise unreadable(path, error) from None


def unreadable(where: str, error: OSError) -> SourceError:
    """The error of a file of an example that cannot be read."""
    return SourceError(f"{where}: cannot be read ({error.strerror}); check the path")
