"""Converts what others write (LoRA, full fine-tune, diff) to `.shd`: one file per source layout.

A source yields `Item`s, one a tensor; `convert` selects, quantises, writes and reports with one tensor in memory at a
time.  The folder is installed as `shiradelta.converters`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shiradelta.select.topk import Rows, row_shape

from . import layouts  # noqa: F401  registers them
from .item import Item, Skipped, SkipReason, Source
from .pipeline import convert
from .report import ConversionReport
from .sources import SOURCES, SourceFiles, SourceLayout, kinds, open_source, source
from .target import default_output

__all__ = [
    "SOURCES",
    "ConversionReport",
    "Item",
    "Rows",
    "SkipReason",
    "Skipped",
    "Source",
    "SourceFiles",
    "SourceLayout",
    "convert",
    "default_output",
    "kinds",
    "open_source",
    "row_shape",
    "source",
]

if not TYPE_CHECKING:  # a type checker knows new names only

    def __getattr__(name: str) -> Any:
        """Resolves names of 0.1, which are accepted for one more release."""
        from shiradelta.util.deprecated import warn_renamed

        if name == "Report":
            warn_renamed("shiradelta.converters.Report", "ConversionReport")
            return ConversionReport
        if name == "KINDS":
            warn_renamed("shiradelta.converters.KINDS", "kinds()")
            return kinds()
        raise AttributeError(f"module 'shiradelta.converters' has no attribute {name!r}")
