"""Passes that go through each layer a few times: to the byte what passes from the start give, in chains of layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from shiradelta.fit.refit import replay
from shiradelta.fit.refit.least_squares import own_linears, refit
from shiradelta.fit.teacher import exchanged
from shiradelta.nonzeros.vector import Nonzeros
from tests.fit.test_seq2seq import fit as fit_seq2seq
from tests.seq2seq import write_pair

LAYERS, WIDTH, PARTS = 5, 12, 3


class Block(nn.Module):
    """A linear layer, and an addition into what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        x += self.linear(x).tanh()  # some models do this
        return x * 1.5, "no tensor"


class Chain(nn.Module):
    """Layers, each of which gets what the one before gives."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        for layer in self.layers:
            x, _ = layer(x)
        return self.head(x)


class Skipping(Chain):
    """The last layer also gets what the first one gave."""

    def forward(self, x: Tensor) -> Tensor:
        x = first = self.layers[0](x.clone())[0]
        for layer in self.layers[1:-1]:
            x, _ = layer(x)
        return self.head(self.layers[-1](x + first)[0])


class Side(Chain):
    """Layers beside each other, as of several heads."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(sum(layer(x.clone())[0] for layer in self.layers))


def least_squares(kind: type[Chain], seen: bool) -> tuple[list[Tensor], Counter[int]]:
    """(positions and values; how often each layer's linear layer ran)."""
    torch.manual_seed(0)
    model = kind().requires_grad_(False)
    inputs = torch.randn(PARTS, 40, WIDTH)
    tuned = {p: p + 0.1 * torch.randn_like(p) for p in model.parameters() if p.dim() == 2}
    weights = list(tuned)
    nonzeros = Nonzeros(weights, [torch.float32] * len(weights), [torch.arange(20) for _ in weights])
    ran: Counter[int] = Counter()
    for number, layer in enumerate(model.layers):
        layer.linear.register_forward_pre_hook(lambda module, inputs, number=number: ran.update([number]))
    refit(
        own_linears(model),
        lambda part: model(inputs[part[0]]),
        lambda: exchanged(tuned),
        nonzeros,
        lambda positions: lambda values: values,
        [[part] for part in range(PARTS)],
        model=model if seen else None,
    )
    return [*nonzeros.by_tensor(nonzeros.positions), *nonzeros.by_tensor(nonzeros.values)], ran


@pytest.mark.parametrize("kind", [Chain, Skipping, Side])
def test_it_gives_what_passes_from_the_start_give(kind: type[Chain]):
    found, ran = least_squares(kind, seen=True)
    expected, from_the_start = least_squares(kind, seen=False)
    assert all(map(torch.equal, found, expected))
    passes = 2 * PARTS
    if kind is Chain:  # for its own values, for those of the next layer, for the head, and the pass that is watched
        assert ran == {number: 3 * passes + 1 - (number == LAYERS - 1) * passes for number in range(LAYERS)}
        assert from_the_start[0] == (LAYERS + 1) * passes + 1
    else:
        assert ran == from_the_start


def test_what_takes_too_much_memory_runs_from_the_start(monkeypatch: pytest.MonkeyPatch):
    expected, from_the_start = least_squares(Chain, seen=False)
    monkeypatch.setattr(replay, "MOST_BYTES", 2 * PARTS * 40 * WIDTH * 4 - 1)
    found, ran = least_squares(Chain, seen=True)
    assert all(map(torch.equal, found, expected))
    assert ran == from_the_start


def test_a_forward_pass_of_its_own_is_given_back():
    """As accelerate's hooks replace it."""
    model, inputs = Chain(), torch.randn(2, WIDTH)
    own = model.layers[0].forward
    model.layers[0].forward = own
    chains: list[Sequence[nn.Module]] = []
    with replay.watching(model, chains):
        model(inputs)
    found = replay.Replay(chains, passes=1)
    found.go_on([model.layers[2].linear], [])
    during: list[bool] = []

    def forward(part: Sequence[int]) -> Tensor:
        during.extend("forward" in vars(layer) and layer.forward is not own for layer in model.layers)
        return model(inputs)

    assert torch.equal(found.run(forward, "student", [0]), model(inputs))
    assert during == [True, True, False, False, False]
    assert model.layers[0].forward is own
    assert "forward" not in vars(model.layers[1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_an_encoder_decoder_gives_the_same_bytes(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pair = write_pair(kind, tmp_path)
    fit_seq2seq(pair, tmp_path / "a.shd", method="refit")
    monkeypatch.setattr(replay, "MOST_BYTES", -1)
    fit_seq2seq(pair, tmp_path / "b.shd", method="refit")
    assert (tmp_path / "a.shd").read_bytes() == (tmp_path / "b.shd").read_bytes()
