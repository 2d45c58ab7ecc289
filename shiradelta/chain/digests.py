"""Digests of files, and whether a file is the one that was published."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO

from shiradelta.errors import ChainError
from shiradelta.util.regular_file import open_regular

_CHUNK = 1 << 20


def check_file(path: Path, size: int, sha256: str, where: str) -> None:
    """Checks that a file is the one that was published.

    Raises:
        ChainError: it is not, or cannot be read.
    """
    try:
        found = digest_of_file(path)
    except OSError as error:
        raise ChainError("missing_file", where, error.strerror or "") from None
    if found != (size, sha256):
        raise ChainError("wrong_bytes", where, f"{found[0]:,} bytes, SHA-256 {found[1][:16]}...")


def digest_of_file(path: Path) -> tuple[int, str]:
    """(size, SHA-256) of a file."""
    with open_regular(path) as stream:
        return copied_with_digest(stream, None)


def copied_with_digest(source: BinaryIO, target: BinaryIO | None) -> tuple[int, str]:
    """Copies all that is left of a file, if there is a target; (size, SHA-256) of it."""
    digest, size = hashlib.sha256(), 0
    while chunk := source.read(_CHUNK):
        digest.update(chunk)
        size += len(chunk)
        if target is not None:
            target.write(chunk)
    return size, digest.hexdigest()
