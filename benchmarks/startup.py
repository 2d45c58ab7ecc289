"""How much processor time the command line takes to answer, against importing numpy and click.

The commands take turns, and each counts with the least time that it took: other work on the machine is in neither.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import shiradelta
from benchmarks.table import print_table

ROUNDS = 15


def main() -> None:
    """Prints the table."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "delta.shd"
        shiradelta.save_delta(path, {"w": shiradelta.TensorDelta((8,), [1], np.ones(1, np.float32))})
        cli = [sys.executable, "-m", "shiradelta.cli"]
        # Name -> command, and the most that it may take.
        commands = {
            'python -c "import numpy, click"': ([sys.executable, "-c", "import numpy, click"], ""),
            "shiradelta --help": ([*cli, "--help"], "0.5"),
            "shiradelta info": ([*cli, "info", str(path)], "1.5"),
        }
        rounds = [[_processor_time(command) for command, _ in commands.values()] for _ in range(ROUNDS)]
    least = [min(times) for times in zip(*rounds, strict=True)]
    rows = [["command", "processor time", "x import", "bar"]]
    for (name, (_, bar)), spent in zip(commands.items(), least, strict=True):
        rows.append([name, f"{spent * 1000:.0f} ms", f"{spent / least[0]:.2f}", bar])
    print_table("Start of the command line", rows)


def _processor_time(command: list[str]) -> float:
    """Seconds that a command and the system took for it."""
    import resource  # which Windows lacks

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


if __name__ == "__main__":
    main()
