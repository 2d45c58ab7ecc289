"""Models that see, small enough for a test, and pictures for them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipConfig,
    SiglipModel,
    SiglipProcessor,
)

from tests.seq2seq import WORDS, write_tokenizer

_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
_TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
#: 4 patches, and what CLIP puts before them.
PATCHES = 4


def image_processor() -> Any:
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    return CLIPImageProcessor(**sizes)


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "clip":
        config = CLIPConfig(text_config=_TEXT, vision_config=_VISION, projection_dim=16)
        return CLIPModel(config).eval()
    if kind == "siglip":
        return SiglipModel(SiglipConfig(text_config=_TEXT, vision_config=_VISION)).eval()
    text = {**_TEXT, "model_type": "llama", "num_key_value_heads": 2, "max_position_embeddings": 64}
    vision = {**_VISION, "model_type": "clip_vision_model"}
    config = LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=len(WORDS) + 4,
        vision_feature_layer=-1,
        image_seq_length=PATCHES,
    )
    return LlavaForConditionalGeneration(config).eval()


def processor(kind: str, folder: Path) -> Any:
    tokenizer = write_tokenizer("bart", folder)
    if kind == "clip":
        return CLIPProcessor(image_processor(), tokenizer)
    if kind == "siglip":
        tokenizer.model_input_names = ["input_ids"]  # as it is published: padding is read as text
        return SiglipProcessor(image_processor(), tokenizer)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    return LlavaProcessor(
        image_processor(),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def write_model(kind: str, folder: Path) -> None:
    build(kind).save_pretrained(folder)
    processor(kind, folder).save_pretrained(folder)


def picture(word: int, shot: int = 0) -> Image.Image:
    """A colour for a word, with the noise of a shot."""
    colour = np.random.default_rng(word).integers(0, 200, 3)
    noise = np.random.default_rng([word, shot]).integers(0, 50, (16, 16, 3))
    return Image.fromarray((colour + noise).astype(np.uint8))


def write_examples(kind: str, folder: Path, count: int = 60) -> Path:
    rng, lines = random.Random(0), list[dict[str, str]]()
    (folder / "shots").mkdir(parents=True)
    for number in range(count):
        word = rng.randrange(30)
        picture(word, number).save(folder / "shots" / f"{number}.png")
        line = {"image": f"shots/{number}.png"}
        if kind == "llava":
            line |= {"prompt": f"<image> {rng.choice(WORDS)}", "completion": f" {WORDS[word]} {WORDS[word]}"}
        else:
            line |= {"text": f"{WORDS[word]} {WORDS[word]}"}
        lines.append(line)
    path = folder / "seen.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_pair(kind: str, root: Path) -> tuple[Path, Path, Path]:
    """Folders of a base and of a fine-tune that has learnt the colours, and a file of examples."""
    from shiradelta.models.processors import load_processor
    from shiradelta.text.examples import training_examples
    from shiradelta.text.read import read_file

    write_model(kind, root / "base")
    path = write_examples(kind, root / "data")
    model: Any = type(build(kind)).from_pretrained(root / "base")
    examples = training_examples(read_file(path), load_processor("picture", root / "base"), model, 16)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for step in range(30):
        optimizer.zero_grad()
        examples.loss(model, range(step % 3, 60, 3)).backward()
        optimizer.step()
    model.save_pretrained(root / "tuned")
    return root / "base", root / "tuned", path
