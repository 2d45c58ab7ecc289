"""What tests build: libshd by plain `cc` and for WebAssembly, where they use it without the package; the wheel."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
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


@cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="libshd-")  # kept by the cache, removed at exit


def scratch() -> Path:
    """A folder of this process for what it builds."""
    return Path(_temporary().name)


def kept(name: str, about: str, inputs: Iterable[Path], make: Callable[[Path], object]) -> Path:
    """A folder in `build/` that `make` has filled.

    It stays until the inputs or what is said about it change, so that the processes of a test run share one.
    """
    digest = hashlib.sha256(about.encode())
    for path in sorted(inputs):
        digest.update(str(path.relative_to(LIBSHD.parent)).encode() + path.read_bytes())
    home = LIBSHD.parent / "build" / f"{name}-tests"
    home.mkdir(parents=True, exist_ok=True)
    folder = home / digest.hexdigest()[:16]
    with open(home / "lock", "w") as lock:
        while not try_lock(lock.fileno()):
            time.sleep(0.05)
        if not folder.exists():
            for old in home.glob("*/"):
                shutil.rmtree(old)
            made = scratch() / name
            made.mkdir()
            make(made)
            shutil.move(made, home / "new")
            os.replace(home / "new", folder)
    return folder


def sources() -> list[Path]:
    """What libshd is compiled from, headers included."""
    return [*(LIBSHD / "src").glob("*.[ch]"), *(LIBSHD / "include").glob("*.h")]


def program(name: str, *parts: Path, options: Sequence[str] = ("-std=c11", "-O2"), compiler: str | None = CC) -> Path:
    """A program from C or C++, and from libraries."""
    libraries = ["-lm", *(["-ldl"] if sys.platform == "linux" else [])]

    def make(folder: Path) -> None:
        run(compiler, *WARNINGS, INCLUDE, *options, *parts, *libraries, "-o", folder / name)

    headers = [header for folder in {part.parent for part in parts} for header in folder.glob("*.h")]
    about = run(compiler, "--version") + repr(options)
    return kept(name, about, {*parts, *headers, *sources()}, make) / name


@cache
def library() -> Path:
    """`libshd.a`; its objects do for the shared library, too."""
    options = ("-std=c11", "-O2", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", *WARNINGS)
    options += () if sys.platform == "win32" else ("-fno-asynchronous-unwind-tables",)

    def make(folder: Path) -> None:
        run(CC, *options, "-c", *sorted((LIBSHD / "src").glob("*.c")), cwd=folder)
        run("ar", "rcs", "libshd.a", *sorted(folder.glob("*.o")), cwd=folder)

    return kept("libshd", run(CC, "--version") + repr(options), sources(), make) / "libshd.a"


@cache
def wasm() -> Path:
    """`shd.wasm`, as its script builds it."""
    script = LIBSHD / "wasm" / "build.sh"
    parts = [script, *(LIBSHD / "wasm").rglob("*.[ch]"), *sources()]
    about = run(os.environ.get("CLANG", "clang"), "--version")
    return kept("wasm", about, parts, lambda folder: run(script, folder / "shd.wasm")) / "shd.wasm"


@cache
def dump() -> Path:
    """The program that prints what files hold."""
    return program("dump", LIBSHD / "tests" / "dump.c", library())


@cache
def wheel() -> Path:
    """The package's wheel for this machine."""
    root = LIBSHD.parent
    parts = [*(root / name for name in ("pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE")), *sources()]
    parts.append(LIBSHD / "CMakeLists.txt")
    for folder in ("shiradelta", "converters"):
        parts += [path for path in (root / folder).rglob("*") if path.is_file() and path.suffix != ".pyc"]

    def make(folder: Path) -> None:
        options = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", folder)
        run(sys.executable, "-m", "pip", "wheel", *options, f"--config-settings=build-dir={scratch() / 'cmake'}", root)

    (made,) = kept("wheel", sys.version, parts, make).glob("*.whl")
    return made
