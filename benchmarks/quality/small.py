"""A language model that a CPU pretrains and tunes in minutes: bytes, prose and Python source that every Python has."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from . import corpus
from .tasks import DEVICE, Batch, Task, optimise

#: Bytes, and padding.
VOCABULARY, PADDING = 257, 256
WIDTH, BATCH = 48, 16
#: 1 M parameters, of which 884,736 in linear layers.
MODEL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": WIDTH,
    "tie_word_embeddings": True,
}
PRETRAINING_STEPS, PRETRAINING_BATCH, PRETRAINING_RATE = 600, 32, 2e-3
#: Files of the standard library, texts held out of each kind, and pieces of them that are scored.
FILES, HELD_OUT, SCORED = 160, 320, 640


class Small(Task):
    """The next byte; the model is pretrained on prose, and tuned to source."""

    name = "Python source, 1 M Llama of bytes"
    linears = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    rates: ClassVar = {"LoRA": 3e-3, "full": 1e-3, "sparse": 1e-2}
    measures = ("log-likelihood, nats a byte", "accuracy of the next byte")
    kind: ClassVar[str] = "source"

    def __init__(self, folder: Path) -> None:
        """`folder` gets the base model when it is first asked for."""
        self.base = folder / "base"
        prose, source = _texts()
        texts = {"prose": prose, "source": source}[self.kind]
        self.texts = texts[HELD_OUT:]
        self._held_out, self._train = _bytes(texts[:HELD_OUT])[:SCORED], _bytes(self.texts)
        if not self.base.exists():
            pretrain(self.base, _bytes(prose[HELD_OUT:]))

    def load(self) -> nn.Module:
        from transformers import LlamaForCausalLM

        model: nn.Module = LlamaForCausalLM.from_pretrained(self.base)
        return model.eval().to(DEVICE)

    def trained(self, name: str) -> bool:
        return name.startswith("model.layers.")

    def batches(self, seed: int) -> Iterator[Batch]:
        return _batches(self._train, BATCH, seed)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(*_predict(model, batch), ignore_index=PADDING)

    def answers(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        for part in torch.split(self._held_out, 4 * BATCH):
            with torch.inference_mode():
                logits, right = _predict(model, part)
            yield logits, right.masked_fill(right == PADDING, -1)

    def score(self, model: nn.Module) -> tuple[float, ...]:
        likelihood, hits, count = 0.0, 0, 0
        for logits, right in self.answers(model):
            likelihood -= float(nn.functional.cross_entropy(logits, right, reduction="sum", ignore_index=-1))
            hits += int((logits.argmax(-1) == right).sum())
            count += int((right >= 0).sum())
        return likelihood / count, hits / count


class Prose(Small):
    """What the model was pretrained on: what it may forget."""

    name = "prose, 1 M Llama of bytes"
    kind = "prose"


def _texts() -> tuple[list[str], list[str]]:
    """(documentation, code without it) of the standard library, in pieces, in random order."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in sorted(library.rglob("*.py")) if not {"test", "tests", "site-packages"} & {*path.parts}]
    prose: dict[str, None] = {}
    source: dict[str, None] = {}
    for path in random.Random(0).sample(files, min(FILES, len(files))):
        prose |= dict.fromkeys(corpus.pieces(corpus.docstrings(path)))
        source |= dict.fromkeys(corpus.pieces(corpus.code(path)))
    return random.Random(0).sample(list(prose), len(prose)), random.Random(0).sample(list(source), len(source))


def _bytes(texts: list[str]) -> Tensor:
    """[pieces of `WIDTH` bytes]; the end of a text is padded."""
    rows = []
    for text in texts:
        ids = text.encode()
        parts = (ids[start : start + WIDTH] for start in range(0, len(ids), WIDTH))
        rows += [[*part, *[PADDING] * (WIDTH - len(part))] for part in parts if len(part) > WIDTH // 4]
    return torch.tensor(rows, device=DEVICE)


def _batches(rows: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=generator).to(rows.device)
        yield from (rows[order[i : i + size]] for i in range(0, len(order) - size + 1, size))


def _predict(model: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [n, vocabulary], and the bytes [n] that come."""
    there = rows != PADDING
    logits = model(input_ids=rows, attention_mask=there.long()).logits
    return logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()


class _Pretraining(Small):
    def __init__(self, rows: Tensor) -> None:
        self._train = rows

    def batches(self, seed: int) -> Iterator[Batch]:
        return _batches(self._train, PRETRAINING_BATCH, seed)


def pretrain(folder: Path, rows: Tensor) -> None:
    """Writes the base model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**MODEL, pad_token_id=PADDING, eos_token_id=None, bos_token_id=None))
    model.to(DEVICE)
    optimise(_Pretraining(rows), model, PRETRAINING_RATE, 0, PRETRAINING_STEPS)
    model.eval().save_pretrained(folder)
