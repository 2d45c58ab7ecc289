"""Fitting and training read examples with one reader."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shiradelta.errors import MissingDependencyError, SourceError
from shiradelta.text.kinds import COMPLETION, KINDS, MESSAGES, TEXT, ExampleKind
from shiradelta.text.read import LEAST, ExampleSet, read_file, read_list

ASKED: list[dict[str, str]] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def example(kind: ExampleKind) -> dict[str, Any]:
    return {key: ASKED if kind is MESSAGES else f"{key} ä" for key in kind.keys}


def write(path: Path, *examples: Any) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in examples))
    return path


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_a_file_may_begin_with_a_byte_order_mark(kind: ExampleKind, tmp_path: Path):
    path = tmp_path / "examples.jsonl"
    line = json.dumps(example(kind), ensure_ascii=False) + "\n"
    for mark in (b"", b"\xef\xbb\xbf"):
        path.write_bytes(mark + line.encode() * LEAST)
        assert read_file(path) == ExampleSet(kind, [kind.row(example(kind), "", tmp_path)] * LEAST)


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_a_list_has_what_a_file_has(kind: ExampleKind):
    found = read_list([example(kind)] * LEAST)
    assert found == ExampleSet(kind, [kind.row(example(kind), "")] * LEAST)
    assert found.plain == [example(kind) if kind is not TEXT else "text ä"] * LEAST
    assert read_list(["a"] * LEAST) == ExampleSet(TEXT, [["a"]] * LEAST)
    assert read_list([*range(LEAST)]) is None
    with pytest.raises(SourceError, match="example 2: lacks the key"):
        read_list([example(kind), {}])


def test_blank_texts_are_skipped_where_that_is_asked_for(tmp_path: Path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a", "label": 1}\n\n{"text": " "}\n' * LEAST)
    told: list[int] = []
    assert read_file(path, skipped=told.append).plain == ["a"] * LEAST
    assert told == [LEAST]
    path.write_text('{"text": "  "}\n' * 99)
    with pytest.raises(SourceError, match="0 examples are too few"):
        read_file(path, skipped=told.append)


def test_one_column_is_taken(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", *[{"question": "q", "text": "a", "chat": ASKED}] * LEAST)
    assert read_file(path).plain == ["a"] * LEAST
    assert read_file(f"{path}:question").plain == ["q"] * LEAST
    chats = read_file(f"{path}:chat")
    assert (chats.kind.keys, chats.rows) == (("chat",), [[ASKED]] * LEAST)
    with pytest.raises(SourceError, match=r'a.jsonl, line 1: is no example, its keys are .*write \{"answer": ...\}'):
        read_file(f"{path}:answer")
    other = write(tmp_path / "a.jsonl:text", *[{"text": "b"}] * LEAST)
    assert read_file(other).plain == ["b"] * LEAST


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "0 examples are too few"),
        ('{"text": "w1"}\n' * 9, "9 examples are too few"),
        ('{"text": "a"}\n\n{"text": "  "}\n', "line 3: the text of 'text' is blank; leave the example out"),
        ("no json\n", 'line 1: is not JSON; write one object a line, such as {"text": "..."} or {"prompt": "..."'),
        ('\n["b"]\n', 'line 2: is not an object; write {"text": "..."} or {"prompt"'),
        ('{"label": 1}\n', 'line 1: is no example, its keys are label; write {"text": "..."} or {"prompt": "..."'),
        ('{"text": 1}\n', "line 1: the value of 'text' is not a text"),
        ('{"text": "a"}\n{"prompt": "a", "completion": "b"}\n', "line 2: lacks the key 'text'; every example"),
        ('{"prompt": "a", "completion": " "}\n', "line 1: the text of 'completion' is blank"),
        ('{"prompt": "a"}\n', "line 1: is no example, its keys are prompt"),
        ('{"text": "a", "x": ' + "[" * 100_000 + "]" * 100_000 + "}\n", "line 1: is not JSON"),
        ('{"text": "\\ud800"}\n', "line 1: the text of 'text' has a lone surrogate"),
        ('{"messages": "a"}\n', "line 1: the value of 'messages' is not a list of messages"),
        ('{"messages": ["a"]}\n', "line 1: message 1 of 'messages' is not an object"),
        ('{"messages": [{"role": "user"}]}\n', "line 1: the value of 'content of message 1' is not a text"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', "line 1: the assistant says nothing in 'messages'"),
        ('{"messages": [{"role": "assistant", "content": " "}]}\n', "the assistant says nothing in 'messages'"),
        (b'{"text": "\xe4"}\n', "is not UTF-8; save it as UTF-8"),
        (None, "cannot be read"),
    ],
)
def test_a_line_that_is_no_example_is_refused(content: str | bytes | None, message: str, tmp_path: Path):
    path = tmp_path / "examples.jsonl"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SourceError) as refused:
        read_file(path)
    assert str(path) in str(refused.value)
    assert message in str(refused.value)


def test_only_the_kinds_that_are_asked_for_are_taken(tmp_path: Path):
    path = write(tmp_path / "examples.jsonl", *[{"prompt": "a", "completion": "b"}] * LEAST)
    with pytest.raises(SourceError, match=r'keys are prompt, completion; write \{"text": "..."\}$'):
        read_file(path, [TEXT])


class Rows(list):
    """Stands for `datasets`' tables, as far as they are read."""


