"""Parses sparsities, a share of the weights or N of every M, and converts shares to numbers of elements."""

from __future__ import annotations

import math
import re
from numbers import Real

from shiradelta.errors import ArgumentError
from shiradelta.util.text import parse_share

#: Whether a share holds for each tensor or for the whole model.
SCOPES = ("tensor", "model")


def check_scope(scope: str) -> None:
    """Raises ArgumentError if a scope is unknown."""
    if scope not in SCOPES:
        raise ArgumentError(f"scope {scope!r} is unknown; take {' or '.join(SCOPES)}")


def check_share(sparsity: object, what: str = "sparsity") -> float:
    """The share as a float; `what` is what the message calls it.

    Raises:
        ArgumentError: it is not a number above 0 and up to 1.
    """
    share = float(sparsity) if isinstance(sparsity, Real) else math.nan
    if not 0 < share <= 1:
        meant = f" ({share:g} percent is {share / 100:g})" if 1 < share <= 100 else ""
        raise ArgumentError(f"{what} {sparsity} is not a share; give a number above 0 and up to 1, such as 0.01{meant}")
    return share


def parse_sparsity(sparsity: float | str) -> tuple[float, tuple[int, int] | None]:
    """(the share of 0.01, "0.01" or "1%", (n, m) of a pattern such as "1:64" or None).

    Raises:
        ArgumentError: it is neither a share nor a pattern.
    """
    if not isinstance(sparsity, str):
        return check_share(sparsity), None
    found = re.fullmatch(r"(\d+):(\d+)", sparsity)
    if found is not None and 0 < int(found[1]) <= int(found[2]):
        n, m = int(found[1]), int(found[2])
        return n / m, (n, m)
    try:
        share = parse_share(sparsity)
    except ArgumentError:
        raise ArgumentError(
            f"sparsity {sparsity!r} is not a pattern; give N:M such as '1:64', or a share such as 0.01 or 1%"
        ) from None
    return check_share(share), None


def count_for(sparsity: float, numel: int) -> int:
    """Number of elements in a share of a tensor: at least one, unless the tensor is empty.

    Raises:
        ArgumentError: the share is not above 0 and up to 1.
    """
    check_share(sparsity)
    return min(numel, max(1, round(sparsity * numel))) if numel else 0


def exact_count_for(sparsity: float, numel: int, name: str) -> int:
    """As `count_for`, but refuses to round less than half an element up to one.

    Training uses this: the user names the weights to train, so a weight with less than one element is more likely a
    mistake.  Conversion takes all tensors of a source, small ones too.

    Raises:
        ArgumentError: the share of the tensor called `name` rounds to no element.
    """
    if round(sparsity * numel) == 0:
        least = 1 / max(numel, 1)
        raise ArgumentError(
            f"a sparsity of {sparsity:g} leaves tensor {name!r} with none of its {numel} elements; leave it out of the"
            f" targets, or give a sparsity of {least:.2g} or more"
        )
    return count_for(sparsity, numel)
