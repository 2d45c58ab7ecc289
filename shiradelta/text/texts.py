"""Reads the texts to fit on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from shiradelta.text.jsonl import TEXT, check_number, read_rows


def read_texts(source: str | os.PathLike[str] | Sequence[Any]) -> list[Any]:
    """Reads the texts of a JSON Lines file with the key `text`; returns a sequence unchanged.

    Raises:
        SourceError: the file cannot be read, a line has no text, or there are too few.
    """
    if isinstance(source, str | os.PathLike):
        return [text for (text,) in read_rows(source, [TEXT])[1]]
    texts = list(source)
    check_number(len(texts), "the texts to fit on")
    return texts
