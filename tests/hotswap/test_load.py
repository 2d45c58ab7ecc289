"""`load` in one line, strengths by `swap[name] = 0.8`, and what sessions and files look like when they are shown."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import shiradelta as sd
from shiradelta.errors import ArgumentError, BaseMismatchError, DeltaError, TargetError
from tests.swapping import adapter, bits, file, formula, random_delta

SHAPE = (9, 11)


def linear() -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(SHAPE[1], SHAPE[0], bias=False).to(torch.bfloat16)


def delta(seed: int, model: torch.nn.Linear, op: str = "add") -> bytes:
    return adapter({"weight": random_delta(SHAPE, 12, seed, op=op, base=model.weight)})


def test_a_line_loads_and_switches(tmp_path: Path):
    model = linear()
    base, data = bits(model.weight), delta(1, model)
    (tmp_path / "style.v2.shd").write_bytes(data)
    swap = sd.load(model, tmp_path / "style.v2.shd", strength=0.8)
    assert swap.active == {"style.v2": 0.8}
    assert np.array_equal(bits(model.weight), formula(base, "bfloat16", [(data, 0.8)], "weight"))
    swap.revert()
    assert np.array_equal(bits(model.weight), base)


def test_sources_without_a_name_and_names_that_are_given():
    model = linear()
    assert sd.load(model, delta(1, model), 0).active == {}
    assert list(sd.load(model, file(delta(1, model)), 0)) == ["delta"]
    assert list(sd.load({"other": model.weight}, delta(1, model), 0, names={"weight": "other"}, name="a")) == ["a"]


def test_a_session_takes_further_deltas_beside_those_it_has():
    model = linear()
    base, one, other = bits(model.weight), delta(1, model), delta(2, model)
    swap = sd.load(model, one, 0.5, name="one")
    assert sd.load(swap, other, name="other") is swap
    both = [(one, 0.5), (other, 1.0)]
    assert np.array_equal(bits(model.weight), formula(base, "bfloat16", both, "weight"))
    with pytest.raises(ArgumentError, match="those of the session"):
        sd.load(swap, other, name="third", backend="numpy")
    with pytest.raises(TargetError, match="of another HotSwap"):
        sd.load(model, adapter({"weight": random_delta(SHAPE, 12, 3)}))


@pytest.mark.parametrize("strength", [0.8, 1])
def test_the_same_line_twice_is_refused_until_the_delta_is_out(tmp_path: Path, strength: float):
    """As where a notebook's cell runs a second time."""
    model = linear()
    base = bits(model.weight)
    (tmp_path / "style.shd").write_bytes(delta(1, model))
    swap = sd.load(model, tmp_path / "style.shd", strength)
    patched = bits(model.weight)
    with pytest.raises((BaseMismatchError, TargetError)):
        sd.load(model, tmp_path / "style.shd", strength)
    assert np.array_equal(bits(model.weight), patched)
    swap.revert()
    assert np.array_equal(bits(model.weight), base)
    assert sd.load(model, tmp_path / "style.shd", strength).active == {"style": strength}
    assert np.array_equal(bits(model.weight), patched)


def test_what_fails_leaves_session_and_weights_as_they_were():
    model = linear()
    swap = sd.load(model, delta(1, model), name="one")
    before = bits(model.weight)
    stranger = adapter({"nothing": random_delta(SHAPE, 3, 1)})
    for data, strength, kind in ((delta(2, model), float("nan"), DeltaError), (stranger, 1.0, BaseMismatchError)):
        with pytest.raises(kind):
            sd.load(swap, data, strength, name="two")
        assert list(swap) == ["one"]
        assert swap.active == {"one": 1.0}
        assert np.array_equal(bits(model.weight), before)
    with pytest.raises(TargetError, match="HotSwap takes a torch module, a pipeline or a mapping"):
        sd.load(5, delta(1, model))


def test_strengths_are_set_by_name():
    model = linear()
    base, files = bits(model.weight), {"one": delta(1, model), "other": delta(2, model)}
    swap = sd.HotSwap(model)
    for name, data in files.items():
        swap.load(name, data)
    assert [swap["one"], swap["other"]] == [0, 0]
    swap["one"] = 0.5
    swap["other"] = 1
    swap["one"] = -0.25
    assert swap.active == {"one": -0.25, "other": 1}
    expected = formula(base, "bfloat16", [(files["one"], -0.25), (files["other"], 1)], "weight")
    assert np.array_equal(bits(model.weight), expected)
    swap["one"] = 0
    assert swap.active == {"other": 1}
    assert swap["one"] == 0
    del swap["other"]
    assert list(swap) == ["one"]
    assert "other" not in swap
    assert np.array_equal(bits(model.weight), base)


