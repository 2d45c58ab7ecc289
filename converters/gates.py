"""A gate beside a change, as RIGSA trains them: W + gate x D, with the gate and D apart in a file.

RIGSA's paper (arXiv:2511.01794) names no files and has no published checkpoint, so nothing tells D from a new weight.
"""

from __future__ import annotations

import re

from shiradelta.errors import SourceError
from shiradelta.models.checkpoint import Checkpoint

from .sources import SourceFiles

_GATE = re.compile(r"(?P<stem>.+)[._](?P<word>gate|alpha)(?:\.weight)?")


def parse_gate(key: str) -> tuple[str, str] | None:
    """(the name of a gate's weight or module, "gate" or "alpha"); None for another key."""
    match = _GATE.fullmatch(key)
    return None if match is None else (match["stem"], match["word"])


def beside(source: Checkpoint, key: str) -> list[str]:
    """The matrices that a key may be the gate of, by its name: none if it is no number, or not called a gate."""
    parsed = parse_gate(key)
    if parsed is None or source[key].numel != 1:
        return []
    named = re.compile(rf"{re.escape(parsed[0])}(?:[._]\w+)?")
    return [other for other in source if other != key and len(source[other].shape) > 1 and named.fullmatch(other)]


def refuse_gates(files: SourceFiles) -> None:
    """Refuses a file in which a number that the base lacks, a gate by its name, stands beside a matrix of its name.

    Raises:
        SourceError: there is such a number.
    """
    source, base = files.checkpoint, files.base
    shapes = None if base is None else {base[name].shape for name in base}
    for key in source:
        parsed = parse_gate(key)
        changes = [other for other in beside(source, key) if shapes is None or source[other].shape in shapes]
        if parsed is not None and changes and not _has(files, parsed[1]):
            raise SourceError(
                f"{files.path}: {key!r} may be a gate on {changes[0]!r}, as RIGSA's; give --kind rigsa to add their"
                " product to the weight, or --kind full if both are weights"
            )


def _has(files: SourceFiles, word: str) -> bool:
    """Whether the base has numbers of that name itself."""
    base = files.base
    return base is not None and any(
        (parsed := parse_gate(name)) is not None and parsed[1] == word and base[name].numel == 1 for name in base
    )
