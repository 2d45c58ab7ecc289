"""Loaders of serving engines tell where they put a checkpoint's tensors, and write nothing while they do."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from shiradelta import HotSwap
from shiradelta.errors import BaseMismatchError, TargetError
from shiradelta.models.compatibility import TensorSpec
from shiradelta.models.layout import Layout
from shiradelta.serving.recorded import recorded_layout
from tests.swapping import adapter, bits, formula, random_delta

HEADS, KEYS, SIZE, HIDDEN, WIDTH, VOCABULARY, EXPERTS = 4, 1, 4, 8, 6, 11, 2
SHAPES = {
    "q.weight": (HEADS * SIZE, HIDDEN),
    "k.weight": (KEYS * SIZE, HIDDEN),
    "v.weight": (KEYS * SIZE, HIDDEN),
    "q.bias": (HEADS * SIZE,),
    "o.weight": (HIDDEN, HEADS * SIZE),
    "gate.weight": (WIDTH, HIDDEN),
    "up.weight": (WIDTH, HIDDEN),
    "down.weight": (HIDDEN, WIDTH),
    "embed.weight": (VOCABULARY, HIDDEN),
    "norm.weight": (HIDDEN,),
    "scaled.weight": (HIDDEN,),
    **{f"experts.{i}.up.weight": (WIDTH, HIDDEN) for i in range(EXPERTS)},
}


class Engine(nn.Module):
    """One rank of two of a model, with loaders as serving engines have them, each layer its own."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16), requires_grad=False)

        self.qkv = zeros((HEADS // 2 + 2 * KEYS) * SIZE, HIDDEN)  # each rank has a copy of the keys and values
        self.qkv_bias = zeros((HEADS // 2 + 2 * KEYS) * SIZE)
        self.o = zeros(HIDDEN, HEADS * SIZE // 2)
        self.gate_up, self.down = zeros(WIDTH, HIDDEN), zeros(HIDDEN, WIDTH // 2)
        self.embed, self.norm, self.scaled = zeros(8, HIDDEN), zeros(HIDDEN), zeros(HIDDEN)
        self.experts = zeros(EXPERTS, HIDDEN, WIDTH // 2)  # stored the other way round

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        loaded = set()
        for name, tensor in weights:
            layer, _, kind = name.rpartition(".")
            getattr(self, f"load_{layer.partition('.')[0]}")(layer, kind, tensor)
            loaded.add(name)
        return loaded

    def _qkv(self, kind: str) -> Tensor:
        return (self.qkv if kind == "weight" else self.qkv_bias).data

    def load_q(self, layer: str, kind: str, tensor: Tensor) -> None:
        half = HEADS // 2 * SIZE
        self._qkv(kind).narrow(0, 0, half).copy_(tensor.narrow(0, self.rank * half, half))

    def load_k(self, layer: str, kind: str, tensor: Tensor) -> None:
        self._qkv(kind)[HEADS // 2 * SIZE :][: KEYS * SIZE].copy_(tensor)

    def load_v(self, layer: str, kind: str, tensor: Tensor) -> None:
        self._qkv(kind)[-KEYS * SIZE :] = tensor.contiguous()

    def load_o(self, layer: str, kind: str, tensor: Tensor) -> None:
        self.o.data.copy_(tensor.chunk(2, dim=1)[self.rank].to(self.o.device))

    def load_gate(self, layer: str, kind: str, tensor: Tensor) -> None:
        half = WIDTH // 2
        self.gate_up.data[:half].copy_(tensor[self.rank * half :][:half])

    def load_up(self, layer: str, kind: str, tensor: Tensor) -> None:
        half = WIDTH // 2
        self.gate_up.data[half:].copy_(tensor[self.rank * half :][:half])

    def load_down(self, layer: str, kind: str, tensor: Tensor) -> None:
        self.down.data.copy_(tensor.chunk(2, dim=1)[self.rank])

    def load_embed(self, layer: str, kind: str, tensor: Tensor) -> None:
        own = tensor[8 * self.rank : 8 * self.rank + 8]
        self.embed.data[: len(own)].copy_(own)
        self.embed.data[len(own) :].fill_(0)

    def load_norm(self, layer: str, kind: str, tensor: Tensor) -> None:
        self.norm.data.copy_(tensor)

    def load_scaled(self, layer: str, kind: str, tensor: Tensor) -> None:
        self.scaled.data.copy_(tensor * 2)

    def load_experts(self, layer: str, kind: str, tensor: Tensor) -> None:
        number = int(layer.split(".")[1])
        self.experts.data[number].copy_(tensor.t()[:, self.rank * WIDTH // 2 :][:, : WIDTH // 2])


def checkpoint() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(torch.bfloat16) for name, shape in SHAPES.items()}


SPECS = {name: TensorSpec(shape, "bfloat16") for name, shape in SHAPES.items()}


def engine(rank: int) -> Engine:
    made = Engine(rank)
    made.load_weights(checkpoint().items())
    return made


def delta(names: Iterable[str], rows: slice | None = None) -> bytes:
    base, made = checkpoint(), {}
    for i, name in enumerate(names):
        made[name] = random_delta(SHAPES[name], max(1, int(np.prod(SHAPES[name])) // 4), i, base=base[name])
    return adapter(made)


@pytest.mark.parametrize("rank", [0, 1])
def test_nothing_is_written_while_a_loader_is_followed(rank: int):
    made = engine(rank)
    made.embed[7] += 1  # padding on the second rank
    before = {name: bits(tensor) for name, tensor in made.state_dict().items()}
    layout = recorded_layout(made, SPECS)
    assert layout.keys() == SHAPES.keys() - {"scaled.weight"}  # computed, so that its elements are not there
    assert all(np.array_equal(bits(tensor), before[name]) for name, tensor in made.state_dict().items())


def test_a_rank_gets_what_its_loader_would_have_loaded():
    for rank in (0, 1):
        made = engine(rank)
        before = {name: bits(tensor) for name, tensor in made.state_dict().items()}
        swap = HotSwap(made, layout=recorded_layout(made, SPECS))
        whole = ("k.weight", "v.weight", "norm.weight")
        data = delta(whole)
        assert swap.load("a", data).unchecked == ()
        swap.switch("a", 0.5)
        tuned = checkpoint()
        for name in whole:
            now = formula(bits(tuned[name]), "bfloat16", [(data, 0.5)], name)
            tuned[name] = torch.from_numpy(now.view("<i2")).view(torch.bfloat16).view(SHAPES[name])
        expected = Engine(rank)
        expected.load_weights(tuned.items())
        for name, tensor in made.state_dict().items():
            assert np.array_equal(bits(tensor), bits(expected.state_dict()[name])), name
        swap.revert()
        assert all(np.array_equal(bits(tensor), before[name]) for name, tensor in made.state_dict().items())
        with pytest.raises(BaseMismatchError, match=r"tensor '.*' changes \d+ elements that are nowhere in memory"):
            swap.load("b", delta(["q.weight"]))  # the other rank's half is missing
        with pytest.raises(BaseMismatchError, match=r"'scaled.weight'"):
            swap.load("c", delta(["scaled.weight"]))


def test_two_ranks_in_one_process_have_all_of_it():
    engines = {"0": engine(0), "1": engine(1)}
    before = {name: {key: bits(one) for key, one in made.state_dict().items()} for name, made in engines.items()}
    found = [recorded_layout(made, SPECS) for made in engines.values()]
    both = {name: Layout(SHAPES[name], [r for one in found for r in one[name].regions]) for name in found[0]}
    swap = HotSwap(engines, layout=both)
    data = delta(sorted(both))
    report = swap.load("a", data)
    assert report.unchecked == ()
    swap.switch("a", 2.0)
    tuned = checkpoint()
    for name in both:
        now = formula(bits(tuned[name]), "bfloat16", [(data, 2)], name)
        tuned[name] = torch.from_numpy(now.view("<i2")).view(torch.bfloat16).view(SHAPES[name])
    for rank, made in enumerate(engines.values()):
        expected = Engine(rank)
        expected.load_weights(tuned.items())
        for name, tensor in made.state_dict().items():
            assert np.array_equal(bits(tensor), bits(expected.state_dict()[name])), name
    swap.revert()
    for name, made in engines.items():
        assert all(np.array_equal(bits(one), before[name][key]) for key, one in made.state_dict().items())


class Reads(Engine):
    def load_norm(self, layer: str, kind: str, tensor: Tensor) -> None:
        self.norm.data.fill_(tensor.max().item())


class ReplacesData(Engine):
    def load_norm(self, layer: str, kind: str, tensor: Tensor) -> None:
        self.norm.data = tensor


class ReplacesWeights(Engine):
    def load_norm(self, layer: str, kind: str, tensor: Tensor) -> None:
        self.norm = nn.Parameter(tensor.clone(), requires_grad=False)


@pytest.mark.parametrize("kind", [Reads, ReplacesData, ReplacesWeights])
def test_loaders_that_cannot_be_followed_are_refused_and_change_nothing(kind: type[Engine]):
    made = kind(0)
    norm, address = made.norm, made.norm.data_ptr()
    with pytest.raises(TargetError, match="the engine's loader cannot be followed"):
        recorded_layout(made, SPECS)
    assert made.norm is norm
    assert norm.data_ptr() == address
