"""Runs a function in several forked processes that form a gloo group."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.forked import CONTEXT

#: Seconds after which processes count as hanging.
_PATIENCE = 300


class Ended:
    """Stands for the result of a process that ended without one."""


def run(function: Callable[..., Any], count: int, folder: Path, *arguments: Any) -> list[Any]:
    """Calls `function(rank, *arguments)` in each of some processes; their results, by rank.

    A process that is killed has the result `Ended`.
    """
    store = folder / "store"
    number = 0
    while store.exists():
        number += 1
        store = folder / f"store{number}"
    pairs = [CONTEXT.Pipe(duplex=False) for _ in range(count)]
    processes = [
        CONTEXT.Process(target=_work, args=(rank, count, str(store), sender, function, arguments), daemon=True)
        for rank, (_, sender) in enumerate(pairs)
    ]
    for process, (_, sender) in zip(processes, pairs, strict=True):
        process.start()
        sender.close()
    results: list[Any] = []
    for process, (receiver, _) in zip(processes, pairs, strict=True):
        try:
            found = receiver.recv() if receiver.poll(_PATIENCE) else (False, "hangs")
        except EOFError:
            found = True, Ended()
        process.kill() if found == (False, "hangs") else process.join()
        results.append(found)
    failed = [f"rank {rank}: {what}" for rank, (good, what) in enumerate(results) if not good]
    assert not failed, "\n".join(failed)
    return [what for _, what in results]


def _work(rank: int, count: int, store: str, sender: Any, function: Callable[..., Any], arguments: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, count), rank=rank, world_size=count)
    try:
        sender.send((True, function(rank, *arguments)))
    except BaseException:
        sender.send((False, traceback.format_exc()))
    finally:
        sender.close()
        dist.destroy_process_group()
