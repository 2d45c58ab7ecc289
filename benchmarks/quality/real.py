"""A real language model that answers prompts, of the kinds of `answers`."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .answers import HELD_OUT
from .tasks import DEVICE, Batch, Task

BATCH = 32
_IGNORED = -100


#: Token ids, and the number of those that are the prompt's.
Row = tuple[list[int], int]


class Answers(Task):
    """Completions of prompts by the model of `OUT/real/model`; loss and scores count the completion and its end.

    Attributes:
        train, held_out: the examples.
    """

    linears = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    rates: ClassVar = {"LoRA": 1e-3, "full": 5e-5, "sparse": 5e-3}
    measures = ("log-likelihood, nats a token of the answer", "share of its tokens that are right")
    kind: ClassVar[str]

    def __init__(self, folder: Path) -> None:
        """`folder` stands beside that of the model and the examples, `real`."""
        from transformers import AutoTokenizer

        real = folder.parent / "real"
        self.base, self._file = real / "model", real / f"{self.kind}.jsonl"
        rows = [json.loads(line) for line in self._file.read_text().splitlines()]
        self.texts: list[Any] = rows[:-HELD_OUT]
        tokenizer = AutoTokenizer.from_pretrained(self.base, local_files_only=True)
        found = [_tokens(row, tokenizer) for row in rows]
        self.train, self.held_out = found[:-HELD_OUT], found[-HELD_OUT:]

    def load(self) -> nn.Module:
        from transformers import AutoModelForCausalLM

        model: nn.Module = AutoModelForCausalLM.from_pretrained(self.base, local_files_only=True, dtype=torch.bfloat16)
        return model.eval().to(DEVICE)

    def trained(self, name: str) -> bool:
        return name.startswith("model.layers.")

    def batches(self, seed: int) -> Iterator[Batch]:
        rng = random.Random(seed)
        while True:
            order = rng.sample(self.train, len(self.train))
            yield from (order[i : i + BATCH] for i in range(0, len(order) - BATCH + 1, BATCH))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            logits, labels = self.predict(model, batch)
        return nn.functional.cross_entropy(logits.float(), labels)

    def answers(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self.held_out), BATCH):
            with torch.inference_mode():
                found = self.predict(model, self.held_out[start : start + BATCH])
            yield found

    def score(self, model: nn.Module) -> tuple[float, ...]:
        """The measures, and the share of answers of which all tokens are right."""
        likelihood, count, tokens, right = 0.0, 0, 0, 0
        for start in range(0, len(self.held_out), BATCH):
            rows = self.held_out[start : start + BATCH]
            with torch.inference_mode():
                logits, labels = self.predict(model, rows)
            likelihood -= float(nn.functional.cross_entropy(logits.float(), labels, reduction="sum"))
            count += len(labels)
            found = logits.argmax(-1) == labels
            tokens += int(found.sum())
            hits = torch.split(found, [len(ids) - said for ids, said in rows])
            right += sum(bool(hit.all()) for hit in hits)
        return likelihood / count, tokens / count, right / len(self.held_out)

    def predict(self, model: nn.Module, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Logits [n, vocabulary] of the tokens of completions, and these tokens [n], text after text."""
        width = max(len(ids) for ids, _ in rows)
        padded = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows], device=DEVICE)
        labels = torch.tensor(
            [[_IGNORED] * said + ids[said:] + [_IGNORED] * (width - len(ids)) for ids, said in rows], device=DEVICE
        )
        lengths = torch.tensor([len(ids) for ids, _ in rows], device=DEVICE)
        there = torch.arange(width, device=DEVICE) < lengths[:, None]
        logits = model(input_ids=padded, attention_mask=there.long()).logits[:, :-1]
        counted = labels[:, 1:] != _IGNORED
        return logits[counted], labels[:, 1:][counted]


def _tokens(row: dict[str, str], tokenizer: Any) -> Row:
    """The end of the completion is one of its tokens."""
    prompt = tokenizer(row["prompt"])["input_ids"]
    completion = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
    return [*prompt, *completion, tokenizer.eos_token_id], len(prompt)


class Define(Answers):
    name, kind = "definitions, Gemma 3 270M", "define"


class Code(Answers):
    name, kind = "code, Gemma 3 270M", "code"


class Explain(Answers):
    name, kind = "what a function does, Gemma 3 270M", "explain"


class Word(Answers):
    name, kind = "words from definitions, Gemma 3 270M", "word"
