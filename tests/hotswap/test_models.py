"""HotSwap on the shapes of real models: tiny random configurations of transformers, and what PEFT makes of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from shiradelta import HotSwap
from shiradelta.errors import BaseMismatchError, TargetError
from tests.swapping import adapter, bits, formula, random_delta

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 60}


def gpt2() -> Any:
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=60, n_positions=16)
    return transformers.GPT2LMHeadModel(config)


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=1))


def tied_llama() -> Any:
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=1, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config)


def bert() -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, max_position_embeddings=16))


def mixtral() -> Any:
    config = transformers.MixtralConfig(**SMALL, num_key_value_heads=1, num_local_experts=4)
    return transformers.MixtralForCausalLM(config)


def saved(model: Any, folder: Any) -> dict[str, torch.Tensor]:
    """What transformers writes as the model's checkpoint."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def deltas(tensors: dict[str, torch.Tensor]) -> bytes:
    return adapter(
        {
            name: random_delta(tuple(t.shape), max(1, t.numel() // 20), i, "bfloat16", base=t)
            for i, (name, t) in enumerate(tensors.items())
        }
    )


@pytest.mark.parametrize("backend", ["auto", pytest.param("torch", marks=pytest.mark.slow)])
@pytest.mark.parametrize("make", [gpt2, llama, tied_llama, bert, mixtral])
def test_a_model_gets_what_its_checkpoint_would(make: Callable[[], Any], backend: str, tmp_path: Any):
    """A delta in the checkpoint's names, on the live model, then saved: every tensor is the formula's."""
    torch.manual_seed(0)
    model = make().to(torch.bfloat16)
    before = saved(model, tmp_path / "before")
    data = deltas(before)
    swap = HotSwap(model, backend=backend)
    report = swap.load("a", data)
    assert report.unmatched == report.unchecked == ()
    swap.switch("a", 0.5)
    after = saved(model, tmp_path / "after")
    for name, tensor in before.items():
        assert np.array_equal(bits(after[name]), formula(bits(tensor), "bfloat16", [(data, 0.5)], name)), name
    swap.revert()
    again = saved(model, tmp_path / "again")
    assert all(np.array_equal(bits(again[name]), bits(tensor)) for name, tensor in before.items())


def test_the_model_computes_with_it():
    model = llama().to(torch.bfloat16)
    tokens = torch.arange(8)[None]
    before = model(tokens).logits
    swap = HotSwap(model)
    swap.load("a", deltas({n: p.data for n, p in model.named_parameters()}))
    with swap.applied("a"):
        assert not torch.equal(model(tokens).logits, before)
    assert torch.equal(model(tokens).logits, before)


def test_prefixes():
    """`bert.` is there in the model with a head and not in the one without, or the other way round."""
    model = bert().to(torch.bfloat16)
    inner = {n: p.data for n, p in model.bert.named_parameters()}
    assert set(HotSwap(model).load("a", deltas(inner)).matched.values()) == {f"bert.{name}" for name in inner}
    outer = {f"bert.{n}": p for n, p in inner.items()}
    assert set(HotSwap(model.bert).load("a", deltas(outer)).matched.values()) == set(inner)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's own, of transformers
def test_a_model_inside_peft():
    """The base's names, under the adapter's wrappers."""
    peft = pytest.importorskip("peft")
    model = llama().to(torch.bfloat16)
    inner = {n: p.data for n, p in model.named_parameters()}
    data = deltas(inner)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    swap = HotSwap(wrapped)
    report = swap.load("a", data)
    assert report.unmatched == ()
    before = {name: bits(tensor) for name, tensor in inner.items()}
    swap.switch("a")
    for name, tensor in inner.items():
        assert np.array_equal(bits(tensor), formula(before[name], "bfloat16", [(data, 1)], name)), name


@pytest.mark.parametrize("wrapper", ["_orig_mod", "module"])
def test_a_wrapped_model(wrapper: str):
    """What torch.compile and data parallelism put before the names."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, dtype=torch.bfloat16))
    data = deltas({"0.weight": model[0].weight.data})
    wrapped = torch.nn.Module()
    wrapped.add_module(wrapper, model)
    assert HotSwap(wrapped).load("a", data).matched == {"0.weight": f"{wrapper}.0.weight"}


def test_a_pipeline_of_modules():
    """Components by name, tensors as in its folder; what is no module is left out."""
    parts = {
        "unet": torch.nn.Conv2d(3, 5, 3, dtype=torch.bfloat16),
        "text_encoder": torch.nn.Linear(7, 6, dtype=torch.bfloat16),
        "scheduler": object(),
    }
    tensors = {f"unet/{n}": p.data for n, p in parts["unet"].named_parameters()}
    tensors["text_encoder/weight"] = parts["text_encoder"].weight.data
    before = {name: bits(tensor) for name, tensor in tensors.items()}
    data = deltas(tensors)
    swap = HotSwap(parts)
    swap.load("a", data)
    swap.switch("a")
    for name, tensor in tensors.items():
        assert np.array_equal(bits(tensor), formula(before[name], "bfloat16", [(data, 1)], name)), name


def test_buffers():
    model = torch.nn.BatchNorm1d(20, dtype=torch.bfloat16)
    before = bits(model.running_var)
    data = deltas({"running_var": model.running_var})
    swap = HotSwap(model)
    swap.load("a", data)
    swap.switch("a")
    assert np.array_equal(bits(model.running_var), formula(before, "bfloat16", [(data, 1)], "running_var"))


def test_what_loading_converts_beyond_slicing_is_refused_by_name(monkeypatch: pytest.MonkeyPatch):
    """As if transformers computed a tensor anew instead of slicing it out."""
    from transformers import core_model_loading

    revert = core_model_loading.revert_weight_conversion

    def computing(model: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: t + 0 if "experts.1.w1" in name else t for name, t in revert(model, state).items()}

    monkeypatch.setattr(core_model_loading, "revert_weight_conversion", computing)
    model = mixtral().to(torch.bfloat16)
    swap = HotSwap(model)
    name = "model.layers.1.block_sparse_moe.experts.{}.w1.weight"
    swap.load("a", adapter({name.format(0): random_delta((48, 32), 4, 1)}))
    with pytest.raises(TargetError, match=r"experts\.1\.w1\.weight' is not stored as in the checkpoint"):
        swap.load("b", adapter({name.format(1): random_delta((48, 32), 4, 1)}))


def test_an_expert_and_the_stack_that_it_is_in():
    model = mixtral().to(torch.bfloat16)
    swap = HotSwap(model)
    swap.load("a", adapter({"model.layers.0.block_sparse_moe.experts.0.w2.weight": random_delta((32, 48), 4, 1)}))
    with pytest.raises(BaseMismatchError, match=r"one of which is part of the other .* as the checkpoint does"):
        swap.load("b", adapter({"model.layers.0.mlp.experts.down_proj": random_delta((4, 32, 48), 9, 1)}))


def test_two_copies_of_a_model_do_not_meet():
    model = llama().to(torch.bfloat16)
    other = copy.deepcopy(model)
    swap = HotSwap(model)
    swap.load("a", deltas({n: p.data for n, p in model.named_parameters()}))
    before = {n: bits(p) for n, p in other.named_parameters()}
    swap.switch("a")
    assert all(np.array_equal(before[n], bits(p)) for n, p in other.named_parameters())
