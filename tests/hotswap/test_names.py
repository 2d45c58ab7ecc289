"""Which tensor of a live model a name in a file means: in memory, in the checkpoint, or under another prefix."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from shiradelta import HotSwap
from shiradelta.errors import BaseMismatchError, TargetError
from tests.swapping import adapter, bits, formula, random_delta

pytestmark = pytest.mark.slow

transformers = pytest.importorskip("transformers", minversion="5.0")

TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 60,
}
ENCODER = {name: size for name, size in TEXT.items() if name not in ("vocab_size", "num_key_value_heads")}
ROTARY = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
DEEP = {"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 8}


def gemma3() -> Any:
    vision = {**ENCODER, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(
        text_config={**TEXT, "head_dim": 16}, vision_config=vision, mm_tokens_per_image=4
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def llava() -> Any:
    vision = transformers.CLIPVisionConfig(**ENCODER, image_size=32, patch_size=8)
    config = transformers.LlavaConfig(text_config=transformers.LlamaConfig(**TEXT), vision_config=vision)
    return transformers.LlavaForConditionalGeneration(config)


def qwen2_vl() -> Any:
    vision = {**DEEP, "embed_dim": 32, "mlp_ratio": 2}
    config = transformers.Qwen2VLConfig(text_config={**TEXT, "rope_parameters": ROTARY}, vision_config=vision)
    return transformers.Qwen2VLForConditionalGeneration(config)


def qwen25_vl() -> Any:
    vision = {**DEEP, "out_hidden_size": 32, "intermediate_size": 48, "fullatt_block_indexes": [1]}
    config = transformers.Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": ROTARY}, vision_config=vision)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


VLMS = [gemma3, llava, qwen2_vl, qwen25_vl]
#: For tests that repeat what another one tries with all models, under other circumstances.
SOME_VLMS = [gemma3, qwen2_vl, *(pytest.param(make, marks=pytest.mark.slow) for make in (llava, qwen25_vl))]


def made(make: Callable[[], Any]) -> Any:
    """A model whose weights all differ, so that bits tell them apart."""
    torch.manual_seed(0)
    model = make().bfloat16()
    for weight in model.parameters():
        torch.nn.init.normal_(weight)
    return model


def in_memory(model: Any) -> dict[str, Any]:
    return dict(model.named_parameters())


def in_checkpoint(model: Any, folder: Path) -> dict[str, Any]:
    """The checkpoint's names -> weights in memory, told by their bits."""
    model.save_pretrained(folder)
    by_bits = {bits(weight).tobytes(): weight for weight in model.parameters()}
    stored = load_file(folder / "model.safetensors")
    return {name: by_bits[bits(tensor).tobytes()] for name, tensor in stored.items()}


