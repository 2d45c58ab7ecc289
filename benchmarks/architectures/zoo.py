"""`Architecture`: a tiny random model, how it is saved and loaded, and what it takes as input."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from string import ascii_letters
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Tensor]

#: Tokens of the vocabulary of language models; those below FIRST_WORD are special to some models.
VOCABULARY, FIRST_WORD = 256, 64
#: Tokens of an example.
LENGTH = 8
#: The sizes that configurations of transformers name alike.
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT: dict[str, Any] = {**SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": 64}
SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
#: A decoder whose heads share keys and values.
DECODER: dict[str, Any] = {**TEXT, **SPECIAL, "num_key_value_heads": 2}
VISION: dict[str, Any] = {**SIZES, "image_size": 32, "patch_size": 8}


@dataclass(frozen=True)
class Architecture:
    """One row of the matrix.

    Attributes:
        name: what the row is called.
        family: what rows are grouped by.
        build: makes the model; its weights are random.
        inputs: makes one example, with a batch dimension of 1.
        usual: layers that a LoRA for this architecture usually changes, as ends of their names.
        unwrapped: linear layers that PEFT refuses, as ends of their names.
        experts: stacked weights of experts, as ends of parameters' names.
        texts: the model is fitted from its folder on texts; otherwise it is given to the fit with a forward function.
        answers: these texts are prompts with completions.
        needs: packages that have to be importable.
        save: writes a model into a folder.
        load: reads a folder into a model; `like` is a model of the same architecture.
        wrapped: the part of a model that PEFT wraps.
    """

    name: str
    family: str
    build: Callable[[], Any]
    inputs: Callable[[], Inputs]
    usual: tuple[str, ...] = ("q_proj", "v_proj")
    unwrapped: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    texts: bool = False
    answers: bool = False
    needs: tuple[str, ...] = ("transformers",)
    save: Callable[[Any, Path], None] = field(default=lambda model, folder: _save_pretrained(model, folder))
    load: Callable[[Path, Any], Any] = field(default=lambda folder, like: _from_pretrained(folder, like))
    wrapped: Callable[[Any], Any] = field(default=lambda model: model)


#: Families in the order of the table.
FAMILIES = ("text", "experts", "vision", "multimodal", "audio", "diffusers", "others")
#: Name -> architecture.
ARCHITECTURES: dict[str, Architecture] = {}


def add(architecture: Architecture) -> None:
    """Adds a row.

    Raises:
        ValueError: there is one of this name, or its family is unknown.
    """
    if architecture.family not in FAMILIES:
        raise ValueError(f"family {architecture.family!r} is unknown; take {', '.join(FAMILIES)}")
    if architecture.name in ARCHITECTURES:
        raise ValueError(f"architecture {architecture.name!r} is there twice")
    ARCHITECTURES[architecture.name] = architecture


def transformer(model: str, **options: Any) -> Callable[[], Any]:
    """A function that makes a model of transformers.

    Args:
        model: the class of the model.
        options: its configuration's; a mapping stays one, for the configuration of a part.
    """

    def build() -> Any:
        kind = getattr(import_module("transformers"), model)
        return kind(kind.config_class(**options))

    return build


def tokens(count: int = LENGTH) -> Tensor:
    """Random token ids that are special to no model."""
    return torch.randint(FIRST_WORD, VOCABULARY, (1, count))


def text_inputs() -> Inputs:
    """What a language model takes."""
    return {"input_ids": tokens()}


def image_inputs(size: int = 32) -> Callable[[], Inputs]:
    """What a model of images takes."""
    return lambda: {"pixel_values": torch.randn(1, 3, size, size)}


def forward(model: Any, batch: Mapping[str, Tensor]) -> list[Tensor]:
    """The model's floating-point outputs; what it keeps for later tokens is none."""
    found = model(**batch)
    found = found.values() if isinstance(found, Mapping) else found if isinstance(found, tuple) else [found]
    return [output for output in found if isinstance(output, Tensor) and output.is_floating_point()]


def batch(examples: list[Inputs]) -> Inputs:
    """Several examples as one."""
    return {name: torch.cat([example[name] for example in examples]) for name in examples[0]}


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of single letters, so that texts can be made for any vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = {0: "<pad>", 1: "<s>", 2: "</s>", 3: "<unk>", **dict(enumerate(ascii_letters, FIRST_WORD))}
    vocabulary = {names.get(token, f"<{token}>"): token for token in range(VOCABULARY)}
    letters = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.save(str(folder / "tokenizer.json"))
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def texts(count: int) -> list[str]:
    """Texts of letters that the tokenizer knows."""
    return ["".join(ascii_letters[i] for i in torch.randint(len(ascii_letters), (LENGTH,))) for _ in range(count)]


def answers(count: int) -> list[dict[str, str]]:
    """Prompts and completions of letters that the tokenizer knows."""
    return [{"prompt": one, "completion": other} for one, other in zip(texts(count), texts(count), strict=True)]


def _save_pretrained(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)


def _from_pretrained(folder: Path, like: Any) -> Any:
    model = type(like).from_pretrained(folder, local_files_only=True).eval()
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False  # some keep their state in place, which gradients cannot pass
    return model
