"""Damages files of examples: JSON Lines of texts, of prompts with completions, of conversations, of pairs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from random import Random
from typing import Any

from shiradelta.text.kinds import KINDS, MESSAGES, ExampleKind
from shiradelta.text.read import LEAST, read_file
from tests.source_files import Raw, Strange, as_json
from tests.strange_sources import damaged_bytes, damaged_value

_WORDS = ("one", "ä", "two words", "日本", "\U0001f600", "a\u2028b", "\\n", '"', " ")


def whole_texts(rng: Random) -> list[dict[str, Any]]:
    """Examples of one kind, as a file's lines."""
    kind = rng.choice([*KINDS.values()])
    return [
        {key: _value(kind, f"{rng.choice(_WORDS)} {i}") for key in kind.keys} | rng.choice(({}, {"label": i}))
        for i in range(LEAST + rng.randrange(5))
    ]


def _value(kind: ExampleKind, text: str) -> Any:
    return [{"role": role, "content": text} for role in ("user", "assistant")] if kind is MESSAGES else text


def damaged_texts(rng: Random) -> Strange:
    """A file of examples with a change in a line, between lines or in its bytes; sometimes none."""
    rows = [as_json(row) for row in whole_texts(rng)]
    for _ in range(rng.choice((0, 1, 1, 2))):
        at, action = rng.randrange(len(rows)), rng.random()
        if action < 0.6:
            row = rows[at]
            for _ in range(rng.choice((1, 2))):
                row = _changed(rng, row)
            rows[at] = row
        elif action < 0.7:
            del rows[at]
        elif action < 0.8:
            rows[at : at + 1] = [rows[at], rng.choice((b"", b" ", b"\t", rows[at][::-1]))]
        elif action < 0.9:
            rows[at] = rng.choice((b"[" * 100_000, b'{"a":' * 100_000, b"\xff", b"1" * 10_000, b"null", b"\0"))
        else:
            rows = rows[:at] + rows[at + 1 :] * rng.choice((1, 40))
        if not rows:
            break
    data = rng.choice((b"\n", b"\n", b"\r\n", b"\n\n", b"\r", b" ")).join(rows) + rng.choice((b"\n", b""))
    if rng.random() < 0.2:
        data = damaged_bytes(rng, data)
    elif rng.random() < 0.1:
        data = data.decode("utf-8", "replace").encode(rng.choice(("utf-16", "utf-8-sig", "utf-32", "utf-7")))
    return Strange("texts", {f"source/{rng.choice(('x.jsonl', 'x.json', 'x'))}": Raw(data)}, "source", None)


def _changed(rng: Random, row: bytes) -> bytes:
    try:
        return as_json(damaged_value(rng, copy.deepcopy(json.loads(row))))
    except (ValueError, RecursionError):
        return damaged_bytes(rng, row)


def read_strange_texts(strange: Strange, root: Path) -> str:
    """Reads a file of examples as `train` and `convert --fit` do; what it found."""
    (name,) = strange.files
    found = read_file(root / name)
    for value in (value for row in found.rows for value in row):
        said = [message["content"] for message in value] if isinstance(value, list) else [value]
        assert said[-1].strip() or isinstance(value, list), "a blank text"
        for text in said:
            text.encode()  # as every tokenizer does
    return f"{found.kind.name} read"
