"""What is public: Python names, the command line and the C functions, one per line.

`python -m tests.public` writes the snapshot `tests/public.txt`, which a test compares.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

import shiradelta
from shiradelta.cli import main

ROOT = Path(__file__).parent.parent
SNAPSHOT = Path(__file__).with_name("public.txt")


def parameters(function: Callable[..., Any]) -> str:
    """Names and order of the parameters; those with a default end in `=`."""
    if getattr(function, "__init__", None) is Exception.__init__:
        return ""  # Python has no signature for it
    words = []
    star = False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            words.append("*")
        star |= parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        mark = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        words.append(mark + parameter.name + ("" if parameter.default is parameter.empty else "="))
    return f"({', '.join(words)})"


def python() -> Iterator[str]:
    """Each name of `shiradelta.__all__`, and the public members of the classes."""
    for name in shiradelta.__all__:
        value = getattr(shiradelta, name)
        yield f"shiradelta.{name}{parameters(value)}"
        if not inspect.isclass(value):
            continue
        for member in sorted(set(dir(value)) - set(dir(Exception))):
            if not member.startswith("_"):
                found = getattr(value, member)
                yield f"shiradelta.{name}.{member}{parameters(found) if callable(found) else ''}"


def command_line(command: click.Command = main, name: str = "shiradelta") -> Iterator[str]:
    """Each command with its arguments and options, and the choices of each option.  Hidden ones do not count."""
    yield name
    for parameter in command.params:
        if getattr(parameter, "hidden", False):
            continue
        names = [*parameter.opts, *parameter.secondary_opts] if parameter.param_type_name == "option" else []
        line = f"{name} {'/'.join(names) or str(parameter.name).upper()}"
        yield line
        if isinstance(parameter.type, click.Choice):
            yield from (f"{line} {choice}" for choice in parameter.type.choices)
    for each, inner in sorted(getattr(command, "commands", {}).items()):
        if not inner.hidden:
            yield from command_line(inner, f"{name} {each}")


def c_functions() -> Iterator[str]:
    """Each function of the C header, as it is declared."""
    header = (ROOT / "libshd" / "include" / "shd.h").read_text(encoding="utf-8")
    for declaration in re.findall(r"^SHD_API ([^;#]*;)", header, re.MULTILINE):
        yield " ".join(declaration.split())


def surface() -> str:
    """All of it."""
    return "\n".join([*python(), *command_line(), *c_functions(), ""])


if __name__ == "__main__":
    SNAPSHOT.write_text(surface(), encoding="utf-8")
