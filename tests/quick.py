"""A plugin of pytest that makes runs shorter: less garbage collection, files in memory, no model cards of PEFT."""

from __future__ import annotations

import gc
import os
import shutil
import sys
from pathlib import Path

import pytest

#: Bytes that a file system in memory has to have free for the tests' files.
_ROOM = 4 << 30


def pytest_configure() -> None:
    # What is imported and collected stays: it need not be walked through again and again.
    gc.disable()
    # A sync of a disk takes 5 ms, and some ten thousand are asked for.
    memory = Path("/dev/shm")
    if "PYTEST_DEBUG_TEMPROOT" not in os.environ and memory.is_dir() and shutil.disk_usage(memory).free > _ROOM:
        os.environ["PYTEST_DEBUG_TEMPROOT"] = str(memory)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()
    # PEFT writes a model card beside each adapter, which takes longer than the adapter; nothing reads it.
    if peft := sys.modules.get("peft"):
        peft.PeftModel.create_or_update_model_card = lambda *_: None


def pytest_unconfigure() -> None:
    gc.unfreeze()  # compiled libraries complain of what is not freed in the end
