"""JSON files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from shiradelta.errors import SourceError
from shiradelta.util.lfs import LFS_POINTER, LFS_REMEDY, LFS_WHAT
from shiradelta.util.regular_file import open_regular

#: The most bytes that are read; the index of a model with 200,000 tensors has 30 million.
_MOST_BYTES = 100 << 20


def read_json(path: Path) -> Any:
    """The contents of a JSON file.

    Raises:
        SourceError: it cannot be read, is not JSON, or is too large or too deep to be a configuration or an index.
    """
    try:
        with open_regular(path) as stream:
            if os.fstat(stream.fileno()).st_size > _MOST_BYTES:
                raise SourceError(
                    f"{path}: has more than {_MOST_BYTES >> 20} MiB, too many for a JSON file; get it again"
                )
            raw = stream.read()
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    if raw.startswith(LFS_POINTER):
        raise SourceError(f"{path}: {LFS_WHAT}; {LFS_REMEDY}")
    try:
        return json.loads(raw.decode())
    except RecursionError:
        raise SourceError(f"{path}: its JSON is nested too deep; get it again") from None
    except ValueError as error:
        raise SourceError(f"{path}: is not JSON ({error}); get it again") from None
