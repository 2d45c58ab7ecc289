"""Safetensors headers: the reader takes and refuses what the safetensors library does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from shiradelta.errors import SourceError
from shiradelta.models.checkpoint import open_checkpoint
from shiradelta.models.safetensors import read_shard


def entry(begin: int, end: int, shape: list[Any] | None = None) -> dict[str, Any]:
    """A header's entry for a float32 tensor."""
    return {"dtype": "F32", "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def text(begin: int, end: int) -> str:
    """The same as JSON."""
    return json.dumps(entry(begin, end))


#: What is wrong or odd -> (header as a mapping or as bytes, size of the data).
HEADERS: dict[str, tuple[dict[str, Any] | bytes, int]] = {
    "plain": ({"a": entry(0, 4), "b": entry(4, 12)}, 12),
    "null metadata": ({"__metadata__": None, "a": entry(0, 8)}, 8),
    "metadata": ({"__metadata__": {"format": "pt"}, "a": entry(0, 8)}, 8),
    "a number in the metadata": ({"__metadata__": {"a": 1}, "a": entry(0, 8)}, 8),
    "a null in the metadata": ({"__metadata__": {"a": None}, "a": entry(0, 8)}, 8),
    "a list as metadata": ({"__metadata__": [], "a": entry(0, 8)}, 8),
    "a name twice": (f'{{"a":{text(0, 4)},"a":{text(4, 8)}}}'.encode(), 8),
    "the metadata twice": (f'{{"__metadata__":{{}},"__metadata__":{{}},"a":{text(0, 4)}}}'.encode(), 4),
    "a key twice in the metadata": (f'{{"__metadata__":{{"x":"1","x":"2"}},"a":{text(0, 4)}}}'.encode(), 4),
    "a field twice": (b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 4),
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, 12),
    "the same bytes twice": ({"a": entry(0, 8), "b": entry(0, 8)}, 8),
    "a hole": ({"a": entry(0, 4), "b": entry(8, 12)}, 12),
    "a hole before the first": ({"a": entry(4, 8)}, 8),
    "bytes after the last": ({"a": entry(0, 4)}, 8),
    "cut off": ({"a": entry(0, 8)}, 4),
    "no tensor": ({}, 0),
    "bytes and no tensor": ({}, 4),
    "an empty tensor between": ({"a": entry(0, 4), "z": entry(4, 4), "b": entry(4, 8)}, 8),
    "an empty tensor inside another": ({"a": entry(0, 8), "z": entry(4, 4)}, 8),
    "out of order": ({"b": entry(4, 8), "a": entry(0, 4)}, 8),
    "an unknown field": ({"a": entry(0, 4) | {"extra": 1}}, 4),
    "three offsets": ({"a": entry(0, 4) | {"data_offsets": [0, 4, 4]}}, 4),
    "a negative size": ({"a": entry(0, 4, [-1])}, 4),
    "a float as size": ({"a": entry(0, 4, [1.0])}, 4),
    "a boolean as size": ({"a": entry(0, 4, [True])}, 4),
    "another shape": ({"a": entry(0, 4, [2])}, 4),
    "a scalar": ({"a": entry(0, 4, [])}, 4),
    "a product over 64 bits": ({"a": entry(0, 0, [2**63, 2**63, 0])}, 0),
    "a product over 64 bits after 0": ({"a": entry(0, 0, [0, 2**63, 2**63])}, 0),
    "a size over 64 bits": ({"a": entry(0, 0, [0, 2**64])}, 0),
    "spaces before": (f'  {{"a":{text(0, 4)}}}'.encode(), 4),
    "spaces after": (f'{{"a":{text(0, 4)}}}  '.encode(), 4),
    "zeros after": (f'{{"a":{text(0, 4)}}}\0\0'.encode(), 4),
    "a byte order mark": (f'\ufeff{{"a":{text(0, 4)}}}'.encode(), 4),
    "UTF-16": (f'{{"a":{text(0, 4)}}}'.encode("utf-16-le"), 4),
    "not UTF-8": (b'{"\xff":' + text(0, 4).encode() + b"}", 4),
    "a lone surrogate": (f'{{"\\ud800":{text(0, 4)}}}'.encode(), 4),
    "a list": (b"[]", 0),
    "nothing": (b"", 0),
    "a null as tensor": ({"a": None}, 0),
    "no offsets": ({"a": {"dtype": "F32", "shape": [1]}}, 4),
    "an unknown dtype": ({"a": entry(0, 4) | {"dtype": "F31"}}, 4),
}


def write(path: Path, header: dict[str, Any] | bytes, size: int) -> Path:
    """A file of this header, and zeros as data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(size))
    return path


@pytest.mark.parametrize("case", HEADERS)
def test_headers_are_taken_and_refused_as_the_library_does(tmp_path: Path, case: str):
    file = write(tmp_path / "x.safetensors", *HEADERS[case])
    try:
        with safe_open(file, "np") as opened:
            expected = sorted(opened.keys()), opened.metadata() or {}
    except SafetensorError:
        with pytest.raises(SourceError, match=r"x\.safetensors: .*(get it again|do not know)"):
            read_shard(file)
        return
    shard = read_shard(file)
    assert (sorted(slot.name for slot in shard.slots), shard.metadata) == expected


def test_the_same_entry_twice_is_refused_although_the_library_takes_it(tmp_path: Path):
    file = write(tmp_path / "x.safetensors", f'{{"a":{text(0, 4)},"a":{text(0, 4)}}}'.encode(), 4)
    with pytest.raises(SourceError, match="'a' is in it twice"):
        read_shard(file)


def test_weights_far_below_a_folder_are_named(tmp_path: Path):
    """The search is bounded, and looks into no hidden folder."""
    (tmp_path / "run" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / ".cache" / "deep").mkdir(parents=True)
    for folder in ("run/checkpoint-5", ".cache/deep"):
        save_file({"w": torch.ones(2)}, tmp_path / folder / "adapter_model.safetensors")
    with pytest.raises(
        SourceError, match=r"no \.safetensors weights itself; give the folder that is meant: \S*checkpoint-5$"
    ):
        open_checkpoint(tmp_path)
