"""The kernels of benchmarks/lines.py touch what they say, in Triton's interpreter."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import torch
from benchmarks.lines import positions_of, touches

weight = torch.zeros(1 << 14, dtype=torch.int16)
positions = positions_of(len(weight), "cpu")
assert positions.diff().min() > 0 and 100 < len(positions) < 230, len(positions)
for name, work in touches(weight, positions).items():
    weight.zero_()
    work()
    found = weight.nonzero()[:, 0]
    if name == "elements read":
        assert not len(found)
    elif name.startswith("elements"):
        assert torch.equal(found, positions), name
    else:
        size = int(name.split()[3]) // 2
        lines = positions.div(size, rounding_mode="floor").unique()
        assert torch.equal(found.div(size, rounding_mode="floor").unique(), lines), name
        assert (weight.view(torch.int32)[weight.view(torch.int32) != 0] == 1).all(), name
print("touched")
"""


def test_each_line_is_touched_once(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.stdout == "touched\n", done.stderr
