"""Which elements of a checkpoint's tensor each piece of memory has, in this process and in others.

What is known of a tensor's elements, such as a fingerprint, is known share by share.  Shares that are equal are copies
of the same elements, which count once; others have no element in common.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from shiradelta.errors import BaseMismatchError
from shiradelta.format.table import Table
from shiradelta.models.views import Box, View

#: The boxes that choose a share's elements; none if it has all.
Share = tuple[Box, ...]
KnownT = TypeVar("KnownT")
#: Name of a tensor in the file -> its shares -> what is known of each.
Shares = Mapping[str, Mapping[Share, KnownT]]


def share_of(views: Sequence[View]) -> Share:
    """The elements of a tensor that the last of these views has; each is a view of the one before."""
    boxes = tuple(box for view in views for box in (view.stored, view.weight))
    return boxes[:-1]  # wherever it has them


def together(every: Sequence[Shares[KnownT]]) -> Shares[KnownT]:
    """The shares of several processes.

    Raises:
        BaseMismatchError: what is known of two copies differs.
    """
    if len(every) == 1:
        return every[0]
    found: dict[str, dict[Share, KnownT]] = {}
    for shares in every:
        for name, known in shares.items():
            for share, what in known.items():
                add(found.setdefault(name, {}), name, share, what)
    return found


def add(found: dict[Share, KnownT], name: str, share: Share, known: KnownT) -> None:
    """Notes what is known of a share of a tensor.

    Raises:
        BaseMismatchError: something else is known of a copy.
    """
    if found.setdefault(share, known) != known:
        raise BaseMismatchError(
            f"tensor {name!r} is in several places, and its elements are not the same in all; load the base again"
        )


def check_whole(label: str, nonzeros: Shares[int], table: Table) -> None:
    """Checks that every nonzero has its place in memory.

    Args:
        label: the file, for messages.
        nonzeros: how many there are of each tensor, in all processes.
        table: the file's table.

    Raises:
        BaseMismatchError: a nonzero has no place, or has one in shares that are not copies.
    """
    for name, shares in nonzeros.items():
        wanted, found = table.named(name).nnz, sum(shares.values())
        if found < wanted:
            raise BaseMismatchError(
                f"{label}: tensor {name!r} changes {wanted - found:,} elements that are nowhere in memory; give"
                " HotSwap(model, layout=...) all regions of the tensor, and group=... where other processes have some"
            )
        if found > wanted:
            raise BaseMismatchError(
                f"{label}: tensor {name!r} has elements in several regions that are not the same; give copies as the"
                " same region"
            )
