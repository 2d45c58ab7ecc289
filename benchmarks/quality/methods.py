"""The files that are compared, and what a model scores with them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import shiradelta
from shiradelta import train
from shiradelta.fit import Fit
from shiradelta.nonzeros.pruning import PRUNE_UNTIL

from .dictionary import Dictionary
from .language import PRETRAINING_STEPS, Language, pretrain
from .real import Code, Define, Explain, Word
from .tasks import DEVICE, TUNE, Task, optimise

TASKS: dict[str, Callable[[Path], Task]] = {
    "dictionary": Dictionary,
    "language": Language,
    "define": Define,
    "code": Code,
    "explain": Explain,
    "word": Word,
}
#: Batches whose gradients choose the mask of a sparse adapter that is trained with labels.
CALIBRATION = 16


def prepare(folder: Path, steps: int = PRETRAINING_STEPS) -> float:
    """Pretrains the language model; seconds."""
    start = time.monotonic()
    pretrain(folder, steps)
    return time.monotonic() - start


@dataclass(frozen=True)
class Case:
    """A fine-tune of which files are made.

    Attributes:
        task: what it was tuned to.
        source: "LoRA" or "full".
        seed: of the tuning and of the fits.
        folder: of everything of this task.
        model: the base, loaded.
        steps: of a fit; None takes the recipe's.
        tuning_steps: of the fine-tune, and of an adapter that is trained instead.
    """

    task: Task
    source: str
    seed: int
    folder: Path
    model: nn.Module
    steps: int | None
    tuning_steps: int

    @property
    def tuned(self) -> Path:
        return self.folder / f"{self.source}{self.seed}"

    def file(self, method: str, sparsity: float) -> Path:
        return self.folder / f"{self.source}{self.seed}-{method}-{sparsity}.shd"


@dataclass(frozen=True)
class Made:
    """A file: its size, the scores with it, and how far it is from the fine-tune where that was measured."""

    bytes: int
    scores: tuple[float, ...]
    distance: float | str = ""


def convert(fitting: str | None, case: Case, sparsity: float) -> Made:
    """A `.shd` of the fine-tune, int4 values; `fitting` is a method of `Fit`."""
    file = case.file(fitting or "topk", sparsity)
    fit = None if fitting is None else Fit(case.task.texts, method=fitting, seed=case.seed, steps=case.steps)
    report = shiradelta.convert(case.tuned, file, sparsity, case.task.base, fit=fit)
    distance = "" if report.fit is None else report.fit.fitted
    return Made(report.file_bytes, score_with(case.task, case.model, file), distance)


def extract(case: Case, sparsity: float) -> Made:
    """What tools extract from a fine-tune: a LoRA by truncated SVDs, in about the bytes of the `.shd`."""
    topk = case.file("topk", sparsity)
    shiradelta.convert(case.tuned, topk, sparsity, case.task.base)
    base = case.task.load()
    size = extract_lora(base, _tuned_weights(case), case.task, topk.stat().st_size)
    return Made(size, case.task.score(base))


def _tuned_weights(case: Case) -> Mapping[str, Tensor]:
    if case.source == "full":
        stored: Mapping[str, Tensor] = load_file(case.tuned / "model.safetensors", str(DEVICE))
        return stored
    lora: Any = load_tuned(case.task, case.source, case.tuned)
    merged: nn.Module = lora.float().merge_and_unload()  # in bfloat16 a small change would be rounded away
    return merged.state_dict()


def train_directly(case: Case, sparsity: float) -> Made:
    """A sparse adapter trained with labels, on the weights that a LoRA would be put on; int4 values."""
    task, model, file = case.task, case.task.load(), case.file("trained", sparsity)
    weights = [name for name, _ in model.named_parameters() if is_linear(task, name)]
    calibration = list(islice(task.batches(case.seed + 1_000), CALIBRATION))
    prune_steps = round(PRUNE_UNTIL * case.tuning_steps)
    tuner = train.attach(model, sparsity, "snip", weights, calibration, loss=task.loss, prune_steps=prune_steps)
    optimise(task, model, task.rates["sparse"], case.seed, case.tuning_steps)
    tuner.save(file, values="int4")
    return Made(file.stat().st_size, score_with(task, case.model, file))


#: By the fine-tune's kind; the slowest last.
METHODS: dict[str, dict[str, Callable[[Case, float], Made]]] = {
    "LoRA": {
        "fitted": partial(convert, "train"),
        "top-k": partial(convert, None),
        "refit": partial(convert, "refit"),
        "SVD": extract,
    },
    "full": {
        "fitted": partial(convert, "train"),
        "top-k": partial(convert, None),
        "refit": partial(convert, "refit"),
        "SVD": extract,
        "trained, snip": train_directly,
    },
}


def tune(task: Task, source: str, seed: int, folder: Path, steps: int) -> tuple[float, ...]:
    """A fine-tune's scores; it is made if it is not there from an earlier run."""
    kept = folder / "scores.json"
    if not kept.exists():
        kept.write_text(json.dumps({"tuned": task.score(TUNE[source](task, folder, seed, steps))}))
    return tuple(json.loads(kept.read_text())["tuned"])


def load_tuned(task: Task, source: str, folder: Path) -> nn.Module:
    """A fine-tune that `tune` has written."""
    model = task.load()
    if source == "LoRA":
        from peft import PeftModel

        tuned: nn.Module = PeftModel.from_pretrained(model, str(folder)).eval()
        return tuned
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    return model


def is_linear(task: Task, name: str) -> bool:
    """Whether a parameter is the weight of one of the task's linear layers."""
    return task.trained(name) and name.endswith(tuple(f"{linear}.weight" for linear in task.linears))


@contextmanager
def applied(model: nn.Module, file: Path) -> Iterator[None]:
    """Within, a base has a file switched on."""
    swap = shiradelta.HotSwap(model)
    swap.load("file", file)
    with swap.applied("file"):
        yield


def score_with(task: Task, model: nn.Module, file: Path) -> tuple[float, ...]:
    """The base's score with a file switched on."""
    with applied(model, file):
        return task.score(model)


def extract_lora(base: nn.Module, tuned: Mapping[str, Tensor], task: Task, size: int) -> int:
    """Puts into a base what a LoRA of about `size` bytes, in float16, keeps of a fine-tune: truncated SVDs.

    The rank is the same for all layers, as the usual tools extract it, rounded, and 1 at least.

    Returns:
        Its bytes.
    """
    weights = {name: weight for name, weight in base.named_parameters() if is_linear(task, name)}
    per_rank = 2 * sum(sum(weight.shape) for weight in weights.values())
    rank = max(1, round(size / per_rank))
    for name, weight in weights.items():
        # In float32: there is no decomposition of bfloat16.
        difference = tuned[name].to(weight.device).float() - weight.data.float()
        u, s, v = torch.linalg.svd(difference, full_matrices=False)
        root = s[:rank].sqrt()
        up, down = (u[:, :rank] * root).half().float(), (root[:, None] * v[:rank]).half().float()
        weight.data = (weight.data.float() + up @ down).to(weight.dtype)
    return rank * per_rank
