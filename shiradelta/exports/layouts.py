"""The export layouts: one row each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from shiradelta.errors import ArgumentError
from shiradelta.util.registry import Registry


@dataclass(frozen=True)
class Written:
    """What a layout tells about what it wrote.

    Attributes:
        energy_kept: share of the delta's squared norm that the result has; None where it holds the delta as it is.
        ranks: module -> rank, where factors were written.
        warnings: warnings for the user.
    """

    energy_kept: float | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


#: Writes deltas (name of the weight -> its delta) to a file or folder; also takes the base model's name, and by keyword
#: the options that the layout names.
Write = Callable[..., Written | None]
WriteT = TypeVar("WriteT", bound=Write)


@dataclass(frozen=True)
class ExportLayout:
    """The row of an export layout.

    Attributes:
        name: what a user calls it.
        help: what it writes, in a line.
        write: the function that writes it.
        options: the options of `export` that `write` takes: "model", "rank", "energy", "strength", "progress".
        needs_model: whether it cannot do without the base model's files.
    """

    name: str
    help: str
    write: Write
    options: tuple[str, ...] = ()
    needs_model: bool = False


EXPORTS: Registry[ExportLayout] = Registry("export layout")


def export(
    name: str, help: str, *, options: Iterable[str] = (), needs_model: bool = False
) -> Callable[[WriteT], WriteT]:
    """Registers the decorated function as an export layout; see `ExportLayout` for the arguments.

    Raises:
        ArgumentError: the name is taken.
    """

    def register(function: WriteT) -> WriteT:
        EXPORTS.add(ExportLayout(name, help, function, tuple(options), needs_model))
        return function

    return register


def find_layout(name: str, given: Iterable[str]) -> ExportLayout:
    """Finds the row of an export layout that takes some options.

    Args:
        name: the layout's name.
        given: the options that the caller has values for.

    Raises:
        ArgumentError: the layout is unknown, does not take an option, or needs the model.
    """
    row, given = EXPORTS.find(name), set(given)
    for option in sorted(given - set(row.options)):
        takers = ", ".join(other.name for other in EXPORTS.values() if option in other.options)
        raise ArgumentError(f"{option} is an option of {takers}, not of {row.name}; leave it out")
    if row.needs_model and "model" not in given:
        raise ArgumentError(f"{row.name} needs the base model's files; give --model MODEL (model=)")
    return row
