"""A gate beside a change, as RIGSA trains them: W + gate x D, with the gate and D apart in a file.

RIGSA's paper (arXiv:2511.01794) names no files and has no published checkpoint, so nothing tells D from a new weight.
"""

from __future__ import annotations

import re

from shiradelta.errors import SourceError

from .sources import SourceFiles

_GATE = re.compile(r"(?P<stem>.+)[._](?P<word>gate|alpha)(?:\.weight)?")


def refuse_gates(files: SourceFiles) -> None:
    """Refuses a file in which a number that the base lacks, a gate by its name, stands beside a matrix of its name.

    Raises:
        SourceError: there is such a number.
    """
    source, base = files.checkpoint, files.base
    shapes = None if base is None else {base[name].shape for name in base}
    for key in source:
        match = _GATE.fullmatch(key)
        if match is None or source[key].numel != 1 or _has(files, match["word"]):
            continue
        beside = re.compile(rf"{re.escape(match['stem'])}(?:[._]\w+)?")
        for other in source:
            shape = source[other].shape
            if len(shape) > 1 and (shapes is None or shape in shapes) and beside.fullmatch(other):
                raise SourceError(
                    f"{files.path}: {key!r} may be a gate on {other!r}, as RIGSA's; multiply each change by its"
                    " gate, save the products as MODULE.diff, and convert it; give --kind full if both are weights"
                )


def _has(files: SourceFiles, word: str) -> bool:
    """Whether the base has numbers of that name itself."""
    base = files.base
    return base is not None and any(
        (match := _GATE.fullmatch(name)) is not None and match["word"] == word and base[name].numel == 1
        for name in base
    )
