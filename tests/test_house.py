"""The tree keeps its own rules: layers, public names, documents that say what the code does."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from types import FunctionType

import pytest

import shiradelta
from shiradelta.util.registry import Registry

ROOT = Path(__file__).parent.parent
PACKAGES = ("shiradelta", "converters")


def layers() -> list[set[str]]:
    """Each folder imports only from those before it; CONTRIBUTING.md draws them as `a, b <- c <- ...`."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    drawn = re.search(r"^    (errors.*?)\n\n", text, re.DOTALL | re.MULTILINE)
    assert drawn is not None
    return [{name.strip() for name in layer.split(",")} for layer in drawn[1].split("<-")]


@cache
def sources() -> dict[str, Path]:
    """Module -> its file; `converters/` is `shiradelta.converters`."""
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            parts = list(path.relative_to(ROOT).with_suffix("").parts)
            parts = (["shiradelta"] if package == "converters" else []) + parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    found["shiradelta.converters"] = ROOT / "converters" / "__init__.py"
    return found


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(sources()[module].read_text())


@cache
def nodes(module: str) -> list[ast.AST]:
    return list(ast.walk(tree(module)))


def statements(outer: ast.AST) -> Iterator[ast.stmt]:
    """All statements within a node; expressions, in which no statement is, are passed over."""
    for name in ("body", "handlers", "orelse", "finalbody", "cases"):
        for inner in getattr(outer, name, ()):
            if isinstance(inner, ast.stmt):
                yield inner
            yield from statements(inner)


@cache
def imports(module: str) -> set[str]:
    """The project's modules that a module imports at any depth, but for names that only a type checker needs."""
    every = sources()
    package = module if every[module].name == "__init__.py" else module.rpartition(".")[0]
    hidden = {
        id(inner)
        for node in statements(tree(module))
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in statements(node)
    }
    found = set()
    for node in statements(tree(module)):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {full if (full := f"{base}.{alias.name}") in every else base for alias in node.names}
    return found & set(every)


def member(module: str) -> str:
    """The file or folder directly under the package."""
    return [*module.split("."), "shiradelta"][1]


def test_every_folder_has_its_layer():
    assert {member(module) for module in sources()} - {"shiradelta", "__main__", "_moved"} == set().union(*layers())


def test_a_layer_imports_only_what_stands_before_it():
    levels = {name: level for level, layer in enumerate(layers()) for name in layer}
    for module in sources():
        name = member(module)
        if name in levels:
            allowed = set().union(*layers()[: levels[name]]) | {name, "shiradelta"}
            found = {member(other) for other in imports(module)}
            assert found <= allowed, f"{module}: {sorted(found - allowed)}"


def test_no_circle_of_imports():
    graph = {module: imports(module) - {module, "shiradelta"} for module in sources() if module != "shiradelta"}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in graph[module]:
                visit(other, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_few_modules_stand_at_the_top():
    assert len(list((ROOT / "shiradelta").glob("*.py"))) <= 7
    for folder, names, files in os.walk(ROOT):
        if Path(folder) == ROOT:
            names[:] = [name for name in names if not name.startswith(".") and name != "build"]
        assert not [name for name in names + files if os.path.islink(os.path.join(folder, name))], folder


def test_init_files_only_name_what_is_inside():
    for path in [*(ROOT / "shiradelta").rglob("__init__.py"), ROOT / "converters" / "__init__.py"]:
        assert path.parent.name == "shiradelta" or len(path.read_text().splitlines()) <= 60, path


def test_public_names_are_few_and_there():
    errors = {name for name in shiradelta.__all__ if name.endswith("Error")}
    assert errors == {name for name in vars(import_module("shiradelta.errors")) if name.endswith("Error")}
    assert len(set(shiradelta.__all__) - errors) <= 15
    for name in shiradelta.__all__:
        assert getattr(shiradelta, name).__doc__


def test_files_are_short_enough_to_hold_in_the_head():
    for package in ("shiradelta", "converters"):
        for path in (ROOT / package).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 450, path


def test_nothing_is_evaluated_unpickled_or_fetched():
    """Files are data, extensions are what users import, only huggingface_hub and fsspec read from the network."""
    refused = {"pickle", "marshal", "shelve", "socket", "urllib", "http", "requests", "subprocess", "runpy"}
    for module in sources():
        for node in nodes(module):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
                assert not {name.partition(".")[0] for name in names} & refused, module
                assert "entry_points" not in names, module
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec", "compile", "__import__"), module


def test_class_names_are_unique():
    """A name says what a class is without the module that it stands in; private ones count, too."""
    homes: dict[str, list[str]] = {}
    for module in sources():
        for node in nodes(module):
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name, []).append(module)
    assert {name: modules for name, modules in homes.items() if len(modules) > 1} == {}


