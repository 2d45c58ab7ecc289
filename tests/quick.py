"""A plugin of pytest that makes runs shorter: less garbage collection, files in memory, few reports, no model cards.

Triton's interpreter, in which its kernels run here, takes two thirds of its time.
"""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from _pytest.runner import runtestprotocol

#: Bytes that a file system in memory has to have free for the tests' files.
_ROOM = 4 << 30

#: Seconds from which `--durations` shows a set-up or a teardown.
_SHOWN = 0.005


class _Worker:
    """What a worker of xdist does otherwise: it sends no report of a set-up or a teardown that has nothing to say.

    Sending one takes 0.3 ms in the two processes; an empty test takes 1 ms.
    """

    @pytest.hookimpl
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool:
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in runtestprotocol(item, log=False, nextitem=nextitem):
            if report.when == "call" or not report.passed or report.duration >= _SHOWN:
                item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        config.pluginmanager.register(_Worker())
    # What is imported and collected stays: it need not be walked through again and again.
    gc.disable()
    # A sync of a disk takes 5 ms, and some ten thousand are asked for.  pytest's own folders are in this one, too.
    memory = Path("/dev/shm")
    if "TMPDIR" not in os.environ and memory.is_dir() and shutil.disk_usage(memory).free > _ROOM:
        os.environ["TMPDIR"] = tempfile.tempdir = str(memory)


def pytest_itemcollected(item: pytest.Item) -> None:
    # An address, which each process has another of: two workers would refuse to run any test, and say so themselves.
    if " at 0x" in item.nodeid and not hasattr(item.config, "workerinput"):
        raise pytest.UsageError(f"{item.nodeid} has another name in each worker; give its parameters ids")


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    gc.freeze()
    gc.enable()
    # Not before pytest's own collections at the end, which would walk through all of it.  Compiled libraries complain
    # of what is not freed when the process ends.
    atexit.register(gc.unfreeze)
    if find_spec("triton") and any("triton" in item.nodeid for item in session.items):
        _interpret_quickly()
    # PEFT writes a model card beside each adapter, which takes longer than the adapter; nothing reads it.
    if peft := sys.modules.get("peft"):
        peft.PeftModel.create_or_update_model_card = lambda *_: None


def _interpret_quickly() -> None:
    """A launch replaces Triton's language by the interpreter's; each function that a kernel calls does it once more.

    That is two milliseconds for nothing: as many as the function itself takes.
    """
    from triton.runtime.interpreter import InterpretedFunction

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        return function.rewrite()(*args, **kwargs)

    InterpretedFunction.__call__ = call
