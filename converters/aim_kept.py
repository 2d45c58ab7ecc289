"""Finds the sparsity at which a fit keeps a given share of the fine-tune's gain."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from shiradelta.errors import SourceError
from shiradelta.util.text import percent

if TYPE_CHECKING:
    from shiradelta.fit.fitted import Fitted

#: The sparsity that is tried first, the step to the next ones, and the least and largest that are tried.
FIRST, STEP, LEAST, MOST = 0.01, 2.0, 0.001, 0.5
#: The search ends if a sparsity is known to this factor.
KNOWN = 1.1


def find_kept(target: float, fit: Callable[[float], Fitted], log: Callable[[str], None]) -> tuple[float, Fitted]:
    """(a sparsity that keeps the share, its fit): the least one, to a tenth, if more weights keep more.

    Args:
        target: the share of the fine-tune's gain.
        fit: fits at a sparsity.
        log: called with a line of text for each trial.

    Raises:
        SourceError: no sparsity keeps it, or the examples tell no share.
    """
    trials: list[tuple[float, float, float]] = []

    def kept(sparsity: float) -> tuple[bool, Fitted]:
        found = fit(sparsity)
        share = None if found.gain is None else found.gain.kept
        if share is None:
            why = "the examples tell no loss" if found.gain is None else found.gain.nothing
            raise SourceError(f"no share of the fine-tune's gain can be aimed at, as {why}; give --sparsity")
        trials.append((sparsity, share.kept, share.error))
        log(f"trial {len(trials)}: a sparsity of {percent(sparsity)} keeps {share}")
        return share.kept >= target, found

    sparsity, best = FIRST, None
    few, many = LEAST, MOST  # the largest sparsity that keeps too little, and the least that keeps enough
    enough, found = kept(sparsity)
    up = not enough
    while True:
        if enough:
            many, best = sparsity, (sparsity, found)
        else:
            few = sparsity
        if enough is up or (sparsity <= LEAST if enough else sparsity >= MOST):
            break
        sparsity = min(MOST, sparsity * STEP) if up else max(LEAST, sparsity / STEP)
        enough, found = kept(sparsity)
    if best is None:
        most = max(share for _, share, _ in trials)
        raise SourceError(
            f"no sparsity up to {percent(MOST)} keeps {percent(target)} of the fine-tune's gain, the most was"
            f" {most:.1%}; give more examples, --values f16, or a smaller --target-kept"
        )
    while many / few > KNOWN and many > LEAST:
        sparsity = (few * many) ** 0.5
        enough, found = kept(sparsity)
        if enough:
            many, best = sparsity, (sparsity, found)
        else:
            few = sparsity
    best[1].trials = trials
    return best