class Splits(dict):
    pass


def stand_in(saved: Any, read: list[str]) -> Any:
    """The part of the package `datasets` that is called."""

    def from_parquet(files: list[str]) -> Rows:
        read.extend(Path(file).name for file in files)
        return Rows([{"prompt": "a", "completion": "b"}] * LEAST)

    errors = SimpleNamespace(DatasetsError=KeyError)
    tables = SimpleNamespace(from_parquet=from_parquet)
    return SimpleNamespace(Dataset=tables, DatasetDict=Splits, exceptions=errors, load_from_disk=lambda path: saved)


def test_data_sets_are_read_by_their_own_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Parquet files, by their split if a folder has several; what `save_to_disk` wrote; not without the package."""
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    files = [folder / "data" / name for name in ("test-0.parquet", "train-1.parquet", "train-0.parquet")]
    for file in files:
        file.touch()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match="needs datasets, which is not installed; pip install datasets"):
        read_file(files[0])
    read: list[str] = []
    monkeypatch.setitem(sys.modules, "datasets", stand_in(None, read))
    assert read_file(files[0]).kind is read_file(folder).kind is COMPLETION
    assert read == ["test-0.parquet", "train-0.parquet", "train-1.parquet"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="is a folder with neither Parquet files nor what save_to_disk writes"):
        read_file(tmp_path / "empty")
    for file in files[1:]:
        file.rename(file.with_stem(file.stem.replace("train", "valid")))
    with pytest.raises(SourceError, match="has the splits test, valid and none called train"):
        read_file(folder)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_dict.json").touch()
    saved = Splits(test=Rows(), train=Rows([{"text": "a"}] * LEAST))
    monkeypatch.setitem(sys.modules, "datasets", stand_in(saved, read))
    assert read_file(tmp_path / "saved").plain == ["a"] * LEAST
    saved["train"][3] = {"text": 3}
    with pytest.raises(SourceError, match="saved, row 4: the value of 'text' is not a text"):
        read_file(tmp_path / "saved")


def test_data_sets_of_the_package_itself(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"messages": ASKED, "text": "a"}] * LEAST)
    rows.to_parquet(str(tmp_path / "a.parquet"))
    rows.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict(train=rows).save_to_disk(str(tmp_path / "splits"))
    for name in ("a.parquet", "saved", "splits"):
        assert read_file(tmp_path / name).plain == ["a"] * LEAST
        assert read_file(f"{tmp_path / name}:messages").rows == [[ASKED]] * LEAST
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    with pytest.raises(SourceError, match="datasets cannot read it"):
        read_file(tmp_path / "b.parquet")
