"""How soon the command line answers, against importing what it stands on."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np

import shiradelta
from benchmarks.table import print_table, seconds


def main() -> None:
    """Prints the table."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "delta.shd"
        shiradelta.save_delta(path, {"w": shiradelta.TensorDelta((8,), [1], np.ones(1, np.float32))})
        cli = [sys.executable, "-m", "shiradelta.cli"]
        commands = {
            'python -c "import numpy, click"': [sys.executable, "-c", "import numpy, click"],
            "shiradelta --help": [*cli, "--help"],
            "shiradelta info": [*cli, "info", str(path)],
        }
        times = {
            name: seconds(partial(subprocess.run, command, check=True, capture_output=True), 15)
            for name, command in commands.items()
        }
    least = next(iter(times.values()))
    rows = [["command", "time", "x import", "bar"]]
    rows += [[name, f"{spent * 1000:.0f} ms", f"{spent / least:.2f}", "2"] for name, spent in times.items()]
    print_table("Start of the command line", rows)


if __name__ == "__main__":
    main()