def test_registries_refuse_unknown_names_with_a_list_of_the_known_ones():
    registries = {
        id(value): value
        for module in sources()
        if not module.endswith("__main__")
        for value in vars(import_module(module)).values()
        if isinstance(value, Registry)
    }
    assert registries
    for registry in registries.values():
        with pytest.raises(shiradelta.ArgumentError) as caught:
            registry.find("nothing of this name")
        assert registry.kind in str(caught.value)
        assert all(name in str(caught.value) for name in registry)


def test_operations_are_asked_by_their_rows_and_never_compared_by_name():
    """A new operation then needs its row in `OPERATIONS` only: code asks `.operation.adds`, `.creates`, `.removes`."""
    for module in sources():
        for node in nodes(module):
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                named = any(isinstance(side, ast.Attribute) and side.attr == "op" for side in sides)
                literal = any(isinstance(inner, ast.Constant) for side in sides for inner in ast.walk(side))
                assert not (named and literal), f"{module}, line {node.lineno}: {ast.unparse(node)}"


def test_public_methods_are_documented_where_they_are_introduced():
    """An override says something only where it differs."""
    for module in sources():
        if module in ("shiradelta.__main__", "shiradelta.cli.__main__"):
            continue
        for kind in vars(import_module(module)).values():
            if not isinstance(kind, type) or kind.__module__ != module or kind.__name__.startswith("_"):
                continue
            for name, method in vars(kind).items():
                documented = isinstance(method, FunctionType | property | classmethod | staticmethod)
                if name.startswith("_") or not documented or getattr(method, "__name__", "") == "<lambda>":
                    continue
                found = [vars(base)[name] for base in kind.__mro__ if name in vars(base)]
                assert any(one.__doc__ for one in found), f"{module}.{kind.__name__}.{name}"


#: The pages whose examples go on from each other, from README's files.
GUIDE = ("README.md", "docs/convert.md", "docs/python.md", "docs/train.md", "docs/combine.md")


def guide_blocks(language: str) -> list[str]:
    text = "\n".join((ROOT / page).read_text() for page in GUIDE)
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_readme_python_runs(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The examples as they stand, one after the other, in a folder with the files that they name."""
    import shutil

    monkeypatch.chdir(tmp_path)
    shutil.copytree(made / "bf16", "model")
    shutil.copytree(made / "tuned_a", "tuned")
    for name in ("style.shd", "tuned.shd"):
        shutil.copy(made / "a.shd", name)
    blocks = guide_blocks("python")
    assert blocks
    scope: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "guide", "exec"), scope)


def test_choices_of_the_command_line_are_where_options_say():
    from shiradelta.cli import main
    from shiradelta.cli.options import RegistryChoice

    types = {id(option.type): option.type for each in main.commands.values() for option in each.params}
    found = [kind for kind in types.values() if isinstance(kind, RegistryChoice)]
    assert len(found) >= 5
    for choice in found:
        assert choice.choices, choice.path
        assert not set(choice.renamed) & set(choice.choices), choice.path
        assert set(choice.renamed.values()) <= set(choice.choices), choice.path


def test_readme_commands_exist():
    from shiradelta.cli import main

    lines = [line for block in guide_blocks("sh") for line in block.splitlines()]
    used = {line.split()[1] for line in lines if line.startswith("shiradelta ")}
    assert used == set(main.commands)
    targets = {line.split()[1] for line in lines if line.startswith("make ")}
    makefile = (ROOT / "Makefile").read_text()
    assert {"demo", "test"} <= targets
    assert all(f"\n{target}:" in makefile for target in targets)


def test_readme_is_short_and_its_links_work_elsewhere():
    """The package index shows it, too, where relative links lead nowhere."""
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 900
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert all(link.startswith("https://") for link in links)
    here = "https://github.com/shiradelta/shiradelta/blob/main/"
    for link in links:
        if link.startswith(here):
            assert (ROOT / link.removeprefix(here).partition("#")[0]).exists(), link


def test_links_between_documents_lead_somewhere():
    """`make docs` says so of those between pages of the site, and knows no file of the tree that is none."""
    here = "https://github.com/shiradelta/shiradelta/blob/main/"
    for path in [*ROOT.glob("*.md"), *(ROOT / "spec").glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text()):
            inside = (ROOT if target.startswith(here) else path.parent) / target.removeprefix(here)
            assert ":" in target.removeprefix(here) or inside.exists(), f"{path.name}: {target}"


def test_changelog_has_the_version():
    from importlib.metadata import version

    assert f"## {version('shiradelta')}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_hub_is_asked_in_few_modules():
    asking = {module for module, path in sources().items() if "from huggingface_hub import" in path.read_text()}
    assert asking == {"shiradelta.io.download", "shiradelta.publish.card", "shiradelta.publish.push"}
