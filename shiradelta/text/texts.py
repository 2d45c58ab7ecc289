"""The texts to fit on."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from shiradelta.errors import SourceError

#: Fewer leave nothing to measure on.
LEAST = 10


def read_texts(source: str | os.PathLike[str] | Sequence[Any]) -> list[Any]:
    """A JSON Lines file with the key `text`, or a sequence as it is.

    Raises:
        SourceError: a line that is none, or too few texts.
    """
    if isinstance(source, str | os.PathLike):
        texts: list[Any] = _read(Path(source))
        where = os.fspath(source)
    else:
        texts, where = list(source), "the texts to fit on"
    if len(texts) < LEAST:
        raise SourceError(f"{where}: {len(texts)} texts are too few to fit on; give {LEAST}, better some thousands")
    return texts


def _read(path: Path) -> list[str]:
    texts = []
    try:
        with open(path, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                text = _text(line, f"{path}, line {number}")
                if text.strip():
                    texts.append(text)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError:
        raise SourceError(f"{path}: is not UTF-8; save it as UTF-8") from None
    return texts


def _text(line: str, where: str) -> str:
    """The text of one line."""
    try:
        found = json.loads(line)
    except ValueError:
        raise SourceError(f'{where}: is not JSON; write one object a line, such as {{"text": "..."}}') from None
    if isinstance(found, dict) and "text" not in found:
        keys = ", ".join(map(str, list(found)[:3]))
        raise SourceError(f"{where}: has no key 'text', only {keys or 'nothing'}; rename the key that holds the text")
    if not isinstance(found, dict) or not isinstance(found["text"], str):
        raise SourceError(f'{where}: is not an object with a text, such as {{"text": "..."}}')
    text: str = found["text"]
    return text


def split(count: int, held_out: int, seed: int) -> tuple[list[int], list[int]]:
    """Indices to fit on, and indices to measure on: at most a fifth."""
    order = random.Random(seed).sample(range(count), count)
    cut = min(held_out, count // 5)
    return order[cut:], sorted(order[:cut])


def batches(indices: Sequence[int], lengths: Sequence[int], size: int, seed: int) -> Iterator[list[int]]:
    """Batches without end, each of texts of like length, so that few tokens are padding.

    An epoch's order depends on `seed` and its number alone, so that a resumed run sees the same batches.
    """
    size = min(size, len(indices))
    epoch = 0
    while True:
        rng = random.Random(f"{seed} {epoch}")
        # What does not fill a batch is left out before the sorting: after it, it would always be the longest.
        taken = rng.sample(indices, len(indices) // size * size)
        taken.sort(key=lambda index: lengths[index])
        parts = [taken[i : i + size] for i in range(0, len(taken), size)]
        rng.shuffle(parts)
        yield from parts
        epoch += 1
