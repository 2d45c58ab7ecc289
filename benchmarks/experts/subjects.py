"""Models and tasks for families: a query, then its answer; nothing says which task an example is of."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.fusion_tasks import TASKS, load
from benchmarks.quality.small import PADDING, WIDTH, Small

#: A query and its answer, as tokens or bytes: (all of them, how many are the query's) or (query, answer).
Example = tuple[Any, Any]
END = b"\n"
#: The longest query of bytes, so that an answer follows it within the model's positions.
PROMPT = 30


@dataclass(frozen=True)
class Scale:
    """How much is trained and scored.

    Attributes:
        examples, items: examples of each task to train on, and to score.
        steps, batch: of the base delta; all experts together take as many steps again.
        relative_lr: learning rate; None lets short runs of the longest training find it.
    """

    examples: int
    items: int
    steps: int
    batch: int
    relative_lr: float | None


class Subject(ABC):
    """A base model and its tasks.

    Attributes:
        unit: what is predicted.
        train: examples of all tasks.
        tasks_of_train: the task of each.
        held_out: task -> examples to score.
    """

    unit: str

    def __init__(self, parts: dict[str, tuple[Sequence[Example], Sequence[Example]]]) -> None:
        self.train = [one for own, _ in parts.values() for one in own]
        self.tasks_of_train = [task for task, (own, _) in parts.items() for _ in own]
        self.held_out = {task: list(own) for task, (_, own) in parts.items()}

    @abstractmethod
    def load(self) -> nn.Module:
        """The base model, in evaluation mode."""

    @abstractmethod
    def predict(self, model: nn.Module, some: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """(logits [n, choices], what is right [n]) of the answers, one example after the other."""

    @abstractmethod
    def query(self, one: Example) -> Example:
        """An example whose answer is the query, all of it that can be predicted."""

    @abstractmethod
    def right(self, one: Example) -> Tensor:
        """What `predict` says is right, on the CPU."""

    @abstractmethod
    def length(self, one: Example) -> int:
        """What there is to predict of an answer."""

    def loss(self, model: nn.Module, some: Sequence[Example]) -> Tensor:
        """Of the answers."""
        logits, right = self.predict(model, some)
        return nn.functional.cross_entropy(logits.float(), right)

    def prompt_loss(self, model: nn.Module, some: Sequence[Example]) -> Tensor:
        """Of the queries."""
        return self.loss(model, [self.query(one) for one in some])

    def scores(self, logits: Tensor, right: Tensor, some: Sequence[Example]) -> list[float]:
        """Nats of each answer, a mean over what there is to predict."""
        nats = nn.functional.cross_entropy(logits.float(), right, reduction="none")
        return [part.mean().item() for part in torch.split(nats, [self.length(one) for one in some])]


def to_bytes(query: str, answer: str) -> tuple[bytes, bytes]:
    """Both end with a byte that no text has, and are cut to what the model has positions for."""
    cut = query.encode()[: PROMPT - 1] + END
    return cut, answer.encode()[: WIDTH - len(cut) - 1] + END


def predict_bytes(model: nn.Module, some: Sequence[tuple[bytes, bytes]]) -> tuple[Tensor, Tensor]:
    """(logits [n, vocabulary], what is right [n]) of the answers' bytes, one example after the other."""
    rows = torch.full((len(some), max(len(query + answer) for query, answer in some)), PADDING)
    said = torch.zeros(rows.shape, dtype=torch.bool)
    for number, (query, answer) in enumerate(some):
        rows[number, : len(query + answer)] = torch.tensor([*query, *answer])
        said[number, len(query) : len(query + answer)] = True
    rows, said = (one.to(next(model.parameters()).device) for one in (rows, said))
    logits = model(input_ids=rows, attention_mask=(rows != PADDING).long()).logits[:, :-1]
    return logits[said[:, 1:]], rows[:, 1:][said[:, 1:]]


class Bytes(Subject):
    """The language model of bytes that `benchmarks.quality.small` pretrains, and the tasks of fusion_tasks.py."""

    unit = "byte"

    def __init__(self, out: Path, tasks: Sequence[str], scale: Scale) -> None:
        self._small = Small(out / "small")
        super().__init__(
            {task: (self._some(task, 0, scale.examples), self._some(task, 2, scale.items)) for task in tasks}
        )

    @staticmethod
    def _some(task: str, part: int, count: int) -> list[Example]:
        """Of a task: of part 0 to train on, of part 2 to score."""
        return [to_bytes(*pair) for pair in random.Random(0).sample(load(task, 500)[part], count)]

    def load(self) -> nn.Module:
        return self._small.load()

    def predict(self, model: nn.Module, some: Sequence[Example]) -> tuple[Tensor, Tensor]:
        return predict_bytes(model, some)

    def query(self, one: Example) -> Example:
        return one[0][:1], one[0][1:]

    def right(self, one: Example) -> Tensor:
        return torch.tensor([*one[1]])

    def length(self, one: Example) -> int:
        return len(one[1])


class Real(Subject):
    """Gemma 3 270M and its tasks, from the folder `OUT/real` that `python -m benchmarks.quality.gemma OUT` makes."""

    unit = "token"

    def __init__(self, out: Path, tasks: Sequence[str], scale: Scale) -> None:
        from benchmarks.quality import real

        of = {kind.kind: kind for kind in (real.Define, real.Code, real.Explain, real.Word)}
        found = {task: of[task](out / task) for task in tasks}
        self._any = next(iter(found.values()))
        draw = random.Random(0).sample
        super().__init__(
            {task: (draw(one.train, scale.examples), draw(one.held_out, scale.items)) for task, one in found.items()}
        )

    def load(self) -> nn.Module:
        return self._any.load()

    def predict(self, model: nn.Module, some: Sequence[Example]) -> tuple[Tensor, Tensor]:
        return self._any.predict(model, some)

    def query(self, one: Example) -> Example:
        ids, said = one
        return ids[:said], 1

    def right(self, one: Example) -> Tensor:
        ids, said = one
        return torch.tensor(ids[said:])

    def length(self, one: Example) -> int:
        ids, said = one
        return len(ids) - int(said)


#: Name -> (what makes it, its tasks, how much is trained by default).
SUBJECTS: dict[str, tuple[Callable[[Path, Sequence[str], Scale], Subject], tuple[str, ...], Scale]] = {
    "small": (Bytes, tuple(TASKS), Scale(1000, 100, 400, 16, 0.3)),
    "real": (Real, ("define", "code", "explain", "word"), Scale(320, 60, 150, 16, None)),
}
