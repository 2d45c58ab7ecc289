"""Pictures with captions, or with prompts and completions, for models that see."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration, PaliGemmaProcessor

from shiradelta.errors import MissingDependencyError, SourceError
from shiradelta.fit.text_behaviour import LEAST_WEIGHT, TextBehaviour
from shiradelta.text.examples import training_examples
from shiradelta.text.kinds import ANSWER, CAPTION
from shiradelta.text.pictures import open_picture
from shiradelta.text.read import ExampleSet, of_texts, read_file, read_list
from shiradelta.text.tokenise import tokenise
from tests.fit.test_fit import build as build_other
from tests.pictures import PATCHES, build, image_processor, picture, processor, write_examples
from tests.seq2seq import build as build_seq2seq

CAPTIONS = ExampleSet(CAPTION, [[picture(n), " ".join(["w1"] * (n + 1))] for n in range(4)])
ANSWERS = ExampleSet(ANSWER, [[picture(n), f"<image> w{n}", " " + " ".join(["w5"] * (n + 1))] for n in range(4)])
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {% for c in m.content %}"
    "{% if c.type == 'image' %}<image>{% else %} {{ c.text }}{% endif %}{% endfor %} w39 \n{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_embeddings_are_those_of_transformers(kind: str, tmp_path: Path):
    """Of the pictures first, then of the captions, whatever a batch pads."""
    model, made = build(kind), processor(kind, tmp_path)
    behaviour = TextBehaviour(made, CAPTIONS, model, 16)
    with torch.no_grad():
        found = behaviour.outputs(model, [3, 0])[-1]
        images, texts = zip(*(CAPTIONS.rows[index] for index in (3, 0)), strict=True)
        padding = {"padding": "max_length", "max_length": 16} if kind == "siglip" else {"padding": True}
        given = made(text=list(texts), images=list(images), **padding, return_tensors="pt")
        expected = model(**given)
    both = torch.cat([expected.image_embeds, expected.text_embeds])
    torch.testing.assert_close(found, both, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_loss_of_captions_is_the_models_own(kind: str, tmp_path: Path):
    model, made = build(kind), processor(kind, tmp_path)
    with torch.no_grad():
        found = training_examples(CAPTIONS, made, model, 16).loss(model, [0, 1, 2, 3])
        images, texts = (list(side) for side in zip(*CAPTIONS.rows, strict=True))
        padding = {"padding": "max_length", "max_length": 16} if kind == "siglip" else {"padding": True}
        given = made(text=texts, images=images, **padding, return_tensors="pt")
        expected = model(**given, return_loss=True).loss
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of the processor
def test_a_model_that_reads_a_completion_before_it_predicts_it_is_refused(tmp_path: Path):
    """PaliGemma's mask lets each token of a text see all others."""
    tokenizer = processor("llava", tmp_path).tokenizer
    images = image_processor()
    images.image_seq_length = PATCHES
    made = PaliGemmaProcessor(images, tokenizer)  # with 1024 tokens of places
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "model_type": "gemma", "vocab_size": 1200, "num_key_value_heads": 1, "head_dim": 16}
    vision = {**sizes, "model_type": "siglip_vision_model", "image_size": 16, "patch_size": 8, "projection_dim": 32}
    config = PaliGemmaConfig(
        text_config=text, vision_config=vision, image_token_index=made.image_token_id, projection_dim=32, hidden_size=32
    )
    torch.manual_seed(0)
    with pytest.raises(SourceError, match="reads all tokens of a text before it predicts any, completions too"):
        TextBehaviour(made, ANSWERS, PaliGemmaForConditionalGeneration(config).eval(), 16)


