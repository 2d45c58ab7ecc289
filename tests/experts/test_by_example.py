"""Gradients of several examples from one backward pass: those of each by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
)

from shiradelta import experts, train
from shiradelta.experts import by_example
from shiradelta.experts.features import Sketch, adam_scales
from shiradelta.experts.gradients import NonzeroGradients
from tests.experts.test_family import EXAMPLES, loss, model


class Flat(nn.Module):
    """A language model that hands tokens of all texts to a layer, as mixtures of experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.first, self.second = nn.Embedding(64, 32), nn.Linear(32, 32), nn.Linear(32, 64)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        hidden = self.first(self.embedding(input_ids)).tanh()
        return SimpleNamespace(logits=self.second(hidden.flatten(0, 1)).unflatten(0, input_ids.shape))


SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "Gemma": lambda: Gemma3ForCausalLM(Gemma3TextConfig(num_key_value_heads=1, head_dim=16, **SIZES)),
    "Mixtral": lambda: MixtralForCausalLM(MixtralConfig(num_key_value_heads=1, num_local_experts=2, **SIZES)),
    "tokens of all": Flat,
    "GPT-2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2)),
}


def texts_loss(network: nn.Module, texts: Sequence[list[int]]) -> Tensor:
    """Cross entropy of tokens, a mean over those of all texts."""
    ids, there = torch.zeros(len(texts), 8, dtype=torch.long), torch.zeros(len(texts), 8, dtype=torch.long)
    for number, text in enumerate(texts):
        ids[number, : len(text)], there[number, : len(text)] = torch.tensor(text), 1
    logits = network(input_ids=ids, attention_mask=there).logits[:, :-1]
    kept = there[:, 1:].bool()
    return nn.functional.cross_entropy(logits[kept], ids[:, 1:][kept])


def taken(gradients: NonzeroGradients, examples: Sequence[Any], of: Any, batch: int) -> list[Tensor]:
    found: list[Tensor] = []
    gradients.each(examples, of, lambda _, own: found.append(torch.cat(own)), lambda *a: None, "", batch)
    return found


def trained(network: nn.Module, path: Path) -> NonzeroGradients:
    with train.attach(network, 0.2, "rand") as tuner:
        for values in tuner.parameters():
            values.data.normal_(0, 0.01)
        tuner.save(path, values="f32")
    return NonzeroGradients(network, path)


@pytest.mark.parametrize("dense", [by_example.DENSE, 1], ids=["at once", "one by one"])
def test_a_batch_gives_each_examples_gradient(dense: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(by_example, "DENSE", dense)
    gradients = trained(model(), tmp_path / "x.shd")
    alone, together = (taken(gradients, EXAMPLES[:7], loss, batch) for batch in (1, 3))
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-7)
    scales = [adam_scales(gradients, EXAMPLES[:7], loss, lambda *a: None, batch) for batch in (1, 3)]
    assert all(np.abs(scales[0][name].astype(int) - scales[1][name]).max() <= 1 for name in scales[0])


@pytest.mark.parametrize("name", list(MODELS))
def test_features_of_prompts_do_not_depend_on_the_batch(name: str, tmp_path: Path):
    torch.manual_seed(0)
    network = MODELS[name]()
    gradients = trained(network, tmp_path / "x.shd")
    before = {key: (weight.requires_grad, weight.clone()) for key, weight in network.named_parameters()}
    scales = {key: np.zeros(count, np.int8) for key, count in gradients.counts.items()}
    sketch = Sketch(gradients, scales, 256, 0)
    texts = [[(3 * i + j) % 60 + 1 for j in range(3 + i % 5)] for i in range(7)]
    alone, together = (sketch.features(texts, texts_loss, lambda *a: None, batch) for batch in (1, 3))
    assert np.allclose(alone, together, atol=1e-4)
    assert (gradients._layers is not None) == (name in ("Gemma", "Mixtral"))
    for key, weight in network.named_parameters():
        flag, value = before[key]
        assert weight.requires_grad == flag
        assert torch.equal(weight, value)
        assert weight.grad is None
    assert not any("forward" in module.__dict__ for module in network.modules())


def test_a_loss_that_fails_leaves_the_model_as_it_was(tmp_path: Path):
    network = model().train()
    gradients = trained(network, tmp_path / "x.shd")

    def broken(network: nn.Module, some: Any) -> Tensor:
        loss(network, some)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        taken(gradients, EXAMPLES[:2], broken, 2)
    assert not any("forward" in module.__dict__ for module in network.modules())
    assert all(weight.requires_grad for weight in network.parameters())
    assert all(module.training for module in network.modules())


def test_a_router_takes_prompts_together(tmp_path: Path):
    options = {"experts": 2, "groups": [n % 2 for n in range(8)], "dims": 64, "prompt_batch": 4}
    settings = experts.TrainSettings(sparsity=0.2, steps=4, batch=4, relative_lr=0.1)
    family = experts.train_family(model(), EXAMPLES[:8], loss, tmp_path / "f", settings=settings, **options)
    one, several = (experts.ExpertRouter(model(), family, loss, batch) for batch in (1, 4))
    routes = several.each(EXAMPLES[:5])
    for example, route in zip(EXAMPLES[:5], routes, strict=True):
        assert route == pytest.approx(one.route([example]), abs=1e-4)
