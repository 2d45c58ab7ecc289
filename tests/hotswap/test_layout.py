"""HotSwap where a caller says how tensors of the checkpoint lie in memory: fused, interleaved, turned, copied."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import shiradelta as sd
from shiradelta import HotSwap
from shiradelta.errors import ArgumentError, BaseMismatchError, FormatError, TargetError
from shiradelta.models.layout import Layout, Region
from tests.swapping import BACKENDS_IN_TIME, DEVICE, adapter, bits, formula, random_delta, weights

SHAPES = {"q": (8, 6), "k": (4, 6), "v": (4, 6), "up": (6, 10), "embed": (13, 6), "norm": (6,)}


class Engine:
    """A model as serving engines have it, and its checkpoint."""

    def __init__(self) -> None:
        self.base = {name: weights(shape, "bfloat16", seed) for seed, (name, shape) in enumerate(SHAPES.items())}
        base = self.base
        # Two heads of queries for one of keys and one of values; twice.
        heads = [
            (base["q"][4 * i : 4 * i + 4], base["k"][2 * i : 2 * i + 2], base["v"][2 * i : 2 * i + 2]) for i in (0, 1)
        ]
        self.memory = {
            "qkv": torch.cat([part for head in heads for part in head]),
            "turned": base["up"].t().contiguous(),
            "padded": torch.cat([base["embed"], torch.zeros(3, 6, dtype=torch.bfloat16, device=DEVICE)]),
            "copy": base["norm"].clone(),
            "norm": base["norm"].clone(),
        }
        per_head, starts = self.memory["qkv"].view(2, 8, 6), {"q": (0, 4), "k": (4, 6), "v": (6, 8)}
        self.layout = {
            name: Layout(SHAPES[name], [Region(per_head[i, a:b], (i * (b - a), 0)) for i in (0, 1)])
            for name, (a, b) in starts.items()
        }
        self.layout["up"] = Layout(SHAPES["up"], [Region(self.memory["turned"].t())])
        self.layout["embed"] = Layout(SHAPES["embed"], [Region(self.memory["padded"][:13])])
        self.layout["norm"] = Layout(SHAPES["norm"], [Region(self.memory["norm"]), Region(self.memory["copy"])])

    def shown(self, name: str) -> np.ndarray:
        """What memory has of a tensor."""
        found = torch.zeros(SHAPES[name], dtype=torch.bfloat16, device=DEVICE)
        for region in self.layout[name].regions:
            sizes = zip(region.start or [0] * found.dim(), region.memory.shape, strict=True)
            found[tuple(slice(first, first + size) for first, size in sizes)] = region.memory
        return bits(found)

    def delta(self, seed: int, op: str = "add") -> bytes:
        made = {}
        for i, (name, shape) in enumerate(SHAPES.items()):
            count = int(np.prod(shape)) // 3
            made[name] = random_delta(shape, count, 100 * seed + i, op=op, base=self.base[name])
        return adapter(made)


@pytest.mark.parametrize("backend", BACKENDS_IN_TIME)
def test_regions_get_what_the_checkpoint_would(backend: str):
    engine = Engine()
    before = {name: bits(tensor) for name, tensor in engine.memory.items()}
    swap = HotSwap(engine.memory, backend=backend, layout=engine.layout)
    one, two = engine.delta(1), engine.delta(2, "set")
    report = swap.load("one", one)
    assert (report.unmatched, report.unchecked, report.nonzeros) == ((), (), sd.open_delta(one).nnz)
    assert report.transcoded == 5  # the padded tensor is one piece of memory
    assert report.seconds > 0
    swap.load("two", two)
    for active in ({"one": 0.5}, {"one": 1, "two": 1}, {"two": 1}, {"one": -2}):
        swap.switch(active)
        files = [({"one": one, "two": two}[name], alpha) for name, alpha in active.items()]
        for name, base in engine.base.items():
            assert np.array_equal(engine.shown(name), formula(bits(base), "bfloat16", files, name)), name
        assert np.array_equal(bits(engine.memory["norm"]), bits(engine.memory["copy"]))
    swap.revert()
    assert all(np.array_equal(bits(engine.memory[name]), base) for name, base in before.items())


def test_numpy_arrays_have_layouts_too():
    memory = {"qk": np.arange(24, dtype=np.float32).reshape(8, 3)}
    layout = {
        "q": Layout((6, 3), [Region(memory["qk"][:4], step=(1, 1)), Region(memory["qk"][4::2][:1], (4, 0))]),
        "k": Layout((4, 3), [Region(memory["qk"][5:6], (1, 0), (2, 1)), Region(memory["qk"][7:], (3, 0), (2, 1))]),
    }
    data = adapter({"q": sd.TensorDelta((6, 3), [0, 14], [1, 2], "float32")}, "f32")
    swap = HotSwap(memory, layout=layout)
    swap.load("a", data)
    swap.switch("a")
    assert (memory["qk"][0, 0], memory["qk"][4, 2]) == (1, 16)
    elsewhere = adapter({"k": sd.TensorDelta((4, 3), [0, 5, 9], [1, 2, 3], "float32")}, "f32")
    with pytest.raises(BaseMismatchError, match=r"tensor 'k' changes 1 elements that are nowhere in memory"):
        swap.load("b", elsewhere)


def test_copies_that_differ_are_no_base():
    engine = Engine()
    engine.memory["copy"] += 1
    with pytest.raises(BaseMismatchError, match=r"'norm' is in several places, and its elements are not the same"):
        HotSwap(engine.memory, layout=engine.layout).load("a", engine.delta(1))


def test_layouts_that_fit_nothing_are_refused_by_name():
    memory = {"w": torch.zeros(4, 4), "turned": torch.zeros(4, 4).t()}
    for tensor, start, step in (((0, 0), (1, 0), ()), ((0, 0), (0, -1), ()), ((0, 0), (), (2, 1)), ((0,), (), ())):
        region = Region(memory["w"] if len(tensor) == 2 else memory["w"][0], start, step)
        with pytest.raises(ArgumentError, match="layout of tensor 'q': a region of shape"):
            HotSwap(memory, layout={"q": Layout((4, 4), [region])})
    for other, words in (
        (torch.zeros(4, 4), "lies in no tensor of the model;"),
        (memory["turned"], "but for 'turned'"),
    ):
        with pytest.raises(TargetError, match=words):
            HotSwap(memory, layout={"q": Layout((4, 4), [Region(other)])})
    overlapping = {"q": Layout((2, 4), [Region(memory["w"][:2])]), "k": Layout((3, 4), [Region(memory["w"][1:])])}
    with pytest.raises(TargetError, match="'q' and 'k' share elements of weight 'w'"):
        HotSwap(memory, layout=overlapping)
    columns = {"q": Layout((4, 2), [Region(memory["w"][:, ::2])]), "k": Layout((4, 2), [Region(memory["w"][:, 1::2])])}
    HotSwap(memory, layout=columns)  # they interleave, and share nothing
    with pytest.raises(ArgumentError, match="give a mapping of names to"):
        HotSwap(memory, layout={"q": [Region(memory["w"])]})


def test_regions_that_overlap_without_being_copies_are_refused():
    memory = {"a": torch.zeros(3, 4), "b": torch.zeros(3, 4)}
    layout = {"q": Layout((4, 4), [Region(memory["a"]), Region(memory["b"], (1, 0))])}
    data = adapter({"q": random_delta((4, 4), 12, 1, "float32")})
    with pytest.raises(BaseMismatchError, match="elements in several regions that are not the same"):
        HotSwap(memory, layout=layout).load("a", data)


def test_a_tensor_without_regions_is_refused():
    swap = HotSwap({"one": torch.zeros(4, 4)}, layout={"w": Layout((4, 4), [])})
    with pytest.raises(BaseMismatchError, match=r"tensor 'w' has no region in memory; give HotSwap\(model, layout="):
        swap.load("a", adapter({"w": random_delta((4, 4), 3, 1, "float32")}))


@pytest.mark.parametrize("shows", [lambda one: one[:1].expand(4, 4), lambda one: one.as_strided((4, 4), (1, 1))])
def test_a_region_that_shows_an_element_twice_is_refused(shows: Any):
    one = torch.zeros(4, 4)
    with pytest.raises(TargetError, match="tensor 'w': elements of a region share memory, as in an expanded view"):
        HotSwap({"one": one}, layout={"w": Layout((4, 4), [Region(shows(one))])})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda one: Region(None), "a region's memory is None; give a view of a tensor or array"),
        (lambda one: Region([[1]]), "a region's memory is .*; give a view"),
        (lambda one: Region(one, "ab"), "a region's start is 'ab'; give whole numbers"),
        (lambda one: Region(one, (0.5, 0)), "a region's start is .*; give whole numbers"),
        (lambda one: Region(one, step=3), "a region's step is 3; give whole numbers"),
        (lambda one: Layout("ab", [Region(one)]), "a layout's shape is 'ab'; give whole numbers"),
        (lambda one: Layout((4, 4), Region(one)), "a layout's regions are .*; give a list of Region"),
        (lambda one: HotSwap({"w": one}, layout={3: Layout((4, 4), [Region(one)])}), "give a mapping of names to"),
    ],
)
def test_layouts_of_wrong_types_are_refused(make: Any, message: str):
    with pytest.raises(ArgumentError, match=message):
        make(torch.zeros(4, 4))


def test_the_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    page = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text()
    *_, block = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "distributed.md", "exec"), {})


@pytest.mark.parametrize("backend", BACKENDS_IN_TIME)
def test_what_is_read_with_its_base_only_finds_it_in_pieces(backend: str, tmp_path: Path):
    base = {name: weights((64, 60), "bfloat16", seed) for seed, name in enumerate("qk")}
    fused = torch.stack([base[name].view(2, 32, 60) for name in "qk"], dim=1).contiguous()  # two heads of each
    layout = {name: Layout((64, 60), [Region(fused[h, i], (32 * h, 0)) for h in (0, 1)]) for i, name in enumerate("qk")}
    small = {
        name: np.flatnonzero(np.abs(tensor.float().cpu().numpy().reshape(-1)) < 0.1) for name, tensor in base.items()
    }
    deltas = {
        name: sd.TensorDelta((64, 60), at, np.ones(at.size, int), "bfloat16", "ulp", bits(base[name]).reshape(-1)[at])
        for name, at in small.items()
    }
    save_file({name: tensor.cpu() for name, tensor in base.items()}, tmp_path / "model.safetensors")
    sd.save_delta(tmp_path / "plain.shd", deltas)
    assert sd.recode(tmp_path / "plain.shd", tmp_path / "small.shd", tmp_path).needs_base
    swap = HotSwap({"qk": fused}, backend=backend, layout=layout)
    swap.load("small", tmp_path / "small.shd")
    swap.switch("small")
    after = bits(fused)
    swap.switch({})
    swap.load("plain", tmp_path / "plain.shd")
    swap.switch("plain")
    assert np.array_equal(bits(fused), after)
    with pytest.raises(FormatError, match="another base"):
        swap.load("again", tmp_path / "small.shd")
