"""The platforms that wheels are built for."""

from __future__ import annotations

import re
from dataclasses import dataclass

_GLIBC = r"libc\.so\.6"
_MUSL = r"libc\.so|libc\.musl-\w+\.so\.1"
_MACOS = r"/usr/lib/libSystem\.B\.dylib"
_WINDOWS = r"KERNEL32\.dll|api-ms-win-crt-[\w-]+\.dll"


@dataclass(frozen=True)
class Target:
    """A platform: its tag in the wheel's name, Zig's name for it, and what its library may be."""

    tag: str
    triple: str
    #: File name of the library, as `shiradelta.backends.libshd.library.library_name` gives it there.
    library: str
    #: Machine in the header of the library, as LIEF names it.
    machine: str
    #: Libraries that the library may load: a regular expression of their names.
    loads: str

    @property
    def oldest(self) -> tuple[int, ...]:
        """Oldest version of glibc or macOS that the tag promises, as (major, minor); empty where there is none."""
        found = re.search(r"(?:manylinux|macosx)_(\d+)_(\d+)", self.tag)
        return tuple(map(int, found.groups())) if found else ()


TARGETS = (
    Target("manylinux2014_x86_64.manylinux_2_17_x86_64", "x86_64-linux-gnu.2.17", "libshd.so", "X86_64", _GLIBC),
    Target("manylinux2014_aarch64.manylinux_2_17_aarch64", "aarch64-linux-gnu.2.17", "libshd.so", "AARCH64", _GLIBC),
    Target("musllinux_1_2_x86_64", "x86_64-linux-musl", "libshd.so", "X86_64", _MUSL),
    Target("musllinux_1_2_aarch64", "aarch64-linux-musl", "libshd.so", "AARCH64", _MUSL),
    Target("macosx_11_0_x86_64", "x86_64-macos.11.0", "libshd.dylib", "X86_64", _MACOS),
    Target("macosx_11_0_arm64", "aarch64-macos.11.0", "libshd.dylib", "ARM64", _MACOS),
    Target("win_amd64", "x86_64-windows-gnu", "shd.dll", "AMD64", _WINDOWS),
)
