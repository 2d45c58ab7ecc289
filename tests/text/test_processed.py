"""What processors make of examples is kept, where batches of it are what they make of batches."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shiradelta.models.processors import load_processor
from shiradelta.text import processed
from shiradelta.text.examples import training_examples
from shiradelta.text.processed import KeptExamples
from shiradelta.text.read import read_file
from tests.pictures import build, write_examples, write_model

Made = dict[str, Any]
LENGTHS = [3, 3, 5, 2, 5, 4]


def tokens(indices: Sequence[int]) -> Made:
    width = max(LENGTHS[index] for index in indices)
    ids = torch.full((len(indices), width), 9)
    for row, index in enumerate(indices):
        ids[row, : LENGTHS[index]] = index
    return {"input_ids": ids, "attention_mask": (ids != 9).long()}


def of_one_size(indices: Sequence[int]) -> Made:
    return {**tokens(indices), "pixel_values": torch.stack([torch.full((2, 2), float(index)) for index in indices])}


def in_pieces(indices: Sequence[int]) -> Made:
    """As Qwen2-VL has patches of all pictures in one tensor."""
    pieces = [torch.full((1 + index, 4), float(index)) for index in indices]
    grids = torch.tensor([[1, 1, 1 + index] for index in indices])
    return {**tokens(indices), "pixel_values": torch.cat(pieces), "image_grid_thw": grids}


def padded(indices: Sequence[int]) -> Made:
    """As LLaVA-NeXT pads pictures to the largest."""
    pixels = torch.zeros(len(indices), 2 + max(indices) % 3, 2)
    for row, index in enumerate(indices):
        pixels[row, : 2 + index % 3] = index
    return {**tokens(indices), "pixel_values": pixels}


def by_batch(indices: Sequence[int]) -> Made:
    made = of_one_size(indices)
    return {**made, "pixel_values": made["pixel_values"] / len(indices)}


def padded_otherwise(indices: Sequence[int]) -> Made:
    made = of_one_size(indices)
    return {**made, "attention_mask": torch.where(made["input_ids"] == 9, -1, 1)}


def in_a_list(indices: Sequence[int]) -> Made:
    return {**of_one_size(indices), "names": [str(index) for index in indices]}


MAKERS: dict[Callable[[Sequence[int]], Made], bool] = {
    of_one_size: True,
    in_pieces: True,
    padded: False,
    by_batch: False,
    padded_otherwise: False,
    in_a_list: False,
}
BATCHES = [[0], [0, 1], [2, 4], [0, 2, 3], [5, 1], [3, 4, 5], [1, 0], [4, 2, 1], [5]]


def same(one: Made, other: Made) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if isinstance(value, Tensor) else value == other[name]
        for name, value in one.items()
    )


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("most", [1 << 30, 300, 0])
def test_batches_are_those_of_the_processor(
    make: Callable[[Sequence[int]], Made], most: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(processed, "MOST_BYTES", most)
    kept = KeptExamples(make, 9)
    for indices in BATCHES * 2:
        assert same(kept.batch(indices), make(indices))
    if not most:
        assert not kept._kept


@pytest.mark.parametrize("make", [make for make, is_kept in MAKERS.items() if is_kept], ids=lambda make: make.__name__)
def test_an_example_is_made_once(make: Callable[[Sequence[int]], Made]):
    calls = list[Sequence[int]]()

    def counted(indices: Sequence[int]) -> Made:
        calls.append(indices)
        return make(indices)

    kept = KeptExamples(counted, 9)
    for indices in BATCHES:
        kept.batch(indices)
    assert sorted(indices[0] for indices in calls if len(indices) == 1) == list(range(6))
    assert [indices for indices in calls if len(indices) > 1] == [[0, 1], [0, 2, 3]]
    kept.batch(BATCHES[3])["pixel_values"].zero_()  # a batch is the caller's
    assert same(kept.batch(BATCHES[3]), make(BATCHES[3]))


@pytest.mark.parametrize("kind", ["clip", "siglip", "llava"])
def test_inputs_of_models_are_those_of_their_processors(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_model(kind, tmp_path / "base")
    path = write_examples(kind, tmp_path, 12)
    if kind == "llava":
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for number, line in enumerate(lines):
            line["prompt"] += " w1" * (number % 3)
        path.write_text("\n".join(map(json.dumps, lines)))
    rows = read_file(path)
    batches = ([0, 1], [1, 2, 3], [4, 5, 6], [2, 0], [7, 8])
    found = []
    for most in (1 << 30, 0):
        monkeypatch.setattr(processed, "MOST_BYTES", most)
        examples = training_examples(rows, load_processor("picture", tmp_path / "base"), build(kind), 16)
        found.append([examples._inputs.arguments(indices) for indices in batches])
    assert all(map(same, *found))
