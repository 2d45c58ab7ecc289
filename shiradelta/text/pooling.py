"""Pooling: how the token vectors of a text become one embedding."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from shiradelta.util.json_files import read_json


def find_pooling(*folders: Path) -> str | None:
    """The pooling mode in sentence-transformers' files beside a model; None if there are none."""
    for folder in folders:
        path = (folder if folder.is_dir() else folder.parent) / "1_Pooling" / "config.json"
        config = read_json(path) if path.exists() else None
        if isinstance(config, dict):
            modes = {"cls_token": "cls", "lasttoken": "lasttoken", "max_tokens": "max"}
            return next((mode for key, mode in modes.items() if config.get(f"pooling_mode_{key}")), "mean")
    return None


def pool(hidden: Tensor, mask: Tensor, pooling: str | None) -> Tensor:
    """[texts, tokens, size] -> one unit vector per text, as sentence-transformers computes it; None takes the mean."""
    if pooling == "cls":
        pooled = hidden[:, 0]
    elif pooling == "lasttoken":
        pooled = hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
    elif pooling == "max":
        pooled = hidden.masked_fill(mask[:, :, None] == 0, -math.inf).amax(1)
    else:
        pooled = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
    return nn.functional.normalize(pooled.float(), dim=-1)
