"""The models on which fused adapters are compared: how each takes pairs of a query and an answer, and is scored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.experts.subjects import predict_bytes, to_bytes
from benchmarks.fusion_tasks import Pairs
from benchmarks.quality.small import Small
from demo.task import load_base

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TEMPERATURE, MAX_TOKENS = 0.05, 32


class FusionModel(ABC):
    """A base model.

    Attributes:
        measure: what `score` gives, in percent.
        targets: the layers that adapters are for.
        rank: of a LoRA; it has about as many parameters as 1 % of the weights.
        lora_rate, sparse_rate: learning rates.
    """

    measure: str
    targets: Sequence[str]
    rank: int
    lora_rate: float
    sparse_rate: float

    @abstractmethod
    def load(self) -> nn.Module:
        """The base, on the device."""

    @abstractmethod
    def loss(self, model: nn.Module, pairs: Pairs) -> Tensor:
        """Of a batch."""

    @abstractmethod
    def score(self, model: nn.Module, pairs: Pairs) -> float:
        """In percent."""


class Encoder(FusionModel):
    """all-MiniLM-L6-v2, which has to find a query's answer."""

    measure = "top-1"
    targets = ("query", "key", "value", "intermediate.dense", "output.dense")
    rank, lora_rate, sparse_rate = 16, 1e-3, 3e-3

    def __init__(self, out: Path) -> None:
        self._tokenizer: Any = load_base()[1]

    def load(self) -> nn.Module:
        torch.set_float32_matmul_precision("high")
        model: nn.Module = load_base()[0]
        return model.to(DEVICE)

    def _embed(self, model: nn.Module, texts: Sequence[str]) -> Tensor:
        """Unit vectors: the mean over the tokens, as the model was trained."""
        options = {"padding": True, "truncation": True, "max_length": MAX_TOKENS, "return_tensors": "pt"}
        batch = self._tokenizer(list(texts), **options).to(DEVICE)
        hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    def loss(self, model: nn.Module, pairs: Pairs) -> Tensor:
        """Each query picks its answer among the batch's, and the other way round."""
        queries, answers = zip(*pairs, strict=True)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            vectors = self._embed(model, queries), self._embed(model, answers)
        similarity = vectors[0].float() @ vectors[1].float().T / TEMPERATURE
        target = torch.arange(len(similarity), device=DEVICE)
        return (nn.functional.cross_entropy(similarity, target) + nn.functional.cross_entropy(similarity.T, target)) / 2

    def score(self, model: nn.Module, pairs: Pairs) -> float:
        """Queries whose own answer is the nearest of all."""
        queries, answers = zip(*pairs, strict=True)
        with torch.inference_mode():
            found, wanted = (
                torch.cat([self._embed(model, texts[i : i + 250]) for i in range(0, len(texts), 250)])
                for texts in (queries, answers)
            )
            nearest = (found @ wanted.T).argmax(1)
        return 100 * (nearest == torch.arange(len(nearest), device=DEVICE)).double().mean().item()


class Letters(FusionModel):
    """The language model of bytes that `benchmarks.quality.small` pretrains, which has to write a query's answer."""

    measure = "bytes of the answer right"
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    rank, lora_rate, sparse_rate = 1, 1e-2, 3e-2

    def __init__(self, out: Path) -> None:
        self._small = Small(out / "small")

    def load(self) -> nn.Module:
        return self._small.load()

    def loss(self, model: nn.Module, pairs: Pairs) -> Tensor:
        """Cross entropy of the answers' bytes."""
        return nn.functional.cross_entropy(*predict_bytes(model, [to_bytes(*pair) for pair in pairs]))

    def score(self, model: nn.Module, pairs: Pairs) -> float:
        """Bytes of the answers that are the most likely after the right ones before them."""
        right = count = 0
        with torch.inference_mode():
            for start in range(0, len(pairs), 100):
                logits, wanted = predict_bytes(model, [to_bytes(*pair) for pair in pairs[start : start + 100]])
                right += int((logits.argmax(-1) == wanted).sum())
                count += len(wanted)
        return 100 * right / count


MODELS: dict[str, Callable[[Path], FusionModel]] = {"encoder": Encoder, "bytes": Letters}


@cache
def fusion_model(name: str, out: Path) -> FusionModel:
    """A model by its name; `out` keeps what it takes time to make."""
    return MODELS[name](out)
