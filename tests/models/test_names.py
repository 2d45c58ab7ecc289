"""Names of tensors: finding them among others, what they say, and in which order they stand."""

from __future__ import annotations

import time

import pytest

from shiradelta.models import names
from shiradelta.models.names import Found, Shape, find_names, in_model_order, layer_of


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


def find(wanted: list[str], have: list[str]) -> Found:
    return find_names(dict.fromkeys(wanted), dict.fromkeys(have))


def stack(prefix: str, count: int = 3) -> list[str]:
    return [f"{prefix}layers.{i}.{kind}.weight" for i in range(count) for kind in ("q_proj", "up_proj")]


def test_a_prefix_is_added_or_removed():
    have = [f"encoder.layer.{i}.weight" for i in range(22)]
    wanted = ["classifier.bias", "classifier.weight", *(f"vit.{name}" for name in have)]
    assert find(wanted, have).names == {f"vit.{name}": name for name in have}
    assert find(have, wanted).names == {name: f"vit.{name}" for name in have}


def test_each_group_has_a_prefix_of_its_own():
    have = [*stack("language_model.model."), "language_model.model.norm.weight", "language_model.lm_head.weight"]
    have += [*stack("vision_tower.vision_model.", 2), "multi_modal_projector.linear.weight"]
    wanted = [*stack("model.language_model."), "model.language_model.norm.weight", "lm_head.weight"]
    wanted += [*stack("model.vision_tower.vision_model.", 2), "model.multi_modal_projector.linear.weight"]
    assert find(wanted, have) == Found(dict(zip(wanted, have, strict=True)))
    assert find(have, wanted) == Found(dict(zip(have, wanted, strict=True)))


def test_an_exact_name_is_never_dropped_for_a_prefix():
    have = [*stack(""), "lm_head.weight"]
    wanted = [*stack("model."), "lm_head.weight"]
    assert find(wanted, have).names == dict(zip(wanted, have, strict=True))
    assert find(have, wanted).names == dict(zip(have, wanted, strict=True))


def test_names_that_fit_two_tensors_are_unclear_and_both_are_named():
    found = find(stack(""), [*stack("model.encoder."), *stack("model.decoder.")])
    assert not found.names
    assert found.unclear["layers.0.q_proj.weight"] == (
        "'layers.0.q_proj.weight' may be 'model.decoder.layers.0.q_proj.weight' or"
        " 'model.encoder.layers.0.q_proj.weight'"
    )
    assert found.unclear.keys() == set(stack(""))


def test_names_of_one_tensor_count_once():
    have = [*stack("model.language_model."), *stack("language_model.model.")]
    same = {name: name.rpartition("layers")[2] for name in have}
    assert find(stack(""), have).unclear.keys() == set(stack(""))
    found = find_names(dict.fromkeys(stack("")), dict.fromkeys(have), same)
    assert not found.unclear
    assert [same[name] for name in found.names.values()] == [name.rpartition("layers")[2] for name in stack("")]
    del same[have[0]]
    assert find_names(dict.fromkeys(stack("")), dict.fromkeys(have), same).unclear


def test_further_names_tell_which_prefix_is_meant():
    have = [*stack("model.encoder."), "model.encoder.conv1.weight", *stack("model.decoder.")]
    wanted = [*stack(""), "conv1.weight"]
    assert find(wanted, have).names == {name: f"model.encoder.{name}" for name in wanted}


def test_shapes_tell_which_prefix_is_meant_and_a_resized_tensor_goes_with_its_group():
    have: dict[str, Shape | None] = dict.fromkeys(stack("vision."), (4, 4)) | dict.fromkeys(stack("text."), (8, 2))
    have["text.embed.weight"] = (100, 8)
    wanted: dict[str, Shape | None] = dict.fromkeys(stack(""), (2, 8)) | {"embed.weight": (104, 8)}
    assert find_names(wanted, have).names == {name: f"text.{name}" for name in wanted}


