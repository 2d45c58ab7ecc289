"""The export layouts: one row each."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from shiradelta.format.delta import TensorDelta
from shiradelta.util.registry import Registry

#: Writes deltas (name of the weight -> its delta) to a file or folder; also takes the base model's name.
Write = Callable[[str | os.PathLike[str], Mapping[str, TensorDelta], str], None]


@dataclass(frozen=True)
class ExportLayout:
    """The row of an export layout: its name, what it writes in a line, and the function that writes it."""

    name: str
    help: str
    write: Write


EXPORTS: Registry[ExportLayout] = Registry("export layout")


def export(name: str, help: str) -> Callable[[Write], Write]:
    """Registers the decorated function as an export layout.

    Raises:
        ArgumentError: the name is taken.
    """

    def register(function: Write) -> Write:
        EXPORTS.add(ExportLayout(name, help, function))
        return function

    return register
