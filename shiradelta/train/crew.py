"""The processes that train one model together: a call that one of them refuses is refused in all."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from shiradelta.errors import ArgumentError
from shiradelta.hotswap.ranks import Alone, Ranks, Together
from shiradelta.models.sharded import ranks_of

#: Seconds to wait for another process: it may read an adapter from a slow disk, or choose a mask on a slow processor.
_PATIENCE = 600


def crew_of(tensors: Iterable[Tensor]) -> Ranks:
    """The processes that tensors are spread over; all of them have to call this."""
    ranks = ranks_of(tensors)
    return Together(ranks, _PATIENCE, "start the processes again") if len(ranks) > 1 else Alone()


def check_same(crew: Ranks, start: Mapping[str, Iterable[Tensor]]) -> None:
    """Checks that all processes begin with the same positions, and values where there are some.

    Args:
        crew: the processes; all of them call this.
        start: names of weights -> these tensors.

    Raises:
        ArgumentError: another process has others.
    """
    if crew.alone:
        return
    own = {name: _digest(tensors) for name, tensors in start.items()}
    for others in crew.gather(own):
        for name in sorted(own.keys() | others.keys()):
            if own.get(name) != others.get(name):
                raise ArgumentError(
                    f"tensor {name!r} has another mask in another process, or other values to start from; give all"
                    " processes the same ones"
                )


def _digest(tensors: Iterable[Tensor]) -> bytes:
    found = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        found.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.digest()
