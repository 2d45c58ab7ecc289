"""Writes deltas in the layouts of other libraries: one file per export layout."""

from __future__ import annotations

from . import dense, merged, peft_lora, peft_shira, peft_supertuning, sparse  # noqa: F401  each registers its layout
from .layouts import EXPORTS, ExportLayout, Written, export

__all__ = ["EXPORTS", "ExportLayout", "Written", "export"]
