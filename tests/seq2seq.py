"""Encoder-decoders small enough for a test, and examples for them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedTokenizerFast,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

WORDS = [f"w{i}" for i in range(40)]
PAD, END, BEGIN = "<pad>", "</s>", "<s>"
_SPECIAL = [PAD, END, BEGIN, "<unk>"]
#: BART as it is published: it starts with the end, and its texts have marks at both ends.
_TOKENS = {"pad_token_id": 0, "eos_token_id": 1, "vocab_size": 64}
_MARKS = {"t5": f"$A {END}", "switch": f"$A {END}", "bart": f"{BEGIN} $A {END}"}


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "t5":
        sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
        return T5ForConditionalGeneration(T5Config(**_TOKENS, **sizes, decoder_start_token_id=0, dropout_rate=0)).eval()
    if kind == "switch":
        sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2}
        sparse = {"num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
        experts = SwitchTransformersConfig(**_TOKENS, **sizes, **sparse, decoder_start_token_id=0, dropout_rate=0)
        return SwitchTransformersForConditionalGeneration(experts).eval()
    layers = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in _BART.items()}
    config = BartConfig(
        **_TOKENS,
        **layers,
        d_model=32,
        bos_token_id=2,
        decoder_start_token_id=1,
        max_position_embeddings=32,
        init_std=0.2,
    )
    return BartForConditionalGeneration(config).eval()


_BART = {"layers": 2, "attention_heads": 2, "ffn_dim": 64}


def write_tokenizer(kind: str, folder: Path) -> Any:
    vocabulary = {word: i for i, word in enumerate([*_SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=_MARKS[kind], special_tokens=[(mark, vocabulary[mark]) for mark in (BEGIN, END)]
    )
    found = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token=PAD, eos_token=END, bos_token=BEGIN
    )
    found.save_pretrained(folder)
    return found


def write_pair(kind: str, root: Path) -> tuple[Path, Path]:
    """Folders of a base and of a fine-tune, which has learnt some of `examples`."""
    model: Any = build(kind)
    model.save_pretrained(root / "base")
    tokenizer = write_tokenizer(kind, root / "base")
    optimizer = torch.optim.Adam([p for name, p in model.named_parameters() if "shared" not in name], 3e-3)
    rows = examples()
    for step in range(40):
        some = rows[step % 5 :: 5]
        given = tokenizer([one["prompt"] for one in some], return_tensors="pt", padding=True)
        labels = tokenizer([one["completion"] for one in some], return_tensors="pt", padding=True)["input_ids"]
        labels = labels.masked_fill(labels == 0, -100)
        ids, there = given["input_ids"], given["attention_mask"]
        optimizer.zero_grad()
        model(input_ids=ids, attention_mask=there, labels=labels).loss.backward()
        optimizer.step()
    model.save_pretrained(root / "tuned")
    return root / "base", root / "tuned"


def examples(count: int = 120) -> list[dict[str, str]]:
    """The completion repeats the first word of the prompt, as often as the prompt has words but one."""
    rng = random.Random(0)
    found = []
    for _ in range(count):
        words = rng.choices(WORDS, k=rng.randint(2, 7))
        found.append({"prompt": " ".join(words), "completion": " ".join(words[:1] * (len(words) - 1))})
    return found
