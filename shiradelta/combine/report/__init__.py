"""Reports what deltas contain and how much they overlap: as data, as an HTML file and as a heat map."""

from __future__ import annotations

from shiradelta.combine.report.data import DeltaReport
from shiradelta.combine.report.profiles import DeltaProfile
from shiradelta.combine.report.report import report
from shiradelta.util.deprecated import renamed_names

__all__ = ["DeltaProfile", "DeltaReport", "report"]

__getattr__ = renamed_names(__name__, {"Adapter": DeltaProfile, "Report": DeltaReport})
