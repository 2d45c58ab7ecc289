"""Pooling: how the token vectors of a text become one embedding."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shiradelta.errors import SourceError
from shiradelta.models.embedder import Embedder
from shiradelta.models.sentence import folder_of, modules_of
from shiradelta.util.json_files import read_json
from shiradelta.util.registry import Registry

#: sentence-transformers 6 names the mode or a list of modes; before, a key for each mode was true or false.
_MODE, _PREFIX = "pooling_mode", "pooling_mode_"


@dataclass(frozen=True)
class PoolingMode:
    """A row of `POOLING_MODES`.

    Attributes:
        name: what sentence-transformers calls it.
        key: the key that sets it in sentence-transformers' files, without "pooling_mode_".
        pool: (hidden states [texts, tokens, size], mask [texts, tokens]) -> one vector per text; padding is on the
            right.
    """

    name: str
    key: str
    pool: Callable[[Tensor, Tensor], Tensor]


def _first(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden[:, 0]


def _last(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]


def _max(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden.masked_fill(mask[:, :, None] == 0, -math.inf).amax(1)


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    return (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)


def _mean_sqrt_len(hidden: Tensor, mask: Tensor) -> Tensor:
    return (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True).sqrt()


def _weighted_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Weights tokens by their position, counted from 1."""
    return _mean(hidden, mask * torch.arange(1, mask.shape[1] + 1, device=mask.device))


POOLING_MODES: Registry[PoolingMode] = Registry(
    "pooling mode",
    (
        PoolingMode("mean", "mean_tokens", _mean),
        PoolingMode("cls", "cls_token", _first),
        PoolingMode("max", "max_tokens", _max),
        PoolingMode("lasttoken", "lasttoken", _last),
        PoolingMode("weightedmean", "weightedmean_tokens", _weighted_mean),
        PoolingMode("mean_sqrt_len_tokens", "mean_sqrt_len_tokens", _mean_sqrt_len),
    ),
)
_DEFAULT = "mean"


def find_pooling(*folders: Path) -> str | None:
    """The pooling mode in sentence-transformers' files beside a model; None if there are none.

    Raises:
        SourceError: the files set a mode that `POOLING_MODES` lacks, or several modes.
    """
    for folder in folders:
        path = _home(folder_of(folder)) / "config.json"
        config = read_json(path) if path.exists() else None
        if isinstance(config, dict):
            if _MODE in config:
                return _named(config[_MODE], path)
            return _mode_of(
                [key.removeprefix(_PREFIX) for key in config if key.startswith(_PREFIX) and config[key]], path
            )
    return None


def _home(folder: Path) -> Path:
    """The folder of the pooling module."""
    pooling = [module.path for module in modules_of(folder) or () if module.kind == "Pooling"]
    return folder / (pooling[0] if pooling else "1_Pooling")


def _named(found: Any, path: Path) -> str:
    """The mode that sentence-transformers 6 calls by its name."""
    names = found if isinstance(found, list) else [found]
    if not all(isinstance(name, str) and name in POOLING_MODES for name in names) or not names:
        raise SourceError(f"{path}: {_MODE} {found!r} is unknown; one of {', '.join(POOLING_MODES)} can be used")
    if len(names) > 1:
        raise SourceError(f"{path}: several pooling modes are set ({', '.join(names)}); only one can be used")
    return str(names[0])


def _mode_of(keys: list[str], path: Path) -> str:
    names = {row.key: row.name for row in POOLING_MODES.values()}
    unknown = next((key for key in keys if key not in names), None)
    if unknown is not None:
        raise SourceError(f"{path}: {_PREFIX}{unknown} is unknown; one of {', '.join(names)} can be used")
    if len(keys) > 1:
        raise SourceError(f"{path}: several pooling modes are set ({', '.join(keys)}); only one can be used")
    return names[keys[0]] if keys else _DEFAULT


def pool(hidden: Tensor, mask: Tensor, pooling: str | None, model: nn.Module | None = None) -> Tensor:
    """[texts, tokens, size] -> one unit vector per text, as sentence-transformers computes it.

    Args:
        hidden: hidden states.
        mask: 1 for tokens, 0 for padding.
        pooling: a name of `POOLING_MODES`; None takes the mean.
        model: the model that made the hidden states; an `Embedder` runs its modules on the pooled vectors.

    Raises:
        ArgumentError: the mode is unknown.
    """
    pooled = POOLING_MODES.find(_DEFAULT if pooling is None else pooling).pool(hidden, mask)
    if isinstance(model, Embedder):
        pooled = model.embedding(pooled)
    return nn.functional.normalize(pooled.float(), dim=-1)
