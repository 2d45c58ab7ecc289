"""What is public: Python names, the command line and the C functions, as snapshots in text files of this folder.

`python -m tests.public` writes the snapshots; a test compares them.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from shiradelta.cli import main
from shiradelta.cli.options import RegistryChoice, RenamedOption

ROOT = Path(__file__).parent.parent.parent
#: Modules whose `__all__` is public, and classes that are public because functions return them.
MODULES = (
    "shiradelta",
    "shiradelta.converters",
    "shiradelta.train",
    "shiradelta.experts",
    "shiradelta.fit",
    "shiradelta.combine.report",
    "shiradelta.chain",
    "shiradelta.chain.wires",
)
RETURNED = (
    "shiradelta.io.reader.Delta",
    "shiradelta.experts.routing.RoutedGroup",
    "shiradelta.folder.verification.VerifyReport",
)


def parameters(function: Callable[..., Any]) -> Iterator[str]:
    """A line for each parameter: `*` before one that is taken by keyword only, `/` after one by position only."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # Python has no signature for some classes of exceptions
        return
    for parameter in signature.parameters.values():
        before = {
            parameter.KEYWORD_ONLY: "* ",
            parameter.VAR_POSITIONAL: "*",
            parameter.VAR_KEYWORD: "**",
        }.get(parameter.kind, "")
        after = " /" if parameter.kind is parameter.POSITIONAL_ONLY else ""
        default = "" if parameter.default is parameter.empty else f" = {plain(parameter.default)}"
        if parameter.name not in ("self", "cls"):
            yield f"    {before}{parameter.name}{after}{default}"
    renamed = getattr(function, "renamed", None) or getattr(getattr(function, "__init__", None), "renamed", {})
    for old, new in renamed.items():
        yield f"    {old}: hidden, use {new}"


def plain(value: object) -> str:
    """A default without an address in it."""
    text = repr(value)
    return f"<{getattr(value, '__qualname__', type(value).__qualname__)}>" if " at 0x" in text else text


def described(name: str, value: Any) -> Iterator[str]:
    """A function with its parameters, a class with its public members, or the names in a collection."""
    if not callable(value):
        yield f"{name}: {', '.join(value)}"
        return
    bases = f"({', '.join(base.__name__ for base in value.__bases__)})" if inspect.isclass(value) else ""
    yield name + (bases if "Error" in bases else "")
    if not (inspect.isclass(value) and issubclass(value, Enum | Exception) and "__init__" not in vars(value)):
        yield from parameters(value)
    if inspect.isclass(value):
        inherited = set(dir(ImportError if issubclass(value, ImportError) else Exception))
        for member in sorted(set(dir(value)) - inherited):
            if not member.startswith("_"):
                found = getattr(value, member)
                yield f"{name}.{member}{'()' if callable(found) else ''}"
                if callable(found):
                    yield from parameters(found)


def api() -> Iterator[str]:
    """Each public name of Python."""
    for module in MODULES:
        for name in import_module(module).__all__:
            yield from described(f"{module}.{name}", getattr(import_module(module), name))
    for path in RETURNED:
        module, _, name = path.rpartition(".")
        yield from described(path, getattr(import_module(module), name))


def option(parameter: click.Parameter) -> str:
    """A line for an option or an argument: names, type or choices, default, old names."""
    if isinstance(parameter, RenamedOption):
        return f"    {parameter.old}: hidden, use {parameter.new}"
    names = [*parameter.opts, *parameter.secondary_opts]
    line = "/".join(names) if parameter.param_type_name == "option" else str(parameter.name).upper()
    if isinstance(parameter.type, click.Choice):
        line += f" {{{', '.join(map(str, parameter.type.choices))}}}"
    elif not getattr(parameter, "is_flag", False):
        line += f" {parameter.type.name}"
    if isinstance(parameter.default, str | int | float) and not isinstance(parameter.default, bool):
        line += f" = {parameter.default}"
    marks = [word for word in ("required", "multiple", "hidden") if getattr(parameter, word, False)]
    marks += ["several"] if parameter.nargs == -1 else []
    if isinstance(parameter.type, RegistryChoice):
        marks += [f"{old} means {new}" for old, new in parameter.type.renamed.items()]
    return f"    {line}{': ' if marks else ''}{', '.join(marks)}"


def command_line(command: click.Command = main, name: str = "shiradelta") -> Iterator[str]:
    """Each command with its arguments and options."""
    yield name + (" (hidden)" if command.hidden else "")
    yield from map(option, command.params)
    for each, inner in sorted(getattr(command, "commands", {}).items()):
        yield from command_line(inner, f"{name} {each}")


def c_functions() -> Iterator[str]:
    """Each function of the C header, as it is declared."""
    header = (ROOT / "libshd" / "include" / "shd.h").read_text(encoding="utf-8")
    for declaration in re.findall(r"^SHD_API ([^;#]*;)", header, re.MULTILINE):
        yield " ".join(declaration.split())


#: File -> what is in it.
SNAPSHOTS: dict[Path, Callable[[], Iterator[str]]] = {
    Path(__file__).with_name("api.txt"): api,
    Path(__file__).with_name("cli.txt"): command_line,
    Path(__file__).with_name("c.txt"): c_functions,
}
