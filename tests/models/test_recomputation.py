"""Layers that compute their activations again give the same gradients, and only once memory has run out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shiradelta.models.placement import layers_of
from shiradelta.models.recomputation import Recomputation
from tests.fit.test_fit import build
from tests.models.test_placement import llama
from tests.seq2seq import build as build_seq2seq

OUT = torch.OutOfMemoryError("CUDA out of memory.")


def causal() -> nn.Module:
    torch.manual_seed(0)
    return llama()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "causal": causal,
    "encoder": lambda: build("encoder"),
    "t5": lambda: build_seq2seq("t5"),
    "bart": lambda: build_seq2seq("bart"),
}


def gradients(model: nn.Module, ids: Tensor) -> list[Tensor]:
    model.zero_grad()
    more = {"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {}
    result = model(input_ids=ids, attention_mask=torch.ones_like(ids), **more)
    getattr(result, "logits", result[0]).float().square().mean().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("kind", MODELS)
def test_gradients_are_the_same_bit_by_bit(kind: str):
    model = MODELS[kind]().eval()
    ids, passes, lines, tried = torch.randint(3, 30, (3, 7)), [], [], []
    expected = gradients(model, ids)
    layers = layers_of(model)
    assert len(layers) == {"causal": 6, "encoder": 2}.get(kind, len(layers))
    inner = [module for layer in layers for module in layer.modules() if isinstance(module, nn.Linear)]
    for module in inner:
        module.register_forward_hook(lambda *given: passes.append(given[0]))
    settings = {"use_cache": getattr(model.config, "use_cache", None)}

    def step() -> list[Tensor]:
        tried.append(True)
        if len(tried) == 1:
            raise OUT
        return gradients(model, ids)

    recomputation = Recomputation(model, lines.append)
    for _ in range(2):
        found = recomputation.run(step)
        assert len(found) == len(expected)
        assert all(map(torch.equal, found, expected))
    assert len(tried) == 3
    assert 3 * len(inner) < len(passes) <= 4 * len(inner), "in the forward and the backward passes of two steps"
    assert lines == ["memory ran out, so layers keep their inputs only, and backward passes compute the rest again"]
    assert all("forward" not in layer.__dict__ for layer in layers)
    assert {"use_cache": getattr(model.config, "use_cache", None)} == settings


@pytest.mark.parametrize("kind", ["causal", "t5"])
def test_what_is_kept_between_the_passes_is_less(kind: str):
    model = MODELS[kind]().eval()
    model.requires_grad_(False)
    for layer in layers_of(model):
        layer.requires_grad_(True)
    ids, kept = torch.randint(3, 30, (8, 16)), []

    def pack(tensor: Tensor) -> Tensor:
        kept[-1] += tensor.nbytes
        return tensor

    recomputation = Recomputation(model, lambda line: None)
    for is_on in (False, True):
        recomputation._is_on = is_on
        kept.append(0)

        def step() -> None:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                model(input_ids=ids, **({"decoder_input_ids": ids} if kind == "t5" else {}))

        recomputation.run(step)
    assert kept[1] < 0.3 * kept[0]


def test_other_errors_and_what_has_no_layers_stay():
    def fail(error: Exception) -> Any:
        raise error

    for model, error in ((llama(), RuntimeError("two devices")), (nn.Linear(2, 2), OUT)):
        with pytest.raises(type(error), match=str(error)):
            Recomputation(model, lambda line: pytest.fail(line)).run(lambda error=error: fail(error))
    recomputation = Recomputation(llama(), lambda line: None)
    with pytest.raises(torch.OutOfMemoryError):
        recomputation.run(lambda: fail(OUT))
    assert recomputation.run(lambda: 3) == 3
