"""Reads the texts to fit on."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from shiradelta.text.jsonl import TEXT, check_number, read_rows


def read_texts(
    source: str | os.PathLike[str] | Sequence[Any], log: Callable[[str], None] = lambda line: None
) -> list[Any]:
    """Reads the texts of a JSON Lines file with the key `text`; returns a sequence unchanged.

    Args:
        source: the file or the texts.
        log: called with a line of text if blank texts of the file are skipped.

    Raises:
        SourceError: the file cannot be read, a line has no text, or there are too few.
    """
    if isinstance(source, str | os.PathLike):
        path = os.fspath(source)

        def skipped(count: int) -> None:
            log(f"{path}: {count} blank {'text' if count == 1 else 'texts'} skipped")

        return [text for (text,) in read_rows(path, [TEXT], skipped)[1]]
    texts = list(source)
    check_number(len(texts), "the texts to fit on")
    return texts
