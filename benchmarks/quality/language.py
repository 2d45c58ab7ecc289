"""A language model, pretrained here on prose and tuned to Python source (`corpus` has both)."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import corpus
from .tasks import DEVICE, TEXTS, Batch, Task, optimise

VOCABULARY = 8_192
TOKENS = 64
BATCH = 128
#: 17 M parameters.
MODEL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 2 * TOKENS,
    "tie_word_embeddings": True,
}
PRETRAINING_STEPS, PRETRAINING_BATCH, PRETRAINING_RATE = 1_200, 256, 1.5e-3
HELD_OUT = 2_000
_PADDING = -1


class Language(Task):
    """Prediction of the next token."""

    name = "Python source, 17 M Llama"
    linears = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    rates: ClassVar = {"LoRA": 1e-3, "full": 2e-4, "sparse": 2e-2}
    measures = ("log-likelihood, nats a token", "accuracy of the next token")

    def __init__(self, folder: Path) -> None:
        """`folder` is made by `pretrain`."""
        from transformers import AutoTokenizer

        self.base = folder / "base"
        tokenizer = AutoTokenizer.from_pretrained(self.base, local_files_only=True)
        texts = json.loads((folder / "texts.json").read_text())
        rng = random.Random(0)
        self.texts = rng.sample(texts["source"], TEXTS)
        held_out = rng.sample(texts["source_held_out"], min(HELD_OUT, len(texts["source_held_out"])))
        self._train, self._held_out = _tokens(tokenizer, texts["source"]), _tokens(tokenizer, held_out)

    def load(self) -> nn.Module:
        from transformers import AutoModelForCausalLM

        model: nn.Module = AutoModelForCausalLM.from_pretrained(self.base, local_files_only=True)
        return model.eval().to(DEVICE)

    def trained(self, name: str) -> bool:
        return name.startswith("model.layers.")

    def batches(self, seed: int) -> Iterator[Batch]:
        return _batches(self._train, BATCH, seed)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
            return nn.functional.cross_entropy(*_predict(model, batch), ignore_index=_PADDING)

    def answers(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        for part in torch.split(self._held_out, BATCH):
            with torch.inference_mode():
                found = _predict(model, part)
            yield found

    def score(self, model: nn.Module) -> tuple[float, ...]:
        likelihood, right, count = 0.0, 0, 0
        for logits, labels in self.answers(model):
            likelihood -= float(nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=_PADDING))
            right += int((logits.argmax(-1) == labels).sum())
            count += int((labels != _PADDING).sum())
        return likelihood / count, right / count


def _tokens(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """[texts, TOKENS]"""
    rows = torch.full((len(texts), TOKENS), _PADDING)
    for row, ids in zip(rows, tokenizer(list(texts), truncation=True, max_length=TOKENS)["input_ids"], strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return rows.to(DEVICE)


def _batches(texts: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(texts), generator=generator).to(DEVICE)
        yield from (texts[order[i : i + size]] for i in range(0, len(order) - size + 1, size))


def _predict(model: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [n, vocabulary] and the tokens [n] that come."""
    there = rows != _PADDING
    logits = model(input_ids=rows.where(there, 0), attention_mask=there.long()).logits
    return logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()


class _Prose(Language):
    """Pretraining as a task."""

    def __init__(self, tokenizer: Any, texts: list[str]) -> None:
        self._train = _tokens(tokenizer, texts)

    def batches(self, seed: int) -> Iterator[Batch]:
        return _batches(self._train, PRETRAINING_BATCH, seed)


def pretrain(folder: Path, steps: int = PRETRAINING_STEPS) -> None:
    """Writes the base model, its tokenizer and the texts of both domains to a folder, if they are not there."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    if (folder / "base" / "model.safetensors").exists():
        return
    texts = corpus.build()
    byte_pairs = ByteLevelBPETokenizer()
    sample = random.Random(0).sample(texts.prose, min(len(texts.prose), 40_000))
    byte_pairs.train_from_iterator(sample, VOCABULARY, special_tokens=["<|end|>"], show_progress=False)
    folder.mkdir(parents=True, exist_ok=True)
    byte_pairs.save(str(folder / "tokenizer.json"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), pad_token="<|end|>", eos_token="<|end|>", model_max_length=TOKENS
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**MODEL, pad_token_id=0, eos_token_id=0, bos_token_id=0)).to(DEVICE)
    optimise(_Prose(tokenizer, texts.prose), model, PRETRAINING_RATE, 0, steps)
    found = {"source": texts.source, "source_held_out": texts.source_held_out}
    (folder / "texts.json").write_text(json.dumps(found))
    tokenizer.save_pretrained(folder / "base")
    model.eval().save_pretrained(folder / "base")
