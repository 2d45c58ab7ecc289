"""What makes a file of others keeps the draw of their positions where all of its own are of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import shiradelta as sd
from shiradelta.chain.fold import fold
from shiradelta.format.draw import Draw
from shiradelta.io.writer import writing

SHAPE = (60, 100)
NUMEL = 6000
DRAW, OTHER = Draw(1, 400), Draw(2, 400)
#: What training may have left of a draw.
PARTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "all": lambda drawn: drawn,
    "some": lambda drawn: drawn[::5],
    "most": lambda drawn: np.delete(drawn, [7, 300]),
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    (tmp_path / "base").mkdir()
    save_file({"w": torch.randn(SHAPE).bfloat16()}, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "base"


def elements(base: Path) -> np.ndarray:
    with (base / "model.safetensors").open("rb") as stream:
        return np.frombuffer(stream.read()[-2 * NUMEL :], "<u2")


def drawn_file(path: Path, base: Path, draw: Draw, part: Callable[[np.ndarray], np.ndarray] = PARTS["all"]) -> Path:
    positions = part(draw.positions(NUMEL))
    values = np.random.default_rng(draw.seed).standard_normal(positions.size).astype(np.float32)
    bits = elements(base)[positions]
    sd.save_delta(path, {"w": sd.TensorDelta(SHAPE, positions, values, "bfloat16", base_bits=bits, draw=draw)})
    return path


def draw_in(path: Path) -> Draw | None:
    with sd.open_delta(path) as delta:
        delta.verify_without_base()
        return delta["w"].draw


@pytest.mark.parametrize("part", PARTS)
def test_a_file_made_of_one(base: Path, tmp_path: Path, part: str):
    source = drawn_file(tmp_path / "a.shd", base, DRAW, PARTS[part])
    sd.fuse({source: 0.5}, tmp_path / "fused.shd")
    assert draw_in(tmp_path / "fused.shd") == DRAW
    sd.convert(source, tmp_path / "converted.shd", values="int8", sparsity=1.0)
    assert draw_in(tmp_path / "converted.shd") == DRAW
    sd.convert(source, tmp_path / "fewer.shd", base=base, sparsity=0.01)
    assert draw_in(tmp_path / "fewer.shd") == DRAW
    assert sd.open_delta(tmp_path / "fewer.shd").nnz <= 60
    sd.recode(source, tmp_path / "small.shd", base)
    assert draw_in(tmp_path / "small.shd") == DRAW
    sd.recode(tmp_path / "small.shd", tmp_path / "back.shd", base, context="none")
    assert (tmp_path / "back.shd").read_bytes() == source.read_bytes()


def test_a_selection_that_takes_zeros_too(base: Path, tmp_path: Path):
    """Its positions are no longer all of the draw."""
    source = drawn_file(tmp_path / "a.shd", base, DRAW)
    sd.convert(source, tmp_path / "more.shd", base=base, sparsity=0.5)
    delta = sd.open_delta(tmp_path / "more.shd")
    delta.verify()
    assert (delta["w"].draw == DRAW) == (delta.nnz <= 400)


def test_several_of_one_draw_are_of_it_and_others_are_of_none(base: Path, tmp_path: Path):
    one = drawn_file(tmp_path / "one.shd", base, DRAW, PARTS["some"])
    two = drawn_file(tmp_path / "two.shd", base, DRAW, PARTS["most"])
    third = drawn_file(tmp_path / "third.shd", base, OTHER)
    sd.fuse({one: 1.0, two: 1.0}, tmp_path / "same.shd")
    assert draw_in(tmp_path / "same.shd") == DRAW
    sd.fuse({one: 1.0, third: 1.0}, tmp_path / "apart.shd")
    assert draw_in(tmp_path / "apart.shd") is None


@pytest.mark.parametrize(("second", "expected"), [(DRAW, DRAW), (OTHER, None)])
def test_steps_of_one_draw_are_folded_into_it(tmp_path: Path, second: Draw, expected: Draw | None):
    before = np.random.default_rng(0).integers(0x3C00, 0x3F00, NUMEL).astype("<u2")
    steps = []
    for number, draw in enumerate((DRAW, second)):
        positions = draw.positions(NUMEL)
        after = before.copy()
        after[positions] += 1
        step = sd.TensorDelta(SHAPE, positions, after[positions], "bfloat16", "set", before[positions], draw=draw)
        sd.save_delta(tmp_path / f"{number}.shd", {"w": step})
        steps.append(sd.open_delta(tmp_path / f"{number}.shd"))
        before = after
    with writing(tmp_path / "folded.shd") as writer:
        fold(steps, writer, None)
    assert draw_in(tmp_path / "folded.shd") == expected
    folded = sd.open_delta(tmp_path / "folded.shd")["w"]
    assert np.array_equal(folded.bits(), before[folded.positions()])


def test_what_is_undone_is_of_the_same_draw(base: Path, tmp_path: Path):
    """The record of what was overwritten takes the section of the positions as it is."""
    untouched = (base / "model.safetensors").read_bytes()
    sd.apply(base, drawn_file(tmp_path / "a.shd", base, DRAW, PARTS["some"]))
    assert (base / "model.safetensors").read_bytes() != untouched
    undo = list(base.rglob("*.shd"))
    assert undo
    assert [draw_in(path) for path in undo] == [DRAW] * len(undo)
    sd.revert(base)
    assert (base / "model.safetensors").read_bytes() == untouched
