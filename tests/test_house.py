"""The tree keeps its own rules: layers, public names, documents that say what the code does."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import shiradelta

ROOT = Path(__file__).parent.parent
#: Each imports only from what stands before it, or from its own group.
LAYERS = [
    {"errors", "wire", "files", "show"},
    {"arithmetic", "saved_state"},
    {"delta"},
    {"codecs", "digest"},
    {"header"},
    {"backend", "reference", "native"},
    {"reader", "writer"},
    {"checkpoint", "describe", "nonzeros", "patched", "pruning", "select", "spectrum"},
    {"fusion", "interference", "fit"},
    {"engine", "converters", "report"},
    {"train"},
    {"cli"},
]


def modules() -> dict[str, list[Path]]:
    """Layer member -> its files."""
    found = {path.stem: [path] for path in (ROOT / "shiradelta").glob("*.py") if path.stem != "__init__"}
    for package in ("codecs", "engine", "fit", "report", "train"):
        found[package] = list((ROOT / "shiradelta" / package).glob("*.py"))
    found["converters"] = list((ROOT / "converters").glob("*.py"))
    return found


def imports(path: Path) -> set[str]:
    """Members of the package that a file imports, at whatever depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").startswith("shiradelta"):
            parts = (node.module or "").split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return found


def test_every_module_has_its_layer():
    assert set(modules()) == set().union(*LAYERS)


@pytest.mark.parametrize("member", sorted(modules()))
def test_a_layer_imports_only_what_stands_before_it(member: str):
    level = next(i for i, layer in enumerate(LAYERS) if member in layer)
    allowed = set().union(*LAYERS[: level + 1])
    for path in modules()[member]:
        assert imports(path) <= allowed, path


def test_public_names_are_few_and_there():
    assert len(shiradelta.__all__) <= 12
    for name in shiradelta.__all__:
        assert getattr(shiradelta, name).__doc__


def test_files_are_short_enough_to_hold_in_the_head():
    for package in ("shiradelta", "converters"):
        for path in (ROOT / package).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 450, path


def readme_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_readme_python_runs(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The examples as they stand, one after the other, in a folder with the files that they name."""
    import shutil

    monkeypatch.chdir(tmp_path)
    shutil.copytree(made / "bf16", "model")
    shutil.copytree(made / "tuned_a", "tuned")
    shutil.copy(made / "a.shd", "style.shd")
    blocks = readme_blocks("python")
    assert blocks
    scope: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)


def test_readme_commands_exist():
    from shiradelta.cli import main

    lines = [line for block in readme_blocks("sh") for line in block.splitlines()]
    used = {line.split()[1] for line in lines if line.startswith("shiradelta ")}
    assert used == set(main.commands)
    targets = {line.split()[1] for line in lines if line.startswith("make ")}
    makefile = (ROOT / "Makefile").read_text()
    assert {"demo", "test"} <= targets
    assert all(f"\n{target}:" in makefile for target in targets)


def test_links_between_documents_lead_somewhere():
    for path in [*ROOT.glob("*.md"), *(ROOT / "spec").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_changelog_has_the_version():
    from importlib.metadata import version

    assert f"## {version('shiradelta')}" in (ROOT / "CHANGELOG.md").read_text()
