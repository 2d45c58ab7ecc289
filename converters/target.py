"""The file that a conversion writes."""

from __future__ import annotations

import os
from pathlib import Path

from shiradelta.errors import SourceError
from shiradelta.format import registry
from shiradelta.io.hub import origin_of
from shiradelta.io.recognise import Wanted, explain
from shiradelta.util.files import check_target

from .shd import refuse_itself

_MISSING = "no such file or folder; check the path"


def target_of(source: Path, out: str | os.PathLike[str] | None) -> Path:
    """The file to write, checked before long work.

    Args:
        source: what is converted.
        out: the file; None for the one that is named after the source.

    Raises:
        SourceError: the source is not there, or is the file to write.
        TargetError: the file cannot be written, or one of another kind is there.
    """
    if not source.exists() or (out is None and default_output(source) == source):
        message = explain(source, Wanted.SOURCE)
        raise SourceError(message or f"{source}: {'is called .shd; rename it' if source.exists() else _MISSING}")
    target = default_output(source) if out is None else Path(out)
    check_delta_target(target)
    refuse_itself(source, target)
    return target


def default_output(source: str | os.PathLike[str]) -> Path:
    """The file that a conversion writes by default: beside the source, under its name.

    Of a source in the Hub's cache it is in the current folder, with the name of the repository or of the file.
    """
    path = Path(source)
    if (origin := origin_of(path)) is not None:
        name = Path(origin.name).stem if path.is_file() else origin.name
        return Path(name + registry.SUFFIX)
    if path.is_file():
        return path.with_suffix(registry.SUFFIX)
    path = path.resolve() if path.name in ("", "..") else path
    return path.with_name(path.name + registry.SUFFIX)


def check_delta_target(target: Path) -> None:
    """Checks that a `.shd` file can be written, and replaces none of another kind.

    Raises:
        TargetError: it cannot, or does.
    """
    check_target(target, registry.MAGIC, "a .shd file")
