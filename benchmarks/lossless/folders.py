"""`convert --lossless` of two folders, against the time that reading both takes, and its peak memory."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import shiradelta as sd
from benchmarks.lossless.steps import independent
from benchmarks.lossless.ways import Clock, write_both
from benchmarks.models import LLAMA_7B_LAYER

#: Bytes of the largest tensor.
LARGEST = 2 * max(rows * columns for rows, columns in LLAMA_7B_LAYER.values())
#: How much of a file is read at a time.
_PIECE = 1 << 24
#: Prints the peaks of anonymous memory, and of all that is resident, above those before the conversion.
_CHILD = """
import sys, threading
import shiradelta as sd
import numpy

def memory(kind):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(kind))

def watch():
    global peak
    while not done.wait(0.005):
        peak = max(peak, memory("RssAnon"))

done, peak = threading.Event(), memory("RssAnon")
idle, idle_of_all = peak, memory("VmHWM")
watching = threading.Thread(target=watch)
watching.start()
sd.convert(sys.argv[1] + "/tuned", sys.argv[1] + "/x.shd", base=sys.argv[1] + "/base", lossless=True)
done.set()
watching.join()
print(peak - idle, memory("VmHWM") - idle_of_all)
"""


def against_reading(density: float, layers: int, repeats: int) -> Iterator[tuple[str, Clock]]:
    """(what is done, the least that it takes), in turn: from the page cache, then from the disk."""
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name)
        write_both(*independent(density, layers), folder)
        work = {"reading both": lambda: read(folder), "convert --lossless": lambda: difference(folder)}
        for cached in True, False:
            runs: dict[str, list[Clock]] = {each: [] for each in work}
            for _ in range(repeats):
                for each, do in work.items():
                    if not cached:
                        forget(folder)
                    runs[each].append(Clock.of(do)[0])
            for each, found in runs.items():
                yield (
                    f"{each}, {'in' if cached else 'out of'} the page cache",
                    Clock(*map(min, zip(*found, strict=True))),
                )


def forget(folder: Path) -> None:
    """Lets the system drop the pages of both checkpoints; where it cannot be told, they stay."""
    for file in folder.rglob("*.safetensors"):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(folder: Path) -> None:
    """Reads all bytes of both checkpoints, into a buffer that is used again."""
    buffer = bytearray(_PIECE)
    for file in sorted(folder.rglob("*.safetensors")):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def difference(folder: Path) -> None:
    """Writes the step, as the command does."""
    sd.convert(folder / "tuned", folder / "x.shd", base=folder / "base", lossless=True)


def peaks(density: float, layers: int) -> tuple[int, int]:
    """Bytes that a process of its own takes at most: allocated, and with the pages of mapped files."""
    with tempfile.TemporaryDirectory(dir=".") as name:
        write_both(*independent(density, layers), Path(name))
        done = subprocess.run([sys.executable, "-c", _CHILD, name], check=True, capture_output=True, text=True)
    allocated, resident = map(int, done.stdout.split())
    return allocated, resident
