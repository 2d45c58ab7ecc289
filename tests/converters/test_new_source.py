"""docs/extend/source.md: a source layout is added from outside the package, and `convert` and the rest know it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import shiradelta
from shiradelta.cli import main
from shiradelta.converters import SOURCES, Source, SourceFiles, kinds, source
from shiradelta.errors import ArgumentError, SourceError
from tests.conftest import SHAPES, random_tensors, write_lora, write_model
from tests.converters.test_convert import MODULES, stored, top

HOW_TO = Path(__file__).parents[2] / "docs" / "extend" / "source.md"
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def added() -> Iterator[None]:
    """Takes out what a test has added."""
    before = set(SOURCES)
    yield
    for name in set(SOURCES) - before:
        SOURCES.remove(name)


def how_to() -> str:
    blocks = re.findall(r"```python\n(.*?)```", HOW_TO.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 1
    return str(blocks[0])


def test_the_how_to_is_short():
    assert len(how_to().splitlines()) <= 40


@pytest.mark.usefixtures("added")
def test_the_how_to_converts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model", random_tensors(torch.bfloat16))
    generator = np.random.default_rng(0)
    changes = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    np.savez("change.npz", **changes)
    exec(compile(how_to(), str(HOW_TO), "exec"), {})
    for name, change in changes.items():
        kept = set(np.flatnonzero(stored(tmp_path / "change.shd", name)).tolist())
        assert kept <= top(change, change.size // 2)  # int4 rounds some to zero
        assert len(kept) > change.size // 3
    assert shiradelta.verify("model", "change.shd")
    assert kinds()[1] == "npz"

    np.savez("more.npz", **{UP: changes[UP], "elsewhere": changes[UP], "model.embed_tokens.weight": np.ones((2, 2))})
    refused = CliRunner().invoke(main, ["convert", "more.npz", "--kind", "npz", "--base", "model"])
    assert refused.exit_code == 1
    assert "2 tensors cannot be converted: elsewhere: " in refused.output
    skip = ["--skip", "elsewhere", "--skip", "*embed*"]
    found = CliRunner().invoke(main, ["convert", "more.npz", "--kind", "npz", "--base", "model", *skip])
    assert found.exit_code == 0, found.output
    assert "elsewhere" in found.output
    assert "its shape is [2, 2]" in found.output
    assert "npz" in CliRunner().invoke(main, ["convert", "--help"]).output
    with pytest.raises(ArgumentError, match=r"alpha is an option of .*lora, and more\.npz is of kind npz"):
        shiradelta.convert("more.npz", base="model", alpha=2.0)
    with pytest.raises(SourceError, match="--base MODEL"):
        shiradelta.convert("more.npz")


@pytest.mark.usefixtures("added")
def test_layouts_are_asked_in_their_order_and_given_only_their_options(tmp_path: Path):
    asked: list[str] = []

    def layout(name: str, order: int, answer: bool, options: tuple[str, ...] = ()) -> None:
        def recognises(files: SourceFiles) -> bool:
            asked.append(name)
            return answer

        @source(name, "A test's.", recognises, order=order, options=options)
        def open_it(files: SourceFiles, **given: object) -> Source:
            return Source(warnings=[f"{name}: {given}"])

    own = kinds()[1:]
    layout("last", 1000, True)
    layout("second", 2, True, options=("alpha",))
    layout("first", 1, False)
    lora = write_lora(tmp_path / "lora", MODULES, {"lora_alpha": 8})
    with pytest.raises(SourceError, match="nothing in it can be converted"):
        shiradelta.convert(lora, alpha=2.0)
    assert asked == ["first", "second"]
    assert kinds() == ("auto", "first", "second", *own, "last")
    with pytest.raises(ArgumentError, match=r"alpha is an option of second, .*lora, and .* is of kind last"):
        shiradelta.convert(lora, kind="last", alpha=2.0)


def test_what_no_layout_recognises_is_refused_by_name(tmp_path: Path):
    own = ", ".join(kinds()[1:])
    with pytest.raises(SourceError, match=rf"none of {own}; .*--kind diff; .*--base MODEL"):
        shiradelta.convert(write_model(tmp_path / "model", random_tensors(torch.bfloat16)))
    with pytest.raises(ArgumentError, match=f"kind 'other' is unknown; take auto, {own}"):
        shiradelta.convert(tmp_path, kind="other")


@pytest.mark.usefixtures("added")
def test_names_are_not_given_twice():
    for name, message in (("lora", "registered already"), ("auto", "stands for all layouts")):
        with pytest.raises(ArgumentError, match=message):
            source(name, "Again.", lambda files: False)(lambda files: Source())


def test_no_two_layouts_are_asked_in_the_order_of_their_imports():
    orders = [layout.order for layout in SOURCES.values()]
    assert len(set(orders)) == len(orders)


@pytest.mark.parametrize("name", SOURCES)
def test_every_layout_says_what_it_reads(name: str):
    assert SOURCES[name].help.endswith(".")


def test_names_of_the_last_release_are_still_there():
    import shiradelta.converters as converters

    with pytest.warns(DeprecationWarning, match="ConversionReport"):
        assert converters.Report is converters.ConversionReport
    with pytest.warns(DeprecationWarning, match=r"kinds\(\)"):
        assert set(converters.KINDS) == set(kinds())
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        _ = converters.Other
