"""Builds the sdist, the library for each platform, and the wheels."""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from wheels.targets import Target

ROOT = Path(__file__).parent.parent
#: As libshd/CMakeLists.txt compiles it: a product and a sum must never be contracted, the results are specified.
FLAGS = ("-std=c11", "-O3", "-DNDEBUG", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-s", "-shared")
#: 1980-01-01, the oldest time that zip knows: the same sources give the same wheel.
_EPOCH = "315532800"


def run(*command: object, cwd: Path = ROOT, **environment: str) -> str:
    """Standard output of a command.

    Raises:
        SystemExit: it failed; the message is what it printed.
    """
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\nfailed with {done.returncode}:\n{done.stdout}")
    return done.stdout


def sdist(folder: Path) -> Path:
    """The source distribution, in a folder."""
    code = f"from scikit_build_core.build import build_sdist; print(build_sdist({str(folder)!r}))"
    return folder / run(sys.executable, "-c", code, SOURCE_DATE_EPOCH=_EPOCH).split()[-1]


def pure_wheel(source: Path, folder: Path) -> Path:
    """The wheel without a library, from the sdist; nothing is downloaded."""
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--config-settings=wheel.cmake=false")
    run(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", folder, source, SOURCE_DATE_EPOCH=_EPOCH)
    (wheel,) = folder.glob("*-py3-none-any.whl")
    return wheel


def compile_library(target: Target, path: Path) -> None:
    """The shared library for a platform, by Zig's C compiler."""
    options = [*FLAGS, "-target", target.triple, f"-I{ROOT / 'libshd' / 'include'}"]
    if path.suffix == ".dylib":
        options.append(f"-Wl,-install_name,@rpath/{path.name}")
    sources = sorted((ROOT / "libshd" / "src").glob("*.c"))
    run(sys.executable, "-m", "ziglang", "cc", *options, *sources, "-o", path, cwd=path.parent)


def record_line(name: str, content: bytes) -> str:
    """A file's line in a wheel's RECORD."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(content)}\n"


def pack(pure: Path, target: Target, library: bytes, folder: Path) -> Path:
    """The wheel for a platform: the pure one with the library in it, and the platform's tags."""
    wheel = folder / pure.name.replace("-py3-none-any.whl", f"-py3-none-{target.tag}.whl")
    tags = "".join(f"Tag: py3-none-{tag}\n" for tag in target.tag.split("."))
    with zipfile.ZipFile(pure) as source:
        files = {name: source.read(name) for name in source.namelist() if not name.endswith("/")}
    (about,) = (name for name in files if name.endswith(".dist-info/WHEEL"))
    kept = [line for line in files[about].decode().splitlines() if line and not line.startswith(("Tag:", "Root-Is"))]
    files[about] = ("\n".join(kept) + f"\nRoot-Is-Purelib: false\n{tags}").encode()
    files[f"shiradelta/{target.library}"] = library
    record = about.replace("WHEEL", "RECORD")
    del files[record]
    files[record] = ("".join(record_line(*file) for file in files.items()) + f"{record},,\n").encode()
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name)
            entry.external_attr = 0o100644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, content)
    return wheel


def build(target: Target, pure: Path, folder: Path) -> Path:
    """The wheel for a platform, in a folder."""
    with tempfile.TemporaryDirectory() as scratch:
        library = Path(scratch) / target.library
        compile_library(target, library)
        return pack(pure, target, library.read_bytes(), folder)
