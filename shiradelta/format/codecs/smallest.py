"""The choice among the index codecs: the smallest section (FORMAT.md, section 8)."""

from __future__ import annotations

import math
from collections.abc import Mapping

from shiradelta.format.arithmetic import Positions
from shiradelta.format.codecs import INDEX_CODECS, SEEDED
from shiradelta.format.codecs.base import IndexCodec
from shiradelta.format.codecs.seeded import Seeded
from shiradelta.format.draw import Draw


def smallest_section(
    positions: Positions,
    shape: tuple[int, ...],
    codecs: Mapping[int, IndexCodec] = INDEX_CODECS.by_id,
    draw: Draw | None = None,
) -> tuple[int, bytes]:
    """The canonical INDEX section: the smallest one, ties to the lowest id of a codec.

    Args:
        positions: the positions.
        shape: the tensor's shape.
        codecs: those to choose from, by id.
        draw: a draw that all positions are of, if one is known.

    Returns:
        (the codec's id, the section).

    Raises:
        DeltaError: a position is not of the draw.
    """
    seeded, drawn = codecs.get(SEEDED.id), b""
    best: tuple[float, int] = math.inf, 0
    if draw is not None and isinstance(seeded, Seeded):
        drawn = seeded.encode_from(draw, positions, shape)
        best = len(drawn), seeded.id
    for id, codec in sorted(codecs.items(), key=lambda row: row[1].least):
        if codec.least > best[0]:  # a small tensor is not searched for whole lines
            break
        size = codec.size(positions, shape)
        best = best if size is None else min(best, (size, id))
    id = best[1]
    return id, drawn if id == SEEDED.id else codecs[id].encode(positions, shape)
