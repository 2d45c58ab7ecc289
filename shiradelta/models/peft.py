"""What PEFT calls things: the prefix of its names, and the layout of its SHiRA adapters."""

from __future__ import annotations

#: In front of every name of the wrapped model.
PREFIX = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
#: Suffix of a SHiRA key -> what it holds: float values [nnz], or integer indices [2, nnz] (rows, columns).
SHIRA = {".shira_weight": "values", ".shira_indices": "indices"}


def parse_shira_key(key: str) -> tuple[str, str] | None:
    """(the weight's name, "values" or "indices"); None for a key of something else."""
    key = key.removesuffix(".default")
    for suffix, what in SHIRA.items():
        if key.endswith(suffix):
            return f"{key.removesuffix(suffix).removeprefix(PREFIX)}.weight", what
    return None
