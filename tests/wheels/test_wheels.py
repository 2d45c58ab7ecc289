"""Wheels for other platforms: tags, RECORD, and libraries that are not what the tag says."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.utils import parse_wheel_filename

from wheels.build import pack, record_line
from wheels.targets import TARGETS, Target

#: What `make wheels` installs, and the tests' environment need not have.
TOOLS = ("ziglang", "lief", "auditwheel", "twine")
MISSING = [name for name in TOOLS if importlib.util.find_spec(name) is None]
needs_tools = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}: pip install '.[wheels]'")


def pure(folder: Path) -> Path:
    """A small wheel for all platforms."""
    about = "shiradelta-9.0.dist-info"
    files = {
        "shiradelta/__init__.py": b"",
        f"{about}/METADATA": b"Metadata-Version: 2.4\nName: shiradelta\nVersion: 9.0\n",
        f"{about}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n\n",
    }
    record = "".join(record_line(*file) for file in files.items()) + f"{about}/RECORD,,\n"
    path = folder / "shiradelta-9.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {**files, f"{about}/RECORD": record.encode()}.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.triple)
def test_a_wheel_has_the_tags_of_its_name_and_the_library(target: Target, tmp_path: Path):
    wheel = pack(pure(tmp_path), target, b"a library", tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        about = archive.read("shiradelta-9.0.dist-info/WHEEL").decode().splitlines()
        record = archive.read("shiradelta-9.0.dist-info/RECORD").decode().splitlines()
        assert archive.read(f"shiradelta/{target.library}") == b"a library"
        assert [line.split(",")[0] for line in record] == archive.namelist()
    assert record_line(f"shiradelta/{target.library}", b"a library").strip() in record
    assert "Root-Is-Purelib: false" in about
    assert "Root-Is-Purelib: true" not in about
    tags = {str(tag) for tag in parse_wheel_filename(wheel.name)[3]}
    assert tags == {line.removeprefix("Tag: ") for line in about if line.startswith("Tag: ")}
    assert pack(pure(tmp_path), target, b"a library", tmp_path).read_bytes() == wheel.read_bytes()


@pytest.mark.slow
@needs_tools
def test_the_wheel_for_this_machine_works_and_no_other_tag_takes_its_library(tmp_path: Path):
    """The whole way for one platform; then the same library under each other tag."""
    from wheels.check import faults

    command = [sys.executable, "-m", "wheels", str(tmp_path), "manylinux2014_x86_64"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "installed and used" in done.stdout
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        library = archive.read("shiradelta/libshd.so")
    for target in TARGETS:
        found = "; ".join(faults(pack(pure(tmp_path), target, library, tmp_path), target))
        assert ("the library is for X86_64" in found) == (target.machine != "X86_64")
