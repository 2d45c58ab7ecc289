"""Which elements of a model in memory each tensor of its checkpoint holds."""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from shiradelta.models.saved import saved_tensors

SIZES = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
HEADS = {**SIZES, "num_key_value_heads": 1}


def mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**HEADS, num_local_experts=3))


def nomic() -> nn.Module:
    return transformers.NomicBertModel(transformers.NomicBertConfig(**SIZES))


def gpt_neox() -> nn.Module:
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZES))


@pytest.mark.parametrize("build", [mixtral, nomic, gpt_neox], ids=lambda build: build.__name__)
def test_the_views_give_the_files_that_are_saved(build, tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    files, own = load_file(tmp_path / "model.safetensors"), model.state_dict()
    seen = {name: torch.zeros(weight.numel(), dtype=torch.int64) for name, weight in own.items()}
    for saved in saved_tensors(model):
        made = torch.full((files[saved.name].numel(),), torch.nan)
        for name, view in saved.parts:
            at = torch.arange(made.numel()).numpy()
            chosen, positions = view.to_weight(at)
            made[chosen] = own[name].reshape(-1)[positions]
            seen[name][positions] += 1
            assert view.numel == own[name].numel()
        assert torch.equal(made.view(saved.shape), files[saved.name]), saved.name
        if saved.renamed is not None:
            assert torch.equal(own[saved.renamed].reshape(saved.shape), files[saved.name])
            assert own[saved.renamed].numel() == made.numel(), "the first of several experts is not all of them"
    assert all((count == 1).all() for count in seen.values())
