"""Reads PEFT's adapter folder: its weights, and the adapter type in its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shiradelta.errors import SourceError
from shiradelta.models.peft import CONFIG, WEIGHTS
from shiradelta.models.sentence import modules_of
from shiradelta.util.json_files import read_json
from shiradelta.util.text import brief

#: PEFT's types that are a product of factors, times a scale.
PRODUCTS = ("LORA", "ADALORA", "LOHA", "LOKR")


def adapter_weights(path: Path) -> Path | None:
    """The weights of PEFT's adapter folder, or None where `path` is not such a folder.

    Raises:
        SourceError: the adapter is of a type that cannot be converted, or is not saved as safetensors; or a
            sentence-transformers model has other weights beside it.
    """
    weights, config = path / WEIGHTS, path / CONFIG
    if config.exists():
        about = read_json(config)
        check_type(about if isinstance(about, dict) else {}, config, *PRODUCTS, "SHIRA")
        if not weights.exists():
            raise SourceError(f"{path}: has no {WEIGHTS}; save the adapter as safetensors first")
        others = [module for module in modules_of(path) or () if module.path and module.has_weights]
        if others:
            raise SourceError(
                f"{path}: holds an adapter, and the weights of {others[0].path} beside it; merge the adapter and save"
                f" the model, or give {weights} for the adapter alone"
            )
    return weights if weights.exists() else None


def check_type(config: Mapping[str, Any], where: object, *types: str) -> None:
    """Refuses a PEFT configuration of another type.

    Raises:
        SourceError: its type is not among `types`.
    """
    found = str(config.get("peft_type") or types[0]).rpartition(".")[2].upper()
    if found not in types:
        raise SourceError(
            f"{where}: is of type {brief(found, 80)}; only {' and '.join(types)} can be converted: merge it first"
        )
