"""Where the checkpoint has the elements of weights, for every operation by which transformers moves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from shiradelta.models.saved import SavedTensor, saved_tensors, stored_views

transformers = pytest.importorskip("transformers", minversion="5.0")
loading = pytest.importorskip("transformers.core_model_loading")

GATE, UP, DOWN = (f"mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
Q, K, V = (f"self_attn.{name}_proj.weight" for name in "qkv")
MLP = {"stored": "mlp.fused.weight", "weights": [GATE, UP]}
ATTENTION = {"stored": "attn.fused.weight", "weights": [Q, K, V]}

#: What a model is loaded with: the checkpoint's names, the weights', the operations.
CONVERSIONS: dict[str, dict[str, Any]] = {
    "renamed": {"stored": "attn.q.weight", "weights": Q, "operations": [("Transpose", 0, 0)]},
    "transposed": {"stored": "mlp.down.weight", "weights": DOWN, "operations": [("Transpose", 0, 1)]},
    "interleaved rows": {"stored": "mlp.down.weight", "weights": DOWN, "operations": [("Interleave", 0)]},
    "interleaved columns": {"stored": "mlp.down.weight", "weights": DOWN, "operations": [("Interleave", 1)]},
    "permuted for rotary embeddings": {"stored": "attn.q.weight", "weights": Q, "operations": [("PermuteForRope",)]},
    "fused by rows": {**MLP, "operations": [("Chunk", 0)]},
    "fused by columns": {**MLP, "operations": [("Chunk", 1)]},
    "fused by sizes": {**ATTENTION, "operations": [("Split", 0)]},
    "interleaved and fused by rows": {**MLP, "operations": [("Interleave", 0), ("Chunk", 0)]},
    "interleaved and fused by columns": {**MLP, "operations": [("Interleave", 1), ("Chunk", 1)]},
    "rows interleaved, fused by columns": {**MLP, "operations": [("Interleave", 0), ("Chunk", 1)]},
    "transposed and fused by rows": {**MLP, "operations": [("Transpose", 0, 1), ("Chunk", 0)]},
    "transposed and fused by columns": {**MLP, "operations": [("Transpose", 0, 1), ("Chunk", 1)]},
    "fused and permuted": {**ATTENTION, "operations": [("Chunk", 0), ("PermuteForRope", None, ["q_proj", "k_proj"])]},
    "halves by rows": {"stored": ["mlp.a.weight", "mlp.b.weight"], "weights": DOWN, "operations": [("Concatenate", 0)]},
    "halves by columns": {
        "stored": ["mlp.a.weight", "mlp.b.weight"],
        "weights": DOWN,
        "operations": [("Concatenate", 1)],
    },
}


def model(stored: Any, weights: Any, operations: list[tuple[Any, ...]]) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 20}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True)
    made = transformers.LlamaForCausalLM(config)
    for weight in made.parameters():
        torch.nn.init.normal_(weight)
    steps = [getattr(loading, name)(*options) for name, *options in operations]
    converter = loading.WeightConverter(source_patterns=stored, target_patterns=weights, operations=steps)
    made._weight_conversions = [converter]
    return made


def put_together(tensor: SavedTensor, weights: dict[str, Any]) -> np.ndarray:
    """The checkpoint's tensor, from what is said about its elements; NaN where nothing is."""
    found = np.full(int(np.prod(tensor.shape)), np.nan, np.float32)
    for name, view in tensor.parts or ():
        elements = weights[name].detach().numpy().reshape(-1)
        ranks, positions = view.to_weight(np.arange(found.size))
        assert (np.diff(positions) > 0).all()
        assert np.isnan(found[ranks]).all(), "no element twice"
        found[ranks] = elements[positions]
        back, stored = view.from_weight(positions)
        assert np.array_equal(positions[back][np.argsort(back)], positions)
        assert np.array_equal(np.sort(stored), np.sort(ranks))
    return found.reshape(tensor.shape)


@pytest.mark.parametrize("case", CONVERSIONS)
def test_elements_are_followed_through_every_operation(case: str, tmp_path: Path):
    made = model(**CONVERSIONS[case])
    made.save_pretrained(tmp_path)
    on_disk = load_file(tmp_path / "model.safetensors")
    weights = dict(made.named_parameters(remove_duplicate=False))
    found = {tensor.name: tensor for tensor in saved_tensors(made)}
    assert on_disk.keys() == found.keys() - {"lm_head.weight"}
    for name, wanted in on_disk.items():
        assert np.array_equal(put_together(found[name], weights), wanted.numpy()), name


@pytest.mark.parametrize("case", CONVERSIONS)
def test_every_weight_has_all_its_elements_in_the_checkpoint(case: str, tmp_path: Path):
    made = model(**CONVERSIONS[case])
    made.save_pretrained(tmp_path)
    on_disk = load_file(tmp_path / "model.safetensors")
    weights = dict(made.named_parameters())
    for name, views in stored_views(made, weights).items():
        elements = weights[name].detach().numpy().reshape(-1)
        seen = np.zeros(elements.size, np.int64)
        for view in views:
            order, stored = view.from_weight(np.arange(elements.size))
            assert np.array_equal(on_disk[view.name].numpy().reshape(-1)[stored], elements[order])
            seen[order] += 1
        assert (seen == 1).all(), name


def test_a_computed_tensor_is_not_followed(monkeypatch: pytest.MonkeyPatch):
    revert = loading.revert_weight_conversion

    def computing(model: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor + 0 if "fused" in name else tensor for name, tensor in revert(model, state).items()}

    monkeypatch.setattr(loading, "revert_weight_conversion", computing)
    made = model(**CONVERSIONS["fused by rows"])
    computed = {tensor.name for tensor in saved_tensors(made) if tensor.parts is None}
    assert computed == {f"model.layers.{i}.mlp.fused.weight" for i in range(2)}
