"""How far a model is from the fine-tune, in the measure that is trained and in those that people know."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from shiradelta.fit.behaviour import Behaviour, Outputs, TextBehaviour
from shiradelta.fit.teacher import Teacher

#: (distance, further measures by name).
Measures = tuple[float, dict[str, float]]


def walk(
    model: nn.Module, behaviour: Behaviour, teacher: Teacher, indices: Sequence[int], batch: int
) -> Iterator[tuple[list[int], Outputs, Outputs]]:
    """(examples, a model's outputs, the teacher's), `batch` at a time, those of like length together; no gradients."""
    ordered = sorted(indices, key=lambda index: behaviour.lengths[index])
    for start in range(0, len(ordered), batch):
        part = ordered[start : start + batch]
        with torch.no_grad():
            student = behaviour.outputs(model, part)
        yield part, student, teacher.outputs(part)


def measure_all(
    model: nn.Module, behaviour: Behaviour, teacher: Teacher, indices: Sequence[int], batch: int
) -> Measures:
    """Of a model as it is, on some examples, `batch` at a time."""
    parts = walk(model, behaviour, teacher, indices, batch)
    return mean((len(part), compare(behaviour, part, student, wanted)) for part, student, wanted in parts)


def compare(behaviour: Behaviour, indices: Sequence[int], student: Outputs, teacher: Outputs) -> Measures:
    """Of the outputs on one batch."""
    further: dict[str, float] = {}
    if isinstance(behaviour, TextBehaviour):
        further = _further(behaviour.measure, student, teacher)
        if behaviour.predicts:
            further["likelihood lost on the texts, nats"] = behaviour.lost(indices, student, teacher)
    return behaviour.distance(student, teacher), further


def mean(measures: Iterable[tuple[int, Measures]]) -> Measures:
    """Over batches of (examples, measures), weighted by their examples."""
    distance, total, sums = 0.0, 0, dict[str, float]()
    for count, (one, further) in measures:
        total += count
        distance += count * one
        for name, value in further.items():
            sums[name] = sums.get(name, 0.0) + count * value
    return distance / total, {name: value / total for name, value in sums.items()}


def _further(measure: str, student: Outputs, teacher: Outputs) -> dict[str, float]:
    s, t = student[-1], teacher[-1]
    if not measure.startswith("KL"):
        return {"cosine of embeddings": float(nn.functional.cosine_similarity(s.float(), t.float()).mean())}
    further = {"relative error of hidden states": _relative(student[-2].float(), teacher[-2].float())}
    if "labels" in measure:
        further["share of equal answers"] = float(((s > 0) == (t > 0)).float().mean())
    elif s.shape[-1] > 1:
        further["share of equal answers"] = float((s.argmax(-1) == t.argmax(-1)).float().mean())
    return further


def _relative(student: Tensor, teacher: Tensor) -> float:
    return float((student - teacher).norm() / teacher.norm())
