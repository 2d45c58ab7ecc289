"""Runs a module in the environment with vLLM for CPUs that `make vllm` makes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import shiradelta
from shiradelta.backends.libshd.library import library_name
from shiradelta.serving.plugin import UNPACKED

ROOT = Path(__file__).parents[1]
#: Where `make vllm` has it.
INTERPRETER = ROOT / "build" / "vllm" / "bin" / "python"


def run(interpreter: Path, module: str, wanted: Any, threads: int) -> Any:
    """Runs a module, with JSON as its input, and returns the JSON of the last line that it prints.

    The module finds the tree and the C library that this process uses; vLLM runs in one process, without a network.

    Raises:
        subprocess.CalledProcessError: the module ended with an error.
    """
    openmp = next(interpreter.parents[1].rglob("libiomp5.so"), None)
    libraries = (Path(folder) / library_name() for folder in shiradelta.__path__)
    built = next((path for path in libraries if path.exists()), None)
    more = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    more |= {UNPACKED: "1", "OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    more |= {"PYTHONPATH": str(ROOT), "LD_PRELOAD": str(openmp or ""), "SHIRADELTA_LIBSHD": str(built or "")}
    done = subprocess.run(
        [str(interpreter), "-m", module],
        cwd=ROOT,
        env={**os.environ, **more},
        input=json.dumps(wanted),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])
