"""Processes that are forked from one that has imported torch and what most of them need: one for each worker of a run.

A process of its own would import torch anew, which takes two CPU seconds.
"""

from __future__ import annotations

import multiprocessing
from typing import Any

#: Starts processes; where there is no fork, they import everything themselves.
CONTEXT: Any = multiprocessing.get_context(
    "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
)
_LOADED = (
    "torch._dynamo",  # which the first sharded tensor of each process would import
    "torch.distributed.tensor.parallel",
    "torch.distributed.fsdp",
    "shiradelta.chain.follow",
    "shiradelta.cli.apply",
    "shiradelta.combine.fuse",
    "shiradelta.converters",
    "shiradelta.folder.apply",
    "shiradelta.hotswap.session",
    "tests.ranks",
    "tests.scenes",
    "tests.swapping",
)


def preload(*more: str) -> None:
    """Lets processes begin with these modules imported, too; called before the first one."""
    CONTEXT.set_forkserver_preload([*_LOADED, *more])


preload()
