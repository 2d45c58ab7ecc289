"""Checks a wheel: what its library is and needs against its tag; and installs the one for this machine."""

from __future__ import annotations

import base64
import hashlib
import re
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import lief

from wheels.build import ROOT, run
from wheels.targets import Target

#: Run with the installed wheel: writes a file, reads it, applies it and takes it out.
_TRIAL = """
import numpy as np
import shiradelta as sd
from shiradelta.backends.choose import choose
assert choose().name == "libshd", choose()
assert "site-packages" in sd.__file__, sd.__file__
w = np.arange(4096, dtype=np.float32)
sd.save_delta("a.shd", {"w": sd.TensorDelta((4096,), [7, 99], [0.5, -2.0], "float32")}, values="f32")
with sd.open_delta("a.shd") as delta:
    assert delta["w"].positions().tolist() == [7, 99]
    delta.verify()
swap = sd.HotSwap({"w": w})
swap.load("a", "a.shd")
swap.switch("a")
assert w[7] == 7.5 and w[99] == 97
swap.revert()
assert (w == np.arange(4096)).all()
print("ok")
"""


def functions() -> set[str]:
    """The functions that the header declares."""
    header = (ROOT / "libshd" / "include" / "shd.h").read_text()
    return set(re.findall(r"^SHD_API [^;(]*?\b(shd_\w+)\(", header, re.MULTILINE))


def faults_of_record(archive: zipfile.ZipFile) -> Iterator[str]:
    """What RECORD says that is not so."""
    (record,) = (name for name in archive.namelist() if name.endswith(".dist-info/RECORD"))
    rows = [line.rsplit(",", 2) for line in archive.read(record).decode().splitlines()]
    if [row[0] for row in rows] != archive.namelist():
        yield "RECORD lists other files than the wheel holds"
    for name, digest, _ in rows:
        found = base64.urlsafe_b64encode(hashlib.sha256(archive.read(name)).digest()).rstrip(b"=").decode()
        if name != record and digest != f"sha256={found}":
            yield f"RECORD has another digest of {name}"


def faults_of_library(target: Target, content: bytes) -> Iterator[str]:
    """What a library is or needs that its platform's tag does not allow."""
    binary = lief.parse(list(content))
    versions: list[tuple[int, ...]] = []
    header = binary.header
    if isinstance(binary, lief.ELF.Binary):
        machine, loads = header.machine_type, list(binary.libraries)
        named = [one.name for row in binary.symbols_version_requirement for one in row.get_auxiliary_symbols()]
        versions = [tuple(map(int, name.removeprefix("GLIBC_").split("."))) for name in named]
        if not binary.has_nx:
            yield "the library wants an executable stack"
    elif isinstance(binary, lief.MachO.Binary):
        machine, loads = header.cpu_type, [one.name for one in binary.libraries if not one.name.startswith("@rpath/")]
        versions = [tuple(binary.build_version.minos[:2])]
        if target.machine == "ARM64" and not binary.has_code_signature:
            yield "the library has no signature, without which this system does not load it"
    else:
        machine, loads = header.machine, [one.name for one in binary.imports]
    if machine.name != target.machine:
        yield f"the library is for {machine.name}, not {target.machine}"
    if isinstance(binary, lief.PE.Binary):
        exported = {one.name for one in binary.get_export().entries}
    else:
        exported = {str(one.name).removeprefix("_") for one in binary.exported_symbols}
    if missing := functions() - exported:
        yield f"the library does not export {', '.join(sorted(missing))}"
    yield from (f"the library loads {name}" for name in loads if not re.fullmatch(target.loads, name))
    yield from (f"the library needs version {version}" for version in versions if version > target.oldest)


def faults(wheel: Path, target: Target) -> list[str]:
    """What is wrong with a wheel, a line each."""
    with zipfile.ZipFile(wheel) as archive:
        found = list(faults_of_record(archive))
        (about,) = (name for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
        tags = set(re.findall(r"^Tag: py3-none-(\S+)$", archive.read(about).decode(), re.MULTILINE))
        if tags != set(target.tag.split(".")) or not wheel.stem.endswith(target.tag):
            found.append(f"its tags are {sorted(tags)}")
        return found + list(faults_of_library(target, archive.read(f"shiradelta/{target.library}")))


def audit(wheel: Path, target: Target) -> None:
    """Lets auditwheel judge a wheel for glibc: its oldest platform may be the tag's, or older."""
    said = run(sys.executable, "-m", "auditwheel", "show", wheel)
    machine = target.tag.rpartition(".")[2].split("_", 3)[3]
    found = [(int(major), int(minor)) for major, minor in re.findall(rf'"manylinux_(\d+)_(\d+)_{machine}"', said)]
    if not any(one <= target.oldest for one in found):
        raise SystemExit(f"auditwheel does not find {target.tag} in {wheel.name}:\n{said}")


def try_installed(wheel: Path) -> None:
    """Installs a wheel into a new environment, and uses it outside the checkout with no compiler on PATH."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        run(sys.executable, "-m", "venv", folder / "env")
        bin = folder / "env" / ("Scripts" if sys.platform == "win32" else "bin")
        bare = {"PATH": str(bin), "PYTHONPATH": ""}
        install = (bin / "python", "-m", "pip", "install", "--quiet", "--only-binary", ":all:")
        run(*install, wheel, cwd=folder, **bare)
        run(bin / "python", "-c", _TRIAL, cwd=folder, **bare)
        run(bin / "shiradelta", "info", "--verify", "a.shd", cwd=folder, **bare)
