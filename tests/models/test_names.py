"""Names of tensors: what they say, and in which order they stand."""

from __future__ import annotations

import time

import pytest

from shiradelta.models.names import in_model_order, layer_of, rename_all


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.12.mlp.up_proj.weight", "model.layers.12"),
        ("unet/down_blocks.0.attentions.1.to_q.weight", "unet/down_blocks.0"),
        ("lm_head.weight", "lm_head.weight"),
        ("transformer.h.3.ln_1.weight", "transformer.h.3"),
    ],
)
def test_layers_are_counted_by_the_first_number(name: str, layer: str):
    assert layer_of(name) == layer


def test_names_are_sorted_with_numbers_by_value():
    names = ["h.10.w", "h.2.w", "a.w", "unet/h.2.w"]
    assert in_model_order(names) == ["a.w", "h.2.w", "h.10.w", "unet/h.2.w"]


def test_the_prefix_is_the_one_that_finds_most():
    have = [f"encoder.layer.{i}.weight" for i in range(22)]
    wanted = ["classifier.bias", "classifier.weight", *(f"vit.{name}" for name in have)]
    assert rename_all(wanted, dict.fromkeys(have)) == {f"vit.{name}": name for name in have}
    assert rename_all(have, dict.fromkeys(wanted)) == {name: f"vit.{name}" for name in have}


def test_prefixes_of_many_names_are_found_in_linear_time():
    have = dict.fromkeys(f"layers.{i}.experts.{j}.up.weight" for i in range(60) for j in range(256))
    start = time.process_time()
    assert len(rename_all(["head.weight", *(f"model.{name}" for name in have)], have)) == len(have)
    assert time.process_time() - start < 5
