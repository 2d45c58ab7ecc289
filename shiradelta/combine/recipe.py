"""Recipes: what `fuse` is to do, as a YAML file.  Its keys are the arguments of `fuse`."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shiradelta.combine.methods import METHODS, unused_options
from shiradelta.errors import SourceError
from shiradelta.util.optional import importing
from shiradelta.util.text import parse_share

#: Key -> what it has to be, and how it is read.
_KEYS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "deltas": ("a mapping of files to strengths", lambda value: _mapping(value, _strength)),
    "method": ("a merge method", lambda value: _of(str, value)),
    "values": ("a value codec", lambda value: _of(str, value)),
    "density": ("a share such as 1%", lambda value: _share(value)),
    "drop": ("a share such as 50%", lambda value: _share(value)),
    "seed": ("a whole number", lambda value: _of(int, value)),
    "base": ("a model's folder or file", lambda value: _of(str, value)),
}
#: A recipe is a page or so.
_MOST_BYTES = 1 << 20


def read_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The arguments for `fuse` that a recipe names.  Paths in it are relative to the current folder.

    Raises:
        SourceError: it cannot be read, is not YAML, or has a key or a value that `fuse` does not know.
        ArgumentError: its method is unknown.
        MissingDependencyError: PyYAML is not installed.
    """
    label = os.fspath(path)
    found = _parsed(Path(path), label)
    if not isinstance(found, dict):
        raise SourceError(f"{label}: is not a mapping; write `deltas:` and the options of fuse, a line each")
    arguments = {}
    for key, value in found.items():
        if key not in _KEYS:
            near = difflib.get_close_matches(str(key), _KEYS, 1)
            meant = f"; did you mean {near[0]!r}?" if near else f"; take {', '.join(_KEYS)}"
            raise SourceError(f"{label}: key {key!r} is unknown{meant}")
        what, read = _KEYS[key]
        try:
            arguments[key] = read(value)
        except (TypeError, ValueError):
            raise SourceError(f"{label}: {key} is {value!r}; give {what}") from None
    method = METHODS.find(arguments.get("method", "sum"))
    if unused := [key for key in arguments if key in unused_options(method.name)]:
        raise SourceError(f"{label}: {unused[0]} means nothing to method {method.name}; leave it out")
    if not arguments.get("deltas"):
        raise SourceError(f"{label}: names nothing to fuse; list the files under `deltas:`, each with its strength")
    return arguments


def _parsed(path: Path, label: str) -> Any:
    """What a file of YAML holds, if no key stands in it twice.

    Raises:
        SourceError: it cannot be read, or is not such a file.
    """
    with importing("a recipe"):
        import yaml

    loader_kind: Any = type("Loader", (yaml.SafeLoader,), {})  # plain data, and no key twice: the first would be lost

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        loader.flatten_mapping(node)
        keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", node.start_mark)
        return dict(loader.construct_mapping(node, deep=True))

    loader_kind.add_constructor("tag:yaml.org,2002:map", mapping)
    try:
        with open(path, "rb") as stream:
            content = stream.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise SourceError(f"{label}: is larger than any recipe; give a YAML file with `deltas:`")
        return yaml.load(content, loader_kind)
    except OSError as error:
        raise SourceError(f"{label}: cannot be read ({error.strerror}); check the path") from None
    except yaml.MarkedYAMLError as error:
        where = f", line {error.problem_mark.line + 1}" if error.problem_mark is not None else ""
        raise SourceError(f"{label}{where}: is not YAML that can be read ({error.problem}); correct it") from None
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:
        raise SourceError(f"{label}: is not YAML that can be read ({type(error).__name__}); correct it") from None


def _of(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError
    return value


def _share(value: Any) -> float:
    return parse_share(value) if isinstance(value, str) else _number(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError
    return float(value)


def _strength(value: Any) -> float | dict[str, float]:
    return _mapping(value, _number) if isinstance(value, Mapping) else _number(value)


def _mapping(value: Any, read: Callable[[Any], Any]) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError
    return {key: read(one) for key, one in value.items()}
