"""What both processes of the example write: the model's folders, and answers with the version that gave them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

_PAUSE, _PATIENCE = 0.005, 120.0


def save_model(policy: torch.nn.Module, folder: Path) -> Path:
    """Writes a policy's weights as bf16."""
    folder.mkdir(parents=True)
    tensors = {name: tensor.detach().bfloat16().contiguous() for name, tensor in policy.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "sums"}))
    return folder


def save_answers(path: Path, answers: Mapping[str, Tensor]) -> None:
    """Writes tensors at once: a reader finds the whole file, or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(dict(answers), part)
    os.replace(part, path)


def load_answers(path: Path) -> dict[str, Tensor]:
    """What `save_answers` has written."""
    found: dict[str, Tensor] = torch.load(path, weights_only=True)
    return found


def wait(ready: Callable[[], bool], alive: Callable[[], bool]) -> None:
    """Waits for the other process.

    Raises:
        RuntimeError: it has ended, or takes longer than two minutes.
    """
    until = time.monotonic() + _PATIENCE
    while not ready():
        if not (alive() or ready()) or time.monotonic() > until:
            raise RuntimeError("the other process has ended or stands still; see its messages above")
        time.sleep(_PAUSE)