def check(model: Any, wanted: dict[str, Any]) -> None:
    """A delta in these names changes these weights, and no others."""
    data = adapter(
        {
            name: random_delta(tuple(w.shape), max(1, w.numel() // 20), i, base=w)
            for i, (name, w) in enumerate(wanted.items())
        }
    )
    before = {name: bits(weight) for name, weight in model.named_parameters()}
    known = {id(weight): name for name, weight in model.named_parameters()}
    swap = HotSwap(model)
    report = swap.load("a", data)
    assert (report.unmatched, report.unchecked) == ((), ())
    swap.switch("a")
    expected = dict(before)
    for name, weight in wanted.items():
        own = known[id(weight)]
        expected[own] = formula(before[own], "bfloat16", [(data, 1.0)], name)
    for name, weight in model.named_parameters():
        assert np.array_equal(bits(weight), expected[name]), name
    swap.revert()


def prefixed(prefix: str, tensors: dict[str, Any]) -> dict[str, Any]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def of_language(model: Any) -> dict[str, Any]:
    """The names that the language model has when it is loaded alone."""
    return prefixed("model.", in_memory(model.model.language_model))


@pytest.mark.parametrize("make", VLMS)
def test_names_of_vision_language_models(make: Callable[[], Any], tmp_path: Path):
    """In memory, on disk, and both as PEFT wraps them."""
    model = made(make)
    memory, disk = in_memory(model), in_checkpoint(model, tmp_path)
    for names in (memory, disk):
        check(model, names)
        check(model, prefixed("base_model.model.", names))
    check(model, of_language(model))


@pytest.mark.parametrize("make", SOME_VLMS)
def test_names_of_vision_language_models_that_were_loaded(make: Callable[[], Any], tmp_path: Path):
    """A loaded model is saved under the names that it was loaded from, such as the hub's of older versions."""
    model = made(make)
    stored = in_checkpoint(model, tmp_path / "new")
    model = type(model).from_pretrained(tmp_path / "new", dtype=torch.bfloat16)
    check(model, in_checkpoint(model, tmp_path / "again"))
    check(model, in_memory(model))
    assert in_checkpoint(model, tmp_path / "last").keys() == stored.keys()


@pytest.mark.parametrize("make", SOME_VLMS)
def test_names_of_a_whole_model_on_its_parts(make: Callable[[], Any], tmp_path: Path):
    """The model without its head, and its language model alone."""
    model = made(make)
    disk = in_checkpoint(model, tmp_path)
    inner = {id(weight) for weight in model.model.parameters()}
    check(model.model, {name: weight for name, weight in disk.items() if id(weight) in inner})
    language = model.model.language_model
    inner = {id(weight) for weight in language.parameters()}
    check(language, {name: weight for name, weight in disk.items() if id(weight) in inner})
    check(language, {name: weight for name, weight in in_memory(model).items() if id(weight) in inner})


def bart() -> Any:
    sizes = {f"{half}_{what}": 2 for half in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    config = transformers.BartConfig(
        **sizes, d_model=32, encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=60, max_position_embeddings=16
    )
    return transformers.BartForConditionalGeneration(config)


def test_an_encoders_delta_on_an_encoder_decoder_is_refused_with_both_names():
    model = made(bart)
    encoder = {n: w for n, w in in_memory(model.model.encoder).items() if "fc1" in n or "self_attn" in n}
    data = adapter({name: random_delta(tuple(w.shape), 3, 1) for name, w in encoder.items()})
    bias = r"layers\.0\.fc1\.bias"
    both = rf"'{bias}' may be 'model\.decoder\.{bias}' or 'model\.encoder\.{bias}'"
    for skip in ((), "*"):
        with pytest.raises(BaseMismatchError, match=rf"{both} of the model; map the names with HotSwap\(model, names="):
            HotSwap(model).load("a", data, skip=skip)
    report = HotSwap(model, names=lambda name: f"model.encoder.{name}").load("a", data)
    assert all(other == f"model.encoder.{name}" for name, other in report.matched.items())
    check(model, prefixed("encoder.", encoder))


def test_an_encoder_that_has_more_than_the_decoder_is_found():
    sizes = {"d_model": 32, "d_ff": 48, "d_kv": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 60}
    model = made(lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)))
    check(model.encoder, in_memory(model.encoder))
    model = made(lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)))
    encoder = {name: w for name, w in in_memory(model.encoder).items() if name.startswith("block.")}
    check(model, encoder)


def test_unclear_names_may_be_left_out():
    """They count as refused, so patterns name them."""
    model = made(bart)
    tensors = {
        "layers.0.fc1.weight": model.model.encoder.layers[0].fc1.weight,
        "model.shared.weight": model.model.shared.weight,
    }
    data = adapter({name: random_delta(tuple(w.shape), 3, 1) for name, w in tensors.items()})
    with pytest.raises(BaseMismatchError, match=r"'layers\.0\.fc1\.weight' may be"):
        HotSwap(model).load("a", data)
    report = HotSwap(model).load("a", data, skip="layers.*")
    assert (list(report.matched), report.unmatched) == (["model.shared.weight"], ("layers.0.fc1.weight",))


@pytest.mark.parametrize("prefix", ["", "model.", "base_model.model."])
def test_computed_weights_are_found_under_other_prefixes(prefix: str):
    layers = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)).bfloat16()
    data = adapter({f"{prefix}layers.{i}.weight": random_delta((8, 8), 3, i) for i in range(2)})
    model = torch.nn.Module()
    model.layers = layers
    torch.nn.utils.parametrizations.weight_norm(layers[1])
    with pytest.raises(TargetError, match=r"layers\.1\.weight' is computed by a parametrization"):
        HotSwap(model).load("a", data)
    assert HotSwap(model).load("a", data, skip="*1*").unmatched == (f"{prefix}layers.1.weight",)
