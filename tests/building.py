"""libshd built by plain `cc`, once a process, for the tests that use it without the package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

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
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="libshd-")  # kept by the cache, removed at exit


@cache
def library() -> Path:
    """`libshd.a`; its objects do for the shared library, too."""
    folder = Path(_folder().name)
    options = ("-std=c11", "-O2", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", *WARNINGS)
    run(CC, *options, "-c", *sorted((LIBSHD / "src").glob("*.c")), cwd=folder)
    run("ar", "rcs", "libshd.a", *sorted(folder.glob("*.o")), cwd=folder)
    return folder / "libshd.a"


@cache
def dump() -> Path:
    """The program that prints what files hold."""
    libraries = [str(library()), *(["-ldl"] if sys.platform == "linux" else [])]
    return compile_c(library().parent / "dump", LIBSHD / "tests" / "dump.c", libraries=libraries)
