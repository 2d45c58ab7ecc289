"""PEFT's names of modules, tensors and files, and the layout of its SHiRA adapters."""

from __future__ import annotations

import re

#: In front of every name of a wrapped model.
PREFIX = "base_model.model."
#: Between a layer and its own weight, where an adapter wraps the layer.
BASE_LAYER = ".base_layer."
#: Between a module and its copy that is trained whole; also the configuration's key that lists such modules.
MODULES_TO_SAVE = "modules_to_save"
#: Between a module that is trained whole and its weights before training.
ORIGINAL_MODULE = ".original_module."
#: The default name of an adapter, which ends the keys that `state_dict` saves.
ADAPTER = ".default"
#: The files of an adapter's folder.
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
#: The weights as PEFT saved them before 0.9, a pickle.
PICKLED_WEIGHTS = "adapter_model.bin"
#: The file of a LoRA as diffusers saves it.
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
#: Suffix of a SHiRA key -> what it holds: float values [nnz], or integer indices [2, nnz] (rows, columns).
SHIRA = {".shira_weight": "values", ".shira_indices": "indices"}

_WRAPPERS = re.compile(rf"\.(?:{MODULES_TO_SAVE}|{BASE_LAYER.strip('.')}|{ADAPTER.strip('.')})(?=\.|$)")


def unwrap(name: str) -> str:
    """The name that a module or tensor has in the model that PEFT wrapped."""
    return _WRAPPERS.sub("", name.removeprefix(PREFIX))


def parse_shira_key(key: str) -> tuple[str, str] | None:
    """(the weight's name, "values" or "indices"); None for a key that is not part of a SHiRA adapter."""
    key = key.removesuffix(ADAPTER)
    for suffix, what in SHIRA.items():
        if key.endswith(suffix):
            return f"{key.removesuffix(suffix).removeprefix(PREFIX)}.weight", what
    return None


def shira_key(module: str, what: str) -> str:
    """The key under which PEFT stores a module's "values" or "indices"."""
    suffix = next(suffix for suffix, held in SHIRA.items() if held == what)
    return f"{PREFIX}{module}{suffix}"
