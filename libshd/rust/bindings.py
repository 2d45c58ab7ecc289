"""Writes rust/bindings.rs from include/shd.h: `python libshd/rust/bindings.py`.  A test compares the two.

The header is plain enough for this: numbers, enums, structs of numbers and pointers, and functions.
"""

from __future__ import annotations

import re
from pathlib import Path

HEADER = Path(__file__).parent.parent / "include" / "shd.h"
OUTPUT = Path(__file__).with_name("bindings.rs")
TYPES = {
    "char": "c_char",
    "double": "f64",
    "float": "f32",
    "int": "c_int",
    "size_t": "usize",
    "void": "c_void",
    **{f"{sign}int{bits}_t": f"{sign or 'i'}{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
}
#: Names that are words of Rust.
WORDS = {"type", "ref", "in", "fn", "use", "move", "box"}


def rust_type(declared: str) -> str:
    """`const shd_delta *const *` -> `*const *const shd_delta`."""
    first, *pointers = re.findall(r"(?:const )?\w+|\*", declared.replace("*const", "* const"))
    constant = first.startswith("const ")
    found = TYPES.get(first.removeprefix("const "), first.removeprefix("const "))
    for token in pointers:
        if token == "*":
            found, constant = f"*{'const' if constant else 'mut'} {found}", False
        else:
            constant = True
    return found


def declaration(text: str) -> str:
    """`uint64_t dims[8]` -> `dims: [u64; 8]`."""
    found = re.fullmatch(r"(.*?)(\w+)(?:\[(\d+)\])?", " ".join(text.split()))
    if found is None:
        raise ValueError(f"{text!r} is no declaration of shd.h")
    kind = rust_type(found[1].strip())
    name = f"r#{found[2]}" if found[2] in WORDS else found[2]
    return f"{name}: [{kind}; {found[3]}]" if found[3] else f"{name}: {kind}"


def signature(arguments: str, result: str) -> str:
    """Arguments and result of a function."""
    listed = "" if arguments == "void" else ", ".join(map(declaration, arguments.split(",")))
    return f"({listed})" if result == "void" else f"({listed}) -> {rust_type(result)}"


def bindings() -> str:
    """The whole file."""
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [
        "// Written by rust/bindings.py from include/shd.h, which documents all of it.",
        "",
        "use core::ffi::{c_char, c_int, c_void};",
        "",
    ]
    for name, value in re.findall(r"^#define (SHD_ABI|SHD_NO_TENSOR) (\w+)", text, re.MULTILINE):
        kind, value = ("u32", "u32::MAX") if value == "UINT32_MAX" else ("c_int", value)
        lines.append(f"pub const {name}: {kind} = {value};")
    for _, body in re.findall(r"^enum (\w+) \{(.*?)\};", text, re.DOTALL | re.MULTILINE):
        number = 0
        lines.append("")
        for member in filter(None, (part.strip() for part in body.split(","))):
            name, _, given = (part.strip() for part in member.partition("="))
            number = int(given) if given else number
            lines.append(f"pub const {name}: c_int = {number};")
            number += 1
    for result, name, arguments in re.findall(r"^typedef (\w+) \(\*(\w+)\)\((.*?)\);", text, re.DOTALL | re.MULTILINE):
        lines += ["", f'pub type {name} = Option<unsafe extern "C" fn{signature(arguments, result)}>;']
    for body, name in re.findall(r"^typedef struct \w+ \{(.*?)\} (\w+);", text, re.DOTALL | re.MULTILINE):
        lines += ["", "#[repr(C)]", "#[derive(Clone, Copy)]", f"pub struct {name} {{"]
        lines += [f"    pub {declaration(part)}," for part in body.split(";") if part.strip()]
        lines.append("}")
    lines += ["", 'unsafe extern "C" {']
    for result, name, arguments in re.findall(r"^SHD_API ([^;(]*?)(\w+)\((.*?)\);", text, re.DOTALL | re.MULTILINE):
        lines.append(f"    pub fn {name}{signature(' '.join(arguments.split()), result.strip())};")
    return "\n".join([*lines, "}", ""])


if __name__ == "__main__":
    OUTPUT.write_text(bindings(), encoding="utf-8")
