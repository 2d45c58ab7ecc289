"""libshd built by plain `cc` for the tests that use it without the package."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from shiradelta.util.locks import try_lock

LIBSHD = Path(__file__).parent.parent / "libshd"
CC = shutil.which(os.environ.get("CC", "cc"))
WARNINGS = ("-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Werror")
INCLUDE = f"-I{LIBSHD / 'include'}"


def run(*command: object, code: int = 0, **options: object) -> str:
    """Standard output and error of a command that has to end with `code`."""
    done = subprocess.run(
        [str(word) for word in command],
        **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, **options},
    )
    assert done.returncode == code, f"{' '.join(map(str, command))}\nexit code {done.returncode}\n{done.stdout}"
    return str(done.stdout)


def compile_c(output: Path, *sources: Path, options: Sequence[str] = (), libraries: Sequence[str] = ()) -> Path:
    """A program in C11."""
    run(CC, "-std=c11", "-O2", *WARNINGS, INCLUDE, *options, *sources, *libraries, "-o", output)
    return output


@cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="libshd-")  # kept by the cache, removed at exit


def scratch() -> Path:
    """A folder of this process for what it builds."""
    return Path(_temporary().name)


@cache
def library() -> Path:
    """`libshd.a`; its objects do for the shared library, too.

    It stays in `build/` until the sources change, so that the processes of a test run share one.
    """
    options = ("-std=c11", "-O2", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", *WARNINGS)
    sources = sorted((LIBSHD / "src").glob("*.c"))
    about = hashlib.sha256(run(CC, "--version").encode() + repr(options).encode())
    for path in [*sources, *sorted((LIBSHD / "src").glob("*.h")), *sorted((LIBSHD / "include").glob("*.h"))]:
        about.update(path.read_bytes())
    home = LIBSHD.parent / "build" / "libshd-tests"
    home.mkdir(parents=True, exist_ok=True)
    folder = home / about.hexdigest()[:16]
    with open(home / "lock", "w") as lock:
        while not try_lock(lock.fileno()):
            time.sleep(0.05)
        if not folder.exists():
            for old in home.glob("*/"):
                shutil.rmtree(old)
            made = scratch() / "library"
            made.mkdir()
            run(CC, *options, "-c", *sources, cwd=made)
            run("ar", "rcs", "libshd.a", *sorted(made.glob("*.o")), cwd=made)
            shutil.move(made, home / "new")
            os.replace(home / "new", folder)
    return folder / "libshd.a"


@cache
def dump() -> Path:
    """The program that prints what files hold."""
    libraries = [str(library()), *(["-ldl"] if sys.platform == "linux" else [])]
    return compile_c(scratch() / "dump", LIBSHD / "tests" / "dump.c", libraries=libraries)
