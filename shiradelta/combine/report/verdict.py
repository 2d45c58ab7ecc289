"""Says in words what two deltas' figures mean for using both."""

from __future__ import annotations

from shiradelta.combine.interference import Meeting
from shiradelta.util.text import percent


def verdict(one: str, other: str, total: Meeting) -> str:
    """A sentence on what to expect from applying or fusing both."""
    if not total.shared:
        return f"{one} and {other} share none of their weights: {advice(total)[1]}."
    smaller = max(min(total.nnz), 1)
    figures = [
        f"{one} and {other} share {percent(total.shared / smaller)} of their weights"
        f" ({percent(total.chance / smaller)} would be chance)"
    ]
    if total.cosine is not None and total.opposed_share is not None:
        figures.append(f"{percent(total.opposed_share)} of these with opposite signs")
        figures.append(f"cosine {total.cosine:z.2f}")
    return f"{', '.join(figures)}: {advice(total)[1]}."


def advice(total: Meeting) -> tuple[str, str]:
    """("free", "try" or "conflict", what to do).

    The thresholds are rules of thumb: the weights alone cannot tell how much a task will lose.
    """
    share, cosine = total.shared / max(min(total.nnz), 1), total.cosine
    if not total.shared:
        return "free", "fuse freely"
    if total.clashes:
        return "conflict", f"{total.clashes:,} of these are set by one of them, so they cannot be fused"
    if cosine is None or (abs(cosine) < 0.1 and share < 0.1):
        return "free", "fuse freely"
    if cosine <= -0.3:
        return "conflict", "they undo each other; take one of them"
    if cosine >= 0.3:
        return "try", "they are largely the same change, which a sum makes twice; take mean, or lower strengths"
    return "try", "fuse, and try both tasks; if one loses too much, take ties or lower strengths"
