"""The memory that a stranger's file takes: by its own size, not by the numbers in it (docs/limits.md)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import shiradelta as sd

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the peak")

#: Reads the most memory that the process ever had, in bytes; it starts from what the imports took.
PEAK = """
import sys
import shiradelta as sd
from shiradelta.combine.report import report
import scipy.sparse.linalg  # the report's, loaded before anything is measured

def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) << 10

file, other = sys.argv[1:]
before = peak()
{action}
print(peak() - before)
"""
ACTIONS = {
    "verify": "sd.open_delta(file).verify()",
    "verify, NumPy": "sd.open_delta(file, backend='numpy').verify()",
    "report": "report({file: 1.0})",
    "compare": "report({file: 1.0, other: 1.0})",
    "fuse": "sd.fuse({file: 1.0, other: 1.0}, file + '.fused')",
}


def peak_of(action: str, *files: Path) -> int:
    """The bytes that an action adds to the memory of a process."""
    code = PEAK.format(action=ACTIONS[action])
    done = subprocess.run([sys.executable, "-c", code, *map(str, files)], check=True, capture_output=True, text=True)
    return int(done.stdout)


@pytest.fixture(scope="module")
def bomb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of which each byte is 350 nonzeros: a bit for each, in zstd, with all positions in no bytes."""
    path = tmp_path_factory.mktemp("bomb") / "a.shd"
    values = np.ones(6 << 20, np.float32)
    noise = np.random.default_rng(0).random(values.size // 52) < 0.5
    values[: noise.size][noise] = -1
    sd.save_delta(path, {"w": sd.TensorDelta((3 << 10, 2 << 10), None, values)}, values="sign", zstd=True)
    assert path.stat().st_size * 350 < values.size
    return path


@pytest.mark.parametrize("action", ["verify", "verify, NumPy", "report"])
def test_what_reads_in_windows_takes_little(bomb: Path, action: str):
    """The positions alone would be 48 MB; NumPy has a few arrays of a window at a time, some MB."""
    assert peak_of(action, bomb, bomb) < 24 << 20


@pytest.mark.parametrize("action", ["report", "compare", "fuse"])
def test_a_huge_shape_takes_nothing(tmp_path: Path, action: str):
    files = tmp_path / "a.shd", tmp_path / "b.shd"
    for number, file in enumerate(files):
        delta = sd.TensorDelta((1 << 28, 1 << 28), [5, 1 << 30, (1 << 50) + number], [1.0, 2.0, 3.0])
        sd.save_delta(file, {"w": delta}, values="f32")
        assert file.stat().st_size == 512
    assert peak_of(action, *files) < 48 << 20
