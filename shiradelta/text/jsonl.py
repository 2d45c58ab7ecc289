"""Reads JSON Lines: one JSON object per line, in UTF-8, with or without a byte order mark."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shiradelta.errors import SourceError
from shiradelta.io.recognise import Wanted, explain


def json_lines(path: Path, shapes: str) -> Iterator[tuple[str, Any]]:
    """(where the line is, its value) of each line that is not empty.

    Args:
        path: the file.
        shapes: what a line may be, for messages.

    Raises:
        SourceError: the file cannot be read, or a line is not JSON.
    """
    if (message := explain(path, Wanted.TEXTS)) is not None:
        raise SourceError(message)
    try:
        with open(path, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    where = f"{path}, line {number}"
                    yield where, _parsed(line, where, shapes)
    except IsADirectoryError:
        raise SourceError(
            f"{path}: is a folder with neither Parquet files nor what save_to_disk writes; give a file or a data set"
        ) from None
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError:
        raise SourceError(f"{path}: is not UTF-8; save it as UTF-8") from None


def _parsed(line: str, where: str, shapes: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):  # the latter where it is nested deeper than any example
        raise SourceError(f"{where}: is not JSON; write one object a line, such as {shapes}") from None