def test_wrong_names_and_strengths_are_refused():
    model = linear()
    swap = sd.load(model, delta(1, model), name="one")
    for act in (lambda: swap["two"], lambda: swap.__setitem__("two", 1.0), lambda: swap.__delitem__("two")):
        with pytest.raises(ArgumentError, match="adapter 'two' is not loaded"):
            act()
    with pytest.raises(ArgumentError, match="strength is 'much'; give a number"):
        swap["one"] = "much"  # type: ignore[assignment]
    assert swap.active == {"one": 1.0}


def test_what_is_beneath_a_successor_stays_until_that_is_out():
    model = linear()
    base = bits(model.weight)
    swap = sd.load(model, delta(1, model), name="one")
    sd.load(swap, delta(1, model), name="two")  # the same positions, so it fits the present weights only
    assert swap.loaded["two"].beneath == {"one": 1.0}
    for act in (lambda: swap.__setitem__("one", 0), lambda: swap.__delitem__("one")):
        with pytest.raises(ArgumentError, match="'one' is beneath 'two'"):
            act()
    del swap["two"]
    del swap["one"]
    assert np.array_equal(bits(model.weight), base)


def pipeline_of_two() -> tuple[dict[str, Any], bytes, dict[str, np.ndarray]]:
    """Two components, a delta of both, and the bits of both."""
    torch.manual_seed(0)
    parts = {part: torch.nn.Sequential(torch.nn.Linear(11, 9), torch.nn.Linear(9, 9)) for part in ("unet", "text")}
    names = {f"{part}/{i}.weight": module[i].weight for part, module in parts.items() for i in (0, 1)}
    deltas = {
        name: random_delta(tuple(weight.shape), 12, i, "float32", base=weight)
        for i, (name, weight) in enumerate(names.items())
    }
    return parts, adapter(deltas, "f32"), {name: bits(weight) for name, weight in names.items()}


def test_each_component_has_a_strength():
    model, data, before = pipeline_of_two()
    swap = sd.load(model, data, {"unet": 0.8, "text": 0.5}, name="style")
    assert swap.active == {"style/unet": 0.8, "style/text": 0.5}

    def check(**strengths: float) -> None:
        for name, base in before.items():
            part, _, number = name.partition("/")
            expected = formula(base.ravel(), "float32", [(data, strengths[part])] if strengths[part] else [], name)
            assert np.array_equal(bits(model[part][int(number[0])].weight).ravel(), expected), name

    check(unet=0.8, text=0.5)
    swap["style/text"] = 0.1
    check(unet=0.8, text=0.1)
    swap["style"] = {"unet": 0, "text": 2}
    check(unet=0, text=2)
    assert swap.active == {"style/text": 2.0}
    with pytest.raises(ArgumentError, match=r"adapter 'style/vae' is not loaded \(style/unet, style/text are\)"):
        swap["style"] = {"text": 1, "vae": 1}
    check(unet=0, text=2)
    del swap["style/text"]
    check(unet=0, text=0)
    assert list(swap) == ["style/unet"]


def test_strengths_by_pattern_and_by_layer_take_a_stream_too():
    model, data, before = pipeline_of_two()
    swap = sd.load(model, file(data), {"layers 0": 0.5, "*.weight": 2})
    assert swap.active == {"delta/layers 0": 0.5, "delta/*.weight": 2.0}
    for name, base in before.items():
        part, _, number = name.partition("/")
        strength = 0.5 if number[0] == "0" else 2.0
        expected = formula(base.ravel(), "float32", [(data, strength)], name)
        assert np.array_equal(bits(model[part][int(number[0])].weight).ravel(), expected), name
    swap.revert()
    assert all(
        np.array_equal(bits(model[name.partition("/")[0]][int(name.partition("/")[2][0])].weight), base)
        for name, base in before.items()
    )


