"""Writes deltas in the layouts of other libraries: one file per export layout."""

from __future__ import annotations

from . import peft_shira  # noqa: F401  registers its layout
from .layouts import EXPORTS, ExportLayout, export

__all__ = ["EXPORTS", "ExportLayout", "export"]
