"""Where classes of the base's elements begin, so that a packed file is small (FORMAT.md, section 8)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from shiradelta.format import registry
from shiradelta.format.arithmetic import Positions

Floats = npt.NDArray[np.float64]
Keys = npt.NDArray[np.uint16]
#: How many keys there are (FORMAT.md, 4.7).
KEYS = 1 << 15
#: Bits of a class more: its threshold and its parameters; and of each count of what it lists.
_CLASS_COST, _COUNT_COST = 12, 8
#: Bits of a threshold more that is not round: no other tensor has it, so zstd finds no copy of it.
_ODD_COST = 12
#: How many Rice parameters are weighed.
_KS = 23


def round_step(size: int) -> int:
    """How far apart round keys are, for elements of so many bytes: an octave of bfloat16, half one of E4M3."""
    return 4 if size == 1 else 128


def thresholds(
    edges: Positions,
    elements: Positions,
    listed: Positions,
    size: int,
    counts: int,
    *,
    bits: Floats | None = None,
    turns: bool = False,
) -> Keys:
    """The thresholds with which what is listed takes about the fewest bits, by dynamic programming.

    Args:
        edges: keys at which a class may begin, increasing from 0; a bin is the keys from one to the next.
        elements: of each bin.
        listed: of each bin.
        size: bytes of an element.
        counts: how many counts a class has in the file.
        bits: [bins, choices], what the listed ones take beside their gaps; a class makes one choice for all.
        turns: a class may list the others instead.
    """
    used = np.flatnonzero(elements)
    edges, amounts = edges[used], [elements[used], listed[used]] + ([] if bits is None else [bits[used]])
    totals = [np.concatenate((np.zeros_like(each[:1]), np.cumsum(each, axis=0))) for each in amounts]
    costs = np.full((used.size + 1, used.size + 1), np.inf)  # of a class from one edge up to another
    for stop in range(1, used.size + 1):
        of_elements, of_listed, *of_bits = (total[stop] - total[:stop] for total in totals)
        if turns:
            of_listed = np.minimum(of_listed, of_elements - of_listed)
        costs[:stop, stop] = _gap_bits(of_elements, of_listed) + sum(each.min(axis=1) for each in of_bits)
    costs[:-1] += np.where(edges % round_step(size), _ODD_COST, 0)[:, None] + _CLASS_COST + _COUNT_COST * counts
    best, cuts, ends = np.append(0, np.full(used.size, np.inf)), [], []
    for _ in range(registry.MAX_BASE_CLASSES):
        every = best[:, None] + costs
        best = every.min(axis=0)
        cuts.append(every.argmin(axis=0))
        ends.append(best[-1])
    found, edge = [], used.size
    for classes in range(int(np.argmin(ends)), 0, -1):
        edge = int(cuts[classes][edge])
        found.append(edges[edge])
    return np.array(found[::-1], np.uint16)


def _gap_bits(elements: Positions, listed: Positions) -> Floats:
    """Bits of Rice codes of the gaps between what is listed, with the best k, if that is independent of everything."""
    odds = np.clip(listed / np.maximum(elements, 1), 2.0**-40, 1 - 2.0**-40)
    rest = np.exp(np.multiply.outer(2.0 ** np.arange(_KS), np.log1p(-odds)))
    found: Floats = listed * (np.arange(_KS)[:, None] + 1 / (1 - rest)).min(axis=0)
    return found