@pytest.mark.parametrize(
    ("strength", "said"),
    [
        ({"unet": 1}, "no pattern matches tensor 'text/"),
        ({"unte": 1, "*": 1}, "no tensor is called 'unte'"),
        ({"*": 1, "unet": 1}, "comes after others"),
        ({"unet": 1, "text": float("inf")}, "strength"),
        ({"unet": "much"}, "strength is"),
        ({}, "no pattern matches"),
    ],
)
def test_strengths_that_leave_a_question_change_nothing(strength: Any, said: str):
    model, data, before = pipeline_of_two()
    swap = sd.HotSwap(model)
    with pytest.raises(DeltaError, match=said):
        sd.load(swap, data, strength)
    assert list(swap) == []
    weight = model["unet"][0].weight
    assert np.array_equal(bits(weight), before["unet/0.weight"])


def test_a_tensor_is_in_one_part_of_a_delta_at_a_time():
    model, data, before = pipeline_of_two()
    swap = sd.HotSwap(model)
    every = list(before)
    report = swap.load("one", data, only=every[:3])
    assert list(report.matched) == sorted(every[:3])
    swap.load("two", data, only=every[2:])
    swap.load("three", data, only=every[3:])
    swap.switch({"one": 1.0, "three": 1.0})
    with pytest.raises(ArgumentError, match="are the same delta"):
        swap.switch({"one": 1.0, "two": 1.0})
    with pytest.raises(ArgumentError, match="only= names 'vae', which is not"):
        swap.load("four", data, only=["vae"])


def tiny_bert() -> Any:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.BertModel(transformers.BertConfig(**small, vocab_size=5, max_position_embeddings=8)).eval()


@pytest.mark.slow  # imports transformers' pipelines
def test_a_pipeline_of_transformers_is_its_model():
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
    pipeline = transformers.FeatureExtractionPipeline(model=tiny_bert(), tokenizer=tokenizer)
    name = "encoder.layer.0.output.dense.weight"
    weight = pipeline.model.get_parameter(name)
    data = adapter({name: random_delta(tuple(weight.shape), 5, 1, "float32", base=weight)}, "f32")
    before = pipeline("a")
    swap = sd.load(pipeline, data)
    assert pipeline("a") != before
    swap.revert()
    assert pipeline("a") == before


@pytest.mark.slow  # imports diffusers
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_pipeline_of_diffusers_is_its_components():
    diffusers = pytest.importorskip("diffusers")
    sizes = {"sample_size": 8, "block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    pipeline = diffusers.DDPMPipeline(diffusers.UNet2DModel(**sizes, **blocks), diffusers.DDPMScheduler())
    weight = pipeline.unet.conv_in.weight
    before = bits(weight)
    data = adapter({"unet/conv_in.weight": random_delta(tuple(weight.shape), 5, 1, "float32", base=weight)}, "f32")
    swap = sd.load(pipeline, data, 0.5)
    assert np.array_equal(
        bits(pipeline.unet.conv_in.weight).ravel(),
        formula(before.ravel(), "float32", [(data, 0.5)], "unet/conv_in.weight"),
    )
    swap.revert()
    assert np.array_equal(bits(weight), before)
    pipeline.unet = diffusers.UNet2DModel(**sizes, **blocks)
    with pytest.raises(TargetError, match=r"was changed from outside|moved or replaced"):
        swap.switch("delta")


def test_what_is_shown_is_short_and_escaped(tmp_path: Path):
    shapes = {f"layer.{i}.<b>weight</b>": (4, 4) for i in range(60)}
    tensors = {name: random_delta(shape, 2, i) for i, (name, shape) in enumerate(shapes.items())}
    path = tmp_path / "wide.shd"
    path.write_bytes(adapter(tensors))
    swap = sd.load({name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}, path, 0.8)
    assert repr(swap) == "<HotSwap on dict: 'wide' at 0.8>"
    assert repr(sd.HotSwap({})) == "<HotSwap on dict: no adapter is loaded>"
    with sd.open_delta(path) as opened:
        shown = repr(opened)
        assert shown == f"<Delta {path}: 60 tensors, 120 nonzeros, {path.stat().st_size / 1000:.2f} KB>"
        table = opened._repr_html_()
    for html in (table, swap._repr_html_()):
        assert html.count("<table>") == html.count("</table>") == 1
        assert "<b>" not in html
    assert len(repr(swap.loaded["wide"])) < 200
    assert "&lt;b&gt;weight" in table
    assert "and 40 more" in table
    assert ">0.8<" in swap._repr_html_()


def test_the_examples_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs/load.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "load.md", "exec"), {})