@pytest.mark.parametrize(("kind", "examples"), [("clip", CAPTIONS), ("llava", ANSWERS)])
def test_the_teacher_finds_its_rows_again(kind: str, examples: ExampleSet, tmp_path: Path):
    model = build(kind)
    behaviour = TextBehaviour(processor(kind, tmp_path), examples, model, 16)
    with torch.no_grad():
        every, some = behaviour.outputs(model, [0, 1, 2, 3]), behaviour.outputs(model, [2, 1])
    places, again = (behaviour.rows(indices) for indices in ([0, 1, 2, 3], [2, 1]))
    assert places is not None
    assert again is not None
    for one, other, (at, number), (later, _) in zip(every, some, places, again, strict=True):
        assert sorted(at.tolist()) == list(range(number))
        kept = torch.empty_like(one)
        kept[at] = one
        torch.testing.assert_close(kept[later], other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("words", range(1, 9))
def test_rows_of_texts_are_never_as_many_as_those_of_pictures(words: int, tmp_path: Path):
    model, made = build("clip"), processor("clip", tmp_path)
    found = tokenise(ExampleSet(CAPTION, [[picture(0), " ".join(["w1"] * words)], [picture(1), "w2"]]), made, model, 16)
    with torch.no_grad():
        result = model(**found.arguments([0, 1]), output_hidden_states=True)
    seen, read = result.vision_model_output.hidden_states[-1], result.text_model_output.hidden_states[-1]
    assert seen.shape[1] != read.shape[1]
    assert found.rows.width([0, 1]) == read.shape[1]


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_completions_count_and_pictures_do_not(share: float, tmp_path: Path):
    model, made = build("llava"), processor("llava", tmp_path)
    behaviour = TextBehaviour(made, ANSWERS, model, 16, prompt_share=share)
    found = training_examples(ANSWERS, made, model, 16, prompt_share=share)
    with torch.no_grad():
        outputs = behaviour.outputs(model, [2])
        loss = found.loss(model, [2])
        given = made(text=["<image> w2 w5 w5 w5"], images=[[ANSWERS.rows[2][0]]], return_tensors="pt")
        ids = given["input_ids"][0]
        assert made.tokenizer.convert_ids_to_tokens(ids) == ["<s>", *["<image>"] * 4, "w2", "w5", "w5", "w5", "</s>"]
        entropies = torch.nn.functional.cross_entropy(model(**given).logits[0, :-1], ids[1:], reduction="none")
    weights = torch.tensor([0.0] * 4 + [share] + [1.0] * 4)
    assert len(outputs[-1]) == int((weights > 0).sum())
    torch.testing.assert_close(loss, (entropies * weights).sum() / weights.sum())
    shares = behaviour.token_weights([2], len(ids))
    assert shares is not None
    assert shares[:4].tolist() == pytest.approx([LEAST_WEIGHT] * 4)
    assert shares[5:9].tolist() == [1.0] * 4


def test_completions_that_share_a_token_with_the_prompt_have_their_own(tmp_path: Path):
    """As TRL tokenises them; of these texts together the tokenizer makes "w1w5", which it does not know."""
    model, made = build("llava"), processor("llava", tmp_path)
    said = ["w5", " w5 w6", "w7 w8 w9"]
    rows = [[picture(n), f"<image> w{n} w1"[: 11 - 3 * (n % 2)], text] for n, text in enumerate(said)]
    examples = ExampleSet(ANSWER, rows)
    found = tokenise(examples, made, model, 16)
    expected = [
        [*prompt.replace("<image>", "<image> " * PATCHES).split(), *text.split(), "</s>"] for _, prompt, text in rows
    ]
    for indices in ([0, 1, 2], [2, 0], [1], [0, 1, 2], [2, 1]):
        given = found.arguments(indices)
        for row, index in enumerate(indices):
            there = given["attention_mask"][row].bool()
            words = made.tokenizer.convert_ids_to_tokens(given["input_ids"][row, there])
            assert words == ["<s>", *expected[index]]
            assert [words[int(at) + 1] for at in found.rows.kept([index])] == [*said[index].split(), "</s>"]
        pixels = made(text=["<image>"] * len(indices), images=[[rows[i][0]] for i in indices], return_tensors="pt")
        assert torch.equal(given["pixel_values"], pixels["pixel_values"])
    with torch.no_grad():
        alone = training_examples(examples, made, model, 16).loss(model, [0])
        apart = training_examples(ExampleSet(ANSWER, [[*rows[0][:2], " w5"]]), made, model, 16).loss(model, [0])
    torch.testing.assert_close(alone, apart)


def test_the_chat_template_places_the_picture(tmp_path: Path):
    model, made = build("llava"), processor("llava", tmp_path)
    made.chat_template = TEMPLATE
    found = tokenise(ExampleSet(ANSWER, [[picture(0), "w1 w2", "w3"]] * 2), made, model, 16)
    ids = found.arguments([0, 1])["input_ids"][0]
    words = made.tokenizer.convert_ids_to_tokens(ids)
    assert words[1:9] == ["<unk>", *["<image>"] * 4, "w1", "w2", "w39"]
    kept = found.rows.kept([0])
    assert [words[int(at) + 1] for at in kept] == ["w3", "w39", "</s>"]
    made.chat_template = (
        "{{ messages | length }}{% for m in messages %}{% for c in m.content %}x{% endfor %}{% endfor %}"
    )
    with pytest.raises(SourceError, match="example 1: the chat template begins an answer otherwise"):
        tokenise(ExampleSet(ANSWER, [[picture(0), "w1 w2", "w3"]]), made, model, 16)


def test_paths_start_from_the_examples_file(tmp_path: Path):
    path = write_examples("clip", tmp_path / "data", 12)
    found = read_file(path)
    assert found.kind is CAPTION
    assert found.rows[0][0] == str(tmp_path / "data" / "shots" / "0.png")
    before = found.identity
    json.dumps(before)
    picture(7).save(tmp_path / "data" / "shots" / "3.png")
    assert [n for n, one in enumerate(read_file(path).identity) if one != before[n]] == [3]
    assert read_file(write_examples("llava", tmp_path / "more", 12)).kind is ANSWER


def png() -> bytes:
    file = io.BytesIO()
    picture(1).save(file, "PNG")
    return file.getvalue()


def test_a_datasets_column(tmp_path: Path):
    held = picture(1)
    found = read_list([{"image": held, "text": "w1"}, {"image": {"bytes": png(), "path": None}, "text": "w1"}])
    assert found is not None
    assert [open_picture(row[0]).size for row in found.rows] == [(16, 16)] * 2
    assert found.identity[0] == [*found.identity[0]]
    assert open_picture(Image.new("L", (4, 4))).mode == "RGB"


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (b"no picture", "a.png: is no picture that Pillow reads; convert it to PNG or JPEG"),
        (b"", "a.png: is no picture"),
        (png()[:100], "a.png: is a damaged picture"),
        (None, "a.png: cannot be read .No such file"),
    ],
)
def test_a_file_that_is_no_picture_is_refused(held: bytes | None, message: str, tmp_path: Path):
    if held is not None:
        (tmp_path / "a.png").write_bytes(held)
    row = [str(tmp_path / "a.png"), "w1"]
    with pytest.raises(SourceError, match=message):
        tokenise(ExampleSet(CAPTION, [[picture(0), "w1"], row]), processor("clip", tmp_path), build("clip"), 16)


