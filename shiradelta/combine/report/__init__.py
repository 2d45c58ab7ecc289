"""What is in some deltas and how they meet: as data, as one HTML file that needs no network, as a heat map."""

from __future__ import annotations

from shiradelta.combine.report.adapters import Adapter
from shiradelta.combine.report.report import Report, report

__all__ = ["Adapter", "Report", "report"]
