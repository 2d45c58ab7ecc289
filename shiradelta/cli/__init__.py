"""The command line: options, tables and exit codes; one file a command, the work is done elsewhere."""

from __future__ import annotations

from shiradelta.cli.app import main

__all__ = ["main"]
