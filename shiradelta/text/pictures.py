"""Pictures: files and images of Pillow, for models that see."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shiradelta.errors import SourceError
from shiradelta.text.files import file_digest, path_from, unreadable
from shiradelta.util.optional import importing


def check(value: Any, where: str) -> None:
    """Raises SourceError for a value that is neither a path nor an image of Pillow."""
    stored = isinstance(value, Mapping) and value.get("bytes")
    path = isinstance(value, str) and value.strip()
    if not path and not stored and not _is_image(value):
        raise SourceError(f"{where}: its image is no picture; give the path of a file, or an image of Pillow")


def placed(value: Any, folder: Path | None, where: str) -> Any:
    """A path from a folder on, or an image.

    Args:
        value: as `check` takes it.
        folder: the folder that paths start from; None leaves them as they are.
        where: the example, for messages.

    Raises:
        SourceError: the path is a web address, or the bytes are no picture.
        MissingDependencyError: Pillow, which reads them, is not installed.
    """
    if isinstance(value, str):
        return path_from(value, folder, where)
    return value if _is_image(value) else _opened(io.BytesIO(value["bytes"]), f"{where}: its image")


def open_picture(value: Any) -> Any:
    """The image, in red, green and blue.

    Raises:
        SourceError: the file is missing, or no picture.
        MissingDependencyError: Pillow is not installed.
    """
    return value.convert("RGB") if _is_image(value) else _opened(value, value)


def digest_of(value: Any) -> str:
    """SHA-256 of a file, or of an image's pixels.

    Raises:
        SourceError: the file cannot be read.
    """
    if isinstance(value, str):
        return file_digest(value)
    return hashlib.sha256(f"{value.size} {value.mode}".encode() + value.tobytes()).hexdigest()


def _is_image(value: Any) -> bool:
    return all(hasattr(value, name) for name in ("convert", "size", "mode", "tobytes"))


def _opened(file: str | io.BytesIO, where: str) -> Any:
    with importing("reading a picture"):
        from PIL import Image, UnidentifiedImageError
    try:
        with Image.open(file) as found:
            return found.convert("RGB")
    except UnidentifiedImageError:
        raise SourceError(f"{where}: is no picture that Pillow reads; convert it to PNG or JPEG") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.strerror:
            raise unreadable(where, error) from None
        raise SourceError(f"{where}: is a damaged picture ({error}); leave the example out") from None
