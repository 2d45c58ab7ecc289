"""What is in some deltas and how much they overlap: as data, as an HTML file and as a heat map."""

from __future__ import annotations

from typing import Any

from shiradelta.combine.report.data import DeltaReport
from shiradelta.combine.report.profiles import DeltaProfile
from shiradelta.combine.report.report import report
from shiradelta.util.deprecated import warn_renamed

__all__ = ["DeltaProfile", "DeltaReport", "report"]

_RENAMED = {"Adapter": DeltaProfile, "Report": DeltaReport}


def __getattr__(name: str) -> Any:
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warn_renamed(f"{__name__}.{name}", _RENAMED[name].__name__)
    return _RENAMED[name]
