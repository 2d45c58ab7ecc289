"""What the two tasks have in common, and how models are tuned to them, with labels."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
#: Texts without labels, of which a delta is fitted.
TEXTS = 4_000
RANK = 16
#: Steps of tuning, and of those the ones in which the rate rises.
STEPS, WARM_UP = 400, 30

Batch = Any


class Task(ABC):
    """A base model, data to tune it on, and a score of what was not tuned on.

    Attributes:
        name: as the tables have it.
        base: the model's folder.
        texts: of the kind that is tuned on: texts without labels, or prompts and completions.
        linears: the modules that a LoRA is put on: all linear layers but head and embeddings.
        rates: the largest learning rate of a LoRA, of all weights, and of a sparse part of them.
        measures: names of what `score` gives; shares are taken of the first.
    """

    name: ClassVar[str]
    linears: ClassVar[tuple[str, ...]]
    rates: ClassVar[dict[str, float]]
    measures: ClassVar[tuple[str, ...]]
    base: Path
    texts: list[Any]

    @abstractmethod
    def load(self) -> nn.Module:
        """The base, in evaluation mode, on the device."""

    @abstractmethod
    def batches(self, seed: int) -> Iterator[Batch]:
        """To tune on, without end."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Of the labels."""

    @abstractmethod
    def answers(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """On held-out data, part by part: logits [n, choices], and which choice is right [n]; below 0 none is."""

    @abstractmethod
    def score(self, model: nn.Module) -> tuple[float, ...]:
        """Of the answers; more is better."""

    def divergence(self, model: nn.Module, tuned: nn.Module) -> float:
        """KL divergence of a model's answers from a tuned one's, mean over questions, in nats.

        Less noisy than a score: it tells recipes apart that differ by less than a score's standard error.
        """
        total, count = 0.0, 0
        for (found, right), (wanted, _) in zip(self.answers(model), self.answers(tuned), strict=True):
            asked = right >= 0
            student, teacher = (logits[asked].float().log_softmax(-1) for logits in (found, wanted))
            total += float(nn.functional.kl_div(student, teacher, reduction="sum", log_target=True))
            count += int(asked.sum())
        return total / count

    @abstractmethod
    def trained(self, name: str) -> bool:
        """Whether full fine-tuning changes a parameter: the layers, but no embeddings and no head."""


def optimise(task: Task, model: nn.Module, rate: float, seed: int, steps: int = STEPS) -> None:
    """Tunes what requires gradients: AdamW, linear warm-up, cosine to zero.

    The model stays in evaluation mode: without dropout so short a run learns more.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    stream = task.batches(seed)
    for _ in range(steps):
        loss = task.loss(model, next(stream))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()


def tune_lora(task: Task, out: Path, seed: int, steps: int = STEPS) -> nn.Module:
    """A PEFT LoRA on all linear layers, written to a folder."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    model: Any = get_peft_model(task.load(), LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(task.linears)))
    optimise(task, model, task.rates["LoRA"], seed, steps)
    model.save_pretrained(str(out))
    tuned: nn.Module = model.eval()
    return tuned


def tune_full(task: Task, out: Path, seed: int, steps: int = STEPS) -> nn.Module:
    """All weights of the layers, written to a folder."""
    torch.manual_seed(seed)
    model = task.load()
    stored = next(model.parameters()).dtype
    model.float()  # steps are smaller than bfloat16 tells
    for name, weight in model.named_parameters():
        weight.requires_grad_(task.trained(name))
    optimise(task, model, task.rates["full"], seed, steps)
    model.to(stored).save_pretrained(str(out))  # type: ignore[operator]
    return model.requires_grad_(False)


TUNE: dict[str, Callable[[Task, Path, int, int], nn.Module]] = {"LoRA": tune_lora, "full": tune_full}