def test_without_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(
        MissingDependencyError, match="reading a picture needs PIL, which is not installed; pip install pillow"
    ):
        open_picture(str(tmp_path / "a.png"))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (3, "example 1: its image is no picture; give the path of a file, or an image of Pillow"),
        ("s3://x/a.png", "example 1: s3://x/a.png is a web address, and nothing is downloaded; give the path"),
        ({"path": "a.png"}, "is no picture"),
        ({"bytes": b"no picture"}, "its image: is no picture that Pillow reads"),
        (" ", "example 1: its image is no picture; give the path"),
    ],
)
def test_what_is_no_picture_is_refused_when_it_is_read(image: Any, message: str):
    with pytest.raises(SourceError, match=message):
        read_list([{"image": image, "text": "w1"}])


def test_examples_have_to_suit_the_model(tmp_path: Path):
    made = processor("llava", tmp_path)
    for model in (build_other("causal"), build_other("encoder"), build("llava")):
        with pytest.raises(SourceError, match=r"so image and text are no examples for it; a model that answers takes"):
            TextBehaviour(made, CAPTIONS, model, 16)
    for model in (build("clip"), build_other("encoder"), build_seq2seq("t5")):
        with pytest.raises(SourceError, match=r"image, prompt and completion are no examples|image and prompt and"):
            TextBehaviour(made, ANSWERS, model, 16)
    with pytest.raises(
        SourceError,
        match=r"example 1: the processor does not take it .*; a prompt has one mark of its picture, <image>",
    ):
        TextBehaviour(made, ExampleSet(ANSWER, [[picture(0), "<image> <image> w1", " w2"]]), build("llava"), 16)
    long = ExampleSet(ANSWER, [[picture(0), "<image> w1", " w2" * 80]])
    with pytest.raises(SourceError, match=r"example 1 has 87 tokens with its picture, more than the 64 positions"):
        TextBehaviour(made, long, build("llava"), 16)
    with pytest.raises(SourceError, match=r"CLIPModel has no token embeddings .*CLIP and its kin take image and text"):
        TextBehaviour(made.tokenizer, of_texts(["w1 w2"]), build("clip"), 16)
    assert TextBehaviour(made.tokenizer, of_texts(["w1 " * 100]), build("llava"), 512).lengths == [64]
