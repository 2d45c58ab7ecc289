"""The cheapest way to a version: from where a follower is, or from an anchor."""

from __future__ import annotations

import math
from dataclasses import dataclass

from shiradelta.chain.manifest import Manifest
from shiradelta.chain.rows import Anchor, Step


@dataclass(frozen=True)
class Way:
    """A way to a version.

    Attributes:
        anchor: where it begins; None if it begins with a version that the follower has.
        steps: the steps, each made for what the one before it gives.
    """

    anchor: Anchor | None
    steps: tuple[Step, ...]

    @property
    def bytes(self) -> int:
        """What has to be read."""
        return (self.anchor.bytes if self.anchor else 0) + sum(step.bytes for step in self.steps)


def cheapest(manifest: Manifest, start: int | None, stop: int) -> Way | None:
    """The way to `stop` of the fewest bytes; None if there is none.

    Args:
        manifest: the chain.
        start: the version to begin with, without an anchor; None to begin with an anchor.
        stop: the version to reach.
    """
    begins = {anchor.version: anchor for anchor in manifest.anchors} if start is None else {start: None}
    cost = {version: anchor.bytes if anchor else 0 for version, anchor in begins.items()}
    last: dict[int, Step] = {}
    for step in (
        manifest.steps if start is None else manifest.since(start)
    ):  # by `start`, so the cheapest way to it is known
        if step.start in cost and cost[step.start] + step.bytes < cost.get(step.stop, math.inf):
            cost[step.stop], last[step.stop] = cost[step.start] + step.bytes, step
    if stop not in cost:
        return None
    steps: list[Step] = []
    while stop in last:
        steps.append(last[stop])
        stop = steps[-1].start
    return Way(begins[stop], tuple(reversed(steps)))
