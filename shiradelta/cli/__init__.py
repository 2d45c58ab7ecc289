"""The command line: options, tables and exit codes, one file per command.  The package itself does the work."""

from __future__ import annotations

from shiradelta.cli.app import main

__all__ = ["main"]
