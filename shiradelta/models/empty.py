"""Builds models of transformers without their weights, from configurations that strangers may have written."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from shiradelta.models.loading import class_of, quiet

#: Keys that count parts of a model, and the most that is believed; models have hundreds.
_COUNTS = re.compile(r"(?:layers?|depths?|experts|blocks|stages|heads)(?:_per_\w+)?$")
_MOST_PARTS = 10_000
#: Keys that are sizes of tensors, and the most that is believed.
_SIZES = re.compile(r"(?:size|dim|positions?|position_embeddings|ctx|embd|model|channels|length)$")
_MOST_SIZE = 1 << 27
#: Modules and parameters of a model; those with an expert a module have a hundred thousand.
_MOST_REGISTERED = 400_000


class _TooLargeError(Exception):
    """The model has more modules and parameters than any."""


def build_empty(folder: Path, config: Mapping[str, Any]) -> nn.Module | None:
    """The model of a folder on the meta device.

    Args:
        folder: the model's folder.
        config: its config.json.

    Returns:
        None if transformers cannot build it: it has code of its own, a newer version wrote it, or its numbers are
        those of no model.

    Raises:
        ImportError: transformers is not installed.
    """
    import transformers

    if not _is_plausible(config):
        return None
    with quiet(transformers), torch.device("meta"), bounded():
        try:
            parsed = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            kind = class_of(config)
            model: Any = transformers.AutoModel.from_config(parsed) if kind is None else kind(parsed)
            model.tie_weights()
        except Exception:  # whatever a class of transformers makes of a configuration that is not its own
            return None
    return cast(nn.Module, model)


def _is_plausible(config: Mapping[str, Any]) -> bool:
    """Whether a model of these numbers may exist: others would take hours or all memory to build."""
    to_do: list[tuple[str, Any]] = [("", config)]
    while to_do:
        key, value = to_do.pop()
        if isinstance(value, dict):
            to_do += value.items()
        elif isinstance(value, list):
            to_do += ((key, each) for each in value)
        elif isinstance(value, (int, float)):
            most = _MOST_PARTS if _COUNTS.search(key) else _MOST_SIZE if _SIZES.search(key) else math.inf
            if abs(value) > most:
                return False
    return True


@contextmanager
def bounded() -> Iterator[None]:
    """Ends the building of a model by this thread in an error when it has too many parts."""
    thread, count = threading.get_ident(), 0

    def register(module: nn.Module, name: str, part: object) -> None:
        nonlocal count
        if threading.get_ident() == thread:
            count += 1
            if count > _MOST_REGISTERED:
                raise _TooLargeError

    hooks = [register_module_parameter_registration_hook(register), register_module_module_registration_hook(register)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
