"""Foreign layouts -> `.shd`: one file a source, all through `convert`.

A source yields `Item`s, one a tensor; `convert` selects, quantises, writes and reports, one tensor in memory at a
time.  The folder is installed as `shiradelta.converters`.
"""

from __future__ import annotations

from .pipeline import convert, default_output
from .report import Report
from .sources import KINDS, open_source

__all__ = ["KINDS", "Report", "convert", "default_output", "open_source"]
