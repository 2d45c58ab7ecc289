"""Reads PEFT's adapter folder: its weights, and the adapter type in its configuration."""

from __future__ import annotations

from pathlib import Path

from shiradelta.errors import SourceError
from shiradelta.models.peft import CONFIG, PICKLED_WEIGHTS, WEIGHTS
from shiradelta.models.sentence import modules_of, unlisted_modules
from shiradelta.util.json_files import read_json

from .peft_config import check_type


def adapter_weights(path: Path) -> Path | None:
    """The weights of PEFT's adapter folder, or None where `path` is not such a folder.

    Raises:
        SourceError: the adapter is of a type that cannot be converted, or its weights are not there; or a
            sentence-transformers model has other weights beside it.
    """
    config = path / CONFIG
    if config.exists():
        about = read_json(config)
        check_type(about if isinstance(about, dict) else {}, config)
        weights = find_weights(path)
        others = [module.path for module in modules_of(path) or () if module.path and module.has_weights]
        others += [folder.name for folder in unlisted_modules(path)]
        if others:
            raise SourceError(
                f"{path}: holds an adapter, and the weights of {others[0]} beside it; merge the adapter and save"
                f" the model, or give {weights} for the adapter alone"
            )
        return weights
    return _weights_in(path)


def find_weights(folder: Path) -> Path:
    """The weights in an adapter's folder: safetensors, or else a pickle.

    Raises:
        SourceError: there are none.
    """
    weights = _weights_in(folder)
    if weights is None:
        raise SourceError(f"{folder}: has no {WEIGHTS}; get it, or save the adapter again")
    return weights


def _weights_in(folder: Path) -> Path | None:
    return next((path for name in (WEIGHTS, PICKLED_WEIGHTS) if (path := folder / name).exists()), None)
