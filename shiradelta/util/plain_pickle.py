"""Pickles of plain data: mappings with names, tuples, lists, texts, bytes and whole numbers.

A pickle is a program.  This reader runs the part of its language that puts such data together, in which nothing can be
called or imported, and refuses the rest.  What a pickle would import or call can be taken for what it is called.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shiradelta.util.text import brief

_PROTOCOL = 4
_MOST_OPCODES = 100_000
#: Opcodes whose argument is the value.
_VALUES = {
    *("BININT", "BININT1", "BININT2", "LONG1"),
    *("SHORT_BINUNICODE", "BINUNICODE", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
}
_EMPTY: dict[str, type[Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True)
class PickledName:
    """What a pickle would import: "module name"."""

    name: str


@dataclass(eq=False)
class PickledObject:
    """What a pickle would call, with what, and the state that it would give the result."""

    name: str
    arguments: tuple[Any, ...]
    state: Any = None


def read_plain(raw: bytes, names: Callable[[str], bool] | None = None, most: int = _MOST_OPCODES) -> Any:
    """What a pickle of plain data holds.

    Args:
        raw: the pickle.
        names: whether what it would import, "module name", is taken for a `PickledName`, and what is made by that for a
            `PickledObject`; None if it has to be plain data.
        most: the most steps of its program.

    Raises:
        ValueError: it is none, or is damaged.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    try:
        for number, (opcode, argument, place) in enumerate(pickletools.genops(raw)):
            name = opcode.name
            if number > most:
                raise ValueError("its program is huge")
            if names is not None and _run_object(name, argument, stack, names):
                continue
            if name == "STOP":
                if place != len(raw) - 1 or len(stack) != 1 or marks:
                    raise ValueError("it goes on after its end")
                return stack[0]
            _run(name, argument, stack, marks, memo)
    except (IndexError, KeyError, TypeError, AttributeError, OverflowError, UnicodeDecodeError) as error:
        raise ValueError(f"a pickle that is damaged ({brief(str(error), 80)})") from None
    raise ValueError("a pickle without an end")


def _run(name: str, argument: Any, stack: list[Any], marks: list[int], memo: dict[int, Any]) -> None:
    """One opcode.

    Raises:
        ValueError: it is not one of plain data.
    """
    if name in _VALUES:
        stack.append(argument)
    elif name in _EMPTY:
        stack.append(_EMPTY[name]())
    elif name == "NONE":
        stack.append(None)
    elif name == "MARK":
        marks.append(len(stack))
    elif name in _TUPLES:
        stack[-_TUPLES[name] :] = [tuple(stack[-_TUPLES[name] :])] if len(stack) >= _TUPLES[name] else []
    elif name == "TUPLE":
        stack.append(tuple(_since_mark(stack, marks)))
    elif name in ("SETITEM", "SETITEMS"):
        items = _since_mark(stack, marks) if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
        _set(stack[-1], items)
    elif name in ("APPEND", "APPENDS"):
        items = _since_mark(stack, marks) if name == "APPENDS" else [stack.pop()]
        _list(stack[-1]).extend(items)
    elif name == "MEMOIZE":
        memo[len(memo)] = stack[-1]
    elif name in ("BINPUT", "LONG_BINPUT"):
        memo[argument] = stack[-1]
    elif name in ("BINGET", "LONG_BINGET"):
        stack.append(memo[argument])
    elif name not in ("PROTO", "FRAME"):
        raise ValueError(f"a pickle of more than plain data ({name})")


def _run_object(name: str, argument: Any, stack: list[Any], names: Callable[[str], bool]) -> bool:
    """One opcode that plain data do not have; whether it is one.

    Raises:
        ValueError: it imports what it must not, or calls something else than that.
    """
    if name in ("NEWTRUE", "NEWFALSE"):
        stack.append(name == "NEWTRUE")
    elif name in ("GLOBAL", "STACK_GLOBAL"):
        whole = argument if name == "GLOBAL" else " ".join([stack.pop(-2), stack.pop()])
        if not names(whole):
            raise ValueError(f"a pickle that names {brief(whole.replace(' ', '.'), 80)}")
        stack.append(PickledName(whole))
    elif name in ("NEWOBJ", "REDUCE"):
        called, arguments = stack.pop(-2), stack.pop()
        if type(called) is not PickledName or type(arguments) is not tuple:
            raise ValueError("a pickle that calls no name")
        stack.append(PickledObject(called.name, arguments))
    elif name == "BUILD":
        state = stack.pop()
        if type(stack[-1]) is not PickledObject:
            raise ValueError("a pickle that gives a state to no object")
        stack[-1].state = state
    else:
        return False
    return True


def _since_mark(stack: list[Any], marks: list[int]) -> list[Any]:
    start = marks.pop()
    found = stack[start:]
    del stack[start:]
    return found


def _list(value: Any) -> list[Any]:
    if type(value) is not list:
        raise ValueError("a pickle that appends to no list")
    return value


def _set(mapping: Any, items: list[Any]) -> None:
    if type(mapping) is not dict or len(items) % 2:
        raise ValueError("a pickle that sets items of no mapping")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | PickledObject) or key in mapping:
            raise ValueError(f"a mapping with {brief(repr(key), 40)} twice, or for a name")
        mapping[key] = value


def write_plain(value: Any) -> bytes:
    """A pickle of plain data, which `pickle.loads` reads.

    Raises:
        TypeError: it is no plain data.
    """
    return bytes([0x80, _PROTOCOL]) + b"".join(_opcodes(value)) + b"."


def _opcodes(value: Any) -> list[bytes]:
    if type(value) is dict:
        return [b"}(", *(code for item in value.items() for each in item for code in _opcodes(each)), b"u"]
    if type(value) is tuple:
        return [b"(", *(code for each in value for code in _opcodes(each)), b"t"]
    if type(value) is int:
        if -(1 << 31) <= value < 1 << 31:
            return [b"J" + struct.pack("<i", value)]
        raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return [b"\x8a" + bytes([len(raw)]) + raw]
    if type(value) is str:
        raw = value.encode()
        return [b"X" + struct.pack("<I", len(raw)) + raw]
    if type(value) is bytes:
        return [b"\x8e" + struct.pack("<Q", len(value)) + value]
    raise TypeError(f"{type(value).__name__} is no plain data")
