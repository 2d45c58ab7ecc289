"""Fitting and training read examples with one reader."""

from __future__ import annotations

from pathlib import Path

import pytest

from shiradelta.errors import SourceError
from shiradelta.text.examples import KINDS
from shiradelta.text.jsonl import LEAST, TEXT, ExampleKind, read_rows
from shiradelta.text.texts import read_texts


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_a_file_may_begin_with_a_byte_order_mark(kind: ExampleKind, tmp_path: Path):
    path = tmp_path / "examples.jsonl"
    line = "{" + ", ".join(f'"{key}": "{key} ä"' for key in kind.keys) + "}\n"
    for mark in (b"", b"\xef\xbb\xbf"):
        path.write_bytes(mark + line.encode() * LEAST)
        assert read_rows(path, KINDS.values()) == (kind, [[f"{key} ä" for key in kind.keys]] * LEAST)


def test_texts_are_read_from_a_file_or_taken_as_they_are(tmp_path: Path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a", "label": 1}\n\n{"text": " "}\n' * LEAST)
    said: list[str] = []
    assert read_texts(path) == read_texts(str(path), said.append) == ["a"] * LEAST
    assert said == [f"{path}: {LEAST} blank texts skipped"]
    path.write_text('{"text": "  "}\n' * 99)
    with pytest.raises(SourceError, match="0 examples are too few"):
        read_texts(path)
    assert read_texts(range(LEAST)) == list(range(LEAST))
    with pytest.raises(SourceError, match="the texts to fit on: 9 examples are too few"):
        read_texts(range(LEAST - 1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "0 examples are too few"),
        ('{"text": "w1"}\n' * 9, "9 examples are too few"),
        ('{"text": "a"}\n\n{"text": "  "}\n', "line 3: the text of 'text' is blank; leave the line out"),
        ("no json\n", 'line 1: is not JSON; write one object a line, such as {"text": "..."} or {"prompt": "..."'),
        ('\n["b"]\n', 'line 2: is not an object; write {"text": "..."} or {"prompt"'),
        ('{"label": 1}\n', 'line 1: is no example, its keys are label; write {"text": "..."} or {"prompt": "..."'),
        ('{"text": 1}\n', "line 1: the value of 'text' is not a text"),
        ('{"text": "a"}\n{"prompt": "a", "completion": "b"}\n', "line 2: lacks the key 'text'; every line"),
        ('{"prompt": "a", "completion": " "}\n', "line 1: the text of 'completion' is blank"),
        ('{"prompt": "a"}\n', "line 1: is no example, its keys are prompt"),
        ('{"text": "a", "x": ' + "[" * 100_000 + "]" * 100_000 + "}\n", "line 1: is not JSON"),
        ('{"text": "\\ud800"}\n', "line 1: the text of 'text' has a lone surrogate"),
        (b'{"text": "\xe4"}\n', "is not UTF-8; save it as UTF-8"),
        (None, "cannot be read"),
    ],
)
def test_a_line_that_is_no_example_is_refused(content: str | bytes | None, message: str, tmp_path: Path):
    path = tmp_path / "examples.jsonl"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SourceError) as refused:
        read_rows(path, KINDS.values())
    assert str(path) in str(refused.value)
    assert message in str(refused.value)


def test_only_the_kinds_that_are_asked_for_are_taken(tmp_path: Path):
    path = tmp_path / "examples.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' * LEAST)
    with pytest.raises(SourceError, match=r'keys are prompt, completion; write \{"text": "..."\}$'):
        read_rows(path, [TEXT])
