"""Runs cells in processes of their own, one an architecture, each cell within a time limit."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from multiprocessing import connection
from pathlib import Path
from typing import Any

from benchmarks.architectures.cells import Cell, Outcome, run

#: Modules that each process begins with; they are loaded once, where processes are forked.
PRELOADED = [
    "benchmarks.architectures.rows",
    "benchmarks.architectures.columns",
    "transformers.modeling_utils",
    "peft",
    "shiradelta.fit.run",
]


@dataclass
class _Worker:
    process: Any
    receiver: Any
    row: str
    columns: list[str]
    since: float

    def missed(self, outcome: Outcome, text: str) -> Cell:
        """The cell that it was at."""
        return Cell(self.row, self.columns.pop(0), outcome, text, seconds=time.monotonic() - self.since)


def cells(rows: Sequence[str], columns: Sequence[str], jobs: int, limit: float) -> Iterator[Cell]:
    """Runs all cells, and yields each when it ends.

    Args:
        rows: names of architectures.
        columns: names of columns.
        jobs: how many architectures run at a time.
        limit: seconds that a cell may take; a slower one is ended with its process, and the next begins anew.
    """
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload(PRELOADED)
    waiting = [(row, list(columns)) for row in rows]
    running: dict[connection.Connection, _Worker] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            row, left = waiting.pop(0)
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(sender, row, left), daemon=True)
            process.start()
            sender.close()
            running[receiver] = _Worker(process, receiver, row, left, time.monotonic())
        ready = connection.wait(list(running), timeout=1.0)
        for receiver in [one for one in running if one in ready]:
            worker = running[receiver]
            try:
                cell = receiver.recv()
            except EOFError:
                del running[receiver]
                worker.process.join()
                if worker.columns:
                    yield worker.missed(Outcome.TRACEBACK, f"the process ended with {worker.process.exitcode}")
                    waiting.insert(0, (worker.row, worker.columns))
                continue
            worker.columns.remove(cell.column)
            worker.since = time.monotonic()
            yield cell
        for receiver, worker in list(running.items()):
            if worker.columns and time.monotonic() - worker.since > limit:
                del running[receiver]
                worker.process.kill()
                worker.process.join()
                yield worker.missed(Outcome.TRACEBACK, f"longer than {limit:g} s")
                waiting.insert(0, (worker.row, worker.columns))
        waiting = [(row, left) for row, left in waiting if left]


def _work(sender: Any, row: str, columns: Sequence[str]) -> None:
    """Runs the cells of a row, and sends each."""
    import torch

    from benchmarks.architectures.columns import COLUMNS, Case
    from benchmarks.architectures.rows import ROWS

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    _silence()
    architecture = ROWS[row]
    missing = _missing(architecture.needs)
    with tempfile.TemporaryDirectory() as name:
        folder, case = Path(name), None
        for column in columns:
            if missing:
                sender.send(Cell(row, column, Outcome.NOT_RUN, missing))
                continue

            def work(column: str = column) -> None:
                nonlocal case
                case = case or Case(architecture, folder)
                COLUMNS[column](case)

            sender.send(run(row, column, partial(work), folder))
    sender.close()


def _missing(packages: Sequence[str]) -> str:
    """Which package cannot be imported, and why."""
    for package in packages:
        try:
            import_module(package)
        except Exception as error:  # a package that is installed may fail in many ways
            return f"{package} cannot be imported ({type(error).__name__}: {error})"
    return ""


def _silence() -> None:
    """Libraries say nothing: their remarks on random weights tell nobody anything."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    logging = import_module("transformers.utils.logging")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    import_module("logging").disable()
