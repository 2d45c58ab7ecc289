"""The command line: options, tables and exit codes; the work is done elsewhere."""

from __future__ import annotations

from shiradelta.cli.commands import main

__all__ = ["main"]
