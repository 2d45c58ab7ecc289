"""Layers whose forward passes are replaced have their own afterwards, whatever happened within."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from shiradelta.models.forward import Forward, forward_replaced
from shiradelta.models.placement import layer_lists
from shiradelta.models.recomputation import Recomputation


class Twice(nn.Module):
    """A layer that is in two lists of layers, as tied decoders have it."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Linear(2, 2)
        self.one, self.two = (nn.ModuleList([shared, nn.Linear(2, 2)]) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in [*self.one, *self.two]:
            x = layer(x)
        return x


def counted(number: int, forward: Forward) -> Forward:
    return lambda x: forward(x) + 10 ** (number + 1)


@pytest.mark.parametrize("fails", [False, True])
def test_layers_have_their_own_forward_afterwards(fails: bool):
    layers = [nn.Identity() for _ in range(3)]
    layers[1].forward = lambda x: x + 1  # a hook of someone else's
    before = [dict(vars(layer)) for layer in layers]
    ends = pytest.raises(ZeroDivisionError) if fails else nullcontext()
    with ends, forward_replaced([*layers, layers[0]], counted):
        assert [int(layer(torch.tensor(0))) for layer in layers] == [10, 101, 1000]
        assert not fails or 1 / 0
    assert [dict(vars(layer)) for layer in layers] == before


def test_where_no_replacement_can_be_made_all_have_their_own():
    def first_only(number: int, own: Forward) -> Forward:
        if number:
            raise ZeroDivisionError
        return own

    layers = [nn.Identity() for _ in range(2)]
    with pytest.raises(ZeroDivisionError), forward_replaced(layers, first_only):
        pass
    assert all("forward" not in vars(layer) for layer in layers)


def test_a_layer_in_two_lists_is_computed_again_once():
    model = Twice()
    assert [len(layers) for layers in layer_lists(model)] == [2, 2]
    x = torch.ones(3, 2)
    model(x).sum().backward()
    expected = [parameter.grad for parameter in model.parameters()]
    recomputation = Recomputation(model, lambda line: None)
    recomputation._is_on = True
    for _ in range(2):
        model.zero_grad()
        recomputation.run(lambda: model(x).sum().backward())
        assert all(
            torch.equal(parameter.grad, own) for parameter, own in zip(model.parameters(), expected, strict=True)
        )
    assert all("forward" not in vars(layer) for layer in model.modules())