def test_the_words_of_a_prefix_tell_which_half_of_a_model_is_meant():
    have = [*stack("language_model.model."), *stack("vision_tower.encoder.")]
    wanted = [*stack("model.language_model."), *stack("model.vision_tower.encoder.")]
    assert find(wanted, have) == Found(dict(zip(wanted, have, strict=True)))
    assert find(wanted[: len(wanted) // 2], have).names == dict(
        list(zip(wanted, have, strict=True))[: len(wanted) // 2]
    )


@pytest.mark.parametrize(
    ("wanted", "have"),
    [
        ("model.encoder.", "model.decoder."),
        ("encoder.", "decoder."),
        ("model.audio_tower.", "model.vision_tower."),
        ("vision_model.encoder.", "text_model.encoder."),
        ("down_blocks.0.", "up_blocks.0."),
        ("transformer_blocks.0.", "single_transformer_blocks.0."),
        ("mlp.shared_expert.", "mlp.experts."),
    ],
)
def test_one_part_of_a_model_is_not_taken_for_another(wanted: str, have: str):
    """Not even if it is the only one that is there, or the only one left."""
    assert find(stack(wanted), stack(have)) == Found()
    both = [*stack("language."), *stack(have)]
    assert find([*stack("language."), *stack(wanted)], both).names == {name: name for name in stack("language.")}


def test_a_half_that_is_lacking_does_not_hide_the_other():
    wanted = [*stack("model.text_model.encoder."), *stack("model.vision_model.encoder.")]
    found = find(wanted, stack("text_model.encoder."))
    assert found == Found({f"model.{name}": name for name in stack("text_model.encoder.")})


def test_two_names_for_one_tensor_are_unclear():
    found = find([*stack("text."), *stack("vision.")], stack(""))
    assert not found.names
    assert found.unclear["text.layers.0.q_proj.weight"] == (
        "'text.layers.0.q_proj.weight' and 'vision.layers.0.q_proj.weight' may both be 'layers.0.q_proj.weight'"
    )


@pytest.mark.parametrize(
    ("wanted", "have"),
    [
        ("score.weight", "classifier.weight"),  # another head
        ("pooler.dense.weight", "encoder.layer.0.dense.weight"),
        ("layers.0.q_proj.weight", "layers.1.q_proj.weight"),
        ("model.layers.0.mlp.0.weight", "h.1.mlp.0.weight"),
        ("layers.0.dense.weight", "dense.weight"),
    ],
)
def test_a_lone_name_is_not_taken_for_another(wanted: str, have: str):
    assert find([wanted], [have]) == Found()


def test_a_sentence_transformers_module_is_called_by_its_folder_or_its_number():
    on_disk = [*stack(""), "2_Dense/linear.weight", "3_Dense/linear.weight"]
    in_memory = [*stack("0.auto_model."), "2.linear.weight", "3.linear.weight"]
    assert find(on_disk, in_memory).names == dict(zip(on_disk, in_memory, strict=True))
    assert find(in_memory, on_disk).names == dict(zip(in_memory, on_disk, strict=True))
    assert find(["2.linear.weight"], ["3_Dense/linear.weight", "12_Dense/linear.weight"]) == Found()
    assert find(["2_Dense/linear.weight"], ["3.linear.weight", "linear.weight"]) == Found()
    both = find(["2.linear.weight"], ["2_Dense/linear.weight", "2_Other/linear.weight"])
    assert not both.names
    assert both.unclear.keys() == {"2.linear.weight"}


@pytest.mark.slow
def test_prefixes_of_many_names_are_found_in_linear_time():
    have = [f"layers.{i}.experts.{j}.up.weight" for i in range(60) for j in range(256)]
    start = time.process_time()
    assert len(find(["head.weight", *(f"model.{name}" for name in have)], have).names) == len(have)
    assert not find([f"model.{name.replace('up', 'down')}" for name in have], have).names
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("wanted", "have"),
    [
        pytest.param(
            [f"a{i}.0.weight" for i in range(20_000)],
            [f"b{i}.0.weight" for i in range(20_000)],
            marks=pytest.mark.slow,
        ),
        (
            [f"{'ab' * (i % 50)}.{'c' * i}.w" for i in range(1000)],
            [f"{'ab' * (i % 50)}.{'d' * i}.w" for i in range(1000)],
        ),
        (["a." * 500 + "weight"], ["b." * 500 + "weight"]),
        (["a." * 500 + "0.weight"], ["b." + "a." * 500 + "0.weight"]),
    ],
    ids=["numbers", "lengths", "parts", "a part more"],
)
def test_strange_names_are_searched_soon(wanted: list[str], have: list[str]):
    began = time.process_time()
    find(wanted, have)
    assert time.process_time() - began < 10


@pytest.mark.slow
def test_a_search_that_would_take_hours_is_given_up(monkeypatch: pytest.MonkeyPatch):
    letters = [f"{i:b}".replace("0", "p").replace("1", "q") for i in range(4000)]
    wanted, have = stack("", 40), [f"{x}.{name}" for x in letters for name in stack("", 1)]
    assert find(wanted, have).unclear["layers.0.q_proj.weight"] == (
        "'layers.0.q_proj.weight' may be 'p.layers.0.q_proj.weight' or 'q.layers.0.q_proj.weight' or"
        " 'qp.layers.0.q_proj.weight' or 'qpp.layers.0.q_proj.weight' or 3,996 others"
    )
    monkeypatch.setattr(names, "_MOST_COMPARED", 1 << 10)
    found = find(wanted, have)
    assert not found.names
    assert found.unclear == {name: f"{name!r} may be any of too many tensors" for name in wanted}


OLD = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
OLD |= {f"conv.weight_{end}": f"conv.parametrizations.weight.original{i}" for i, end in enumerate("gv")}


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_names_of_old_checkpoints_are_found_under_todays(prefix: str):
    olds = [f"layers.{i}.{old}" for i in range(2) for old in OLD]
    todays = [f"{prefix}layers.{i}.{today}" for i in range(2) for today in OLD.values()]
    assert find(olds, todays) == Found(dict(zip(olds, todays, strict=True)))
    assert find(todays, olds) == Found(dict(zip(todays, olds, strict=True)))
    assert find(olds, [*olds, *todays]).names == {name: name for name in olds}


def test_a_model_with_both_spellings_keeps_them_apart():
    both = ["a.LayerNorm.gamma", "a.LayerNorm.weight"]
    assert find(both, both).names == {name: name for name in both}
    assert find(["a.LayerNorm.gamma"], ["b.LayerNorm.gamma", "b.LayerNorm.weight"]).names == {}
