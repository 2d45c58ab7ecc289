"""The files that are compared, and what a model scores with them."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import shiradelta
from shiradelta import train
from shiradelta.fit import Fit

from .dictionary import Dictionary
from .language import Language, pretrain
from .tasks import DEVICE, TUNE, Task, optimise

TASKS: dict[str, Callable[[Path], Task]] = {"dictionary": Dictionary, "language": Language}
#: Of `shiradelta.convert`: a row's name, and `Fit`'s method.
CONVERSIONS: dict[str, str | None] = {"fitted": "train", "top-k": None, "refit": "refit"}

#: Batches whose gradients choose the mask of a sparse adapter that is trained with labels.
CALIBRATION = 16


def prepare(folder: Path, steps: int) -> float:
    """Pretrains the language model; seconds."""
    start = time.monotonic()
    pretrain(folder, steps)
    return time.monotonic() - start


def compare(
    task_name: str,
    source: str,
    seed: int,
    folder: Path,
    sparsities: Sequence[float],
    steps: int | None,
    tuning_steps: int,
) -> list[dict[str, Any]]:
    """Tunes a model; a row for every file that is made of it."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(2)  # one of several processes
    folder.mkdir(exist_ok=True)
    rows = []
    for row in _compare(task_name, source, seed, folder, sparsities, steps, tuning_steps):
        rows.append(row)
        print(*row.values(), sep=",", flush=True)
    return rows


def _compare(
    task_name: str,
    source: str,
    seed: int,
    folder: Path,
    sparsities: Sequence[float],
    steps: int | None,
    tuning_steps: int,
) -> Iterator[dict[str, Any]]:
    task = TASKS[task_name](folder)
    tuned = folder / f"{source}{seed}"
    tuned_scores = tune(task, source, seed, tuned, tuning_steps)
    model = task.load()
    base_scores = task.score(model)

    def row(method: str, sparsity: float, size: int, found: tuple[float, ...], **more: Any) -> dict[str, Any]:
        gains = zip(found, base_scores, tuned_scores, strict=True)
        kept = [(score - base) / (best - base) for score, base, best in gains]
        return {
            "task": task.name,
            "source": source,
            "seed": seed,
            "method": method,
            "sparsity": sparsity,
            "bytes": size,
            "measure": task.measures[0],
            "base": base_scores[0],
            "tuned": tuned_scores[0],
            "score": found[0],
            "kept": kept[0],
            "second_measure": task.measures[1],
            "second_kept": kept[1],
            "distance": "",
            "seconds": "",
            **more,
        }

    if source == "LoRA":
        yield row("LoRA itself", 1.0, (tuned / "adapter_model.safetensors").stat().st_size // 2, tuned_scores)
    for sparsity in sparsities:
        for method, fitting in CONVERSIONS.items():
            file = folder / f"{source}{seed}-{sparsity}-{method}.shd"
            fit = None if fitting is None else Fit(task.texts, method=fitting, seed=seed, steps=steps)
            start = time.monotonic()
            report = shiradelta.convert(tuned, file, sparsity, task.base, fit=fit)
            more = {"seconds": round(time.monotonic() - start, 1)}
            if report.fit is not None:
                more["distance"] = report.fit.fitted
            yield row(method, sparsity, report.file_bytes, score_with(task, model, file), **more)
        if source == "full":
            size = report.file_bytes
            extracted = task.load()
            rank, size = extract_lora(extracted, load_file(tuned / "model.safetensors", str(DEVICE)), task, size)
            yield row(f"SVD, rank {rank}", sparsity, size, task.score(extracted))
            file = folder / f"trained{seed}-{sparsity}.shd"
            train_sparse(task, file, sparsity, seed, tuning_steps)
            yield row("trained, snip", sparsity, file.stat().st_size, score_with(task, model, file))


def tune(task: Task, source: str, seed: int, folder: Path, steps: int) -> tuple[float, ...]:
    """A fine-tune's scores; it is made if it is not there from an earlier run."""
    kept = folder / "scores.json"
    if not kept.exists():
        kept.write_text(json.dumps({"tuned": task.score(TUNE[source](task, folder, seed, steps))}))
    return tuple(json.loads(kept.read_text())["tuned"])


def train_sparse(task: Task, file: Path, sparsity: float, seed: int, steps: int) -> None:
    """A sparse adapter trained with labels, on the weights that a LoRA would be put on."""
    model = task.load()
    weights = [name for name, _ in model.named_parameters() if is_linear(task, name)]
    calibration = list(islice(task.batches(seed + 1_000), CALIBRATION))
    tuner = train.attach(model, sparsity, "snip", weights, calibration, loss=task.loss)
    optimise(task, model, task.rates["sparse"], seed, steps)
    tuner.save(file, values="int4")


def is_linear(task: Task, name: str) -> bool:
    """Whether a parameter is the weight of one of the task's linear layers."""
    return task.trained(name) and name.removesuffix(".weight").endswith(task.linears) and name.endswith(".weight")


def score_with(task: Task, model: nn.Module, file: Path) -> tuple[float, ...]:
    """The base's score with a file switched on; afterwards it is the base again."""
    swap = shiradelta.HotSwap(model)
    swap.load("file", file)
    with swap.applied("file"):
        return task.score(model)


def extract_lora(base: nn.Module, tuned: Mapping[str, Tensor], task: Task, size: int) -> tuple[int, int]:
    """Puts into a base what a LoRA of `size` bytes, in float16, keeps of a fine-tune: truncated SVDs.

    The rank is the same for all layers, as the usual tools extract it, and 1 at least.

    Returns:
        Rank and bytes.
    """
    weights = {name: weight for name, weight in base.named_parameters() if is_linear(task, name)}
    per_rank = 2 * sum(sum(weight.shape) for weight in weights.values())
    rank = max(1, round(size / per_rank))
    for name, weight in weights.items():
        u, s, v = torch.linalg.svd(tuned[name].to(weight) - weight.data, full_matrices=False)
        root = s[:rank].sqrt()
        up, down = (u[:, :rank] * root).half().float(), (root[:, None] * v[:rank]).half().float()
        weight.data += up @ down
    return rank, rank * per_rank
