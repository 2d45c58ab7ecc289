"""Masks and methods are rows of registries: the command line, the help and the fit itself follow them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from shiradelta.cli import main
from shiradelta.errors import ArgumentError
from shiradelta.fit import MASKS, METHODS, Fit
from shiradelta.fit.choices import FitMask, FitMethod
from tests.fit.test_fit import SETTINGS, encoder, fit

__all__ = ["encoder"]


def option(name: str) -> Any:
    return next(option for option in main.commands["convert"].params if option.name == name)


@pytest.mark.parametrize(("name", "registry"), [("fit_mask", MASKS), ("fit_method", METHODS)])
def test_the_command_line_has_every_row_and_explains_it(name: str, registry: Any):
    assert tuple(option(name).type.choices) == tuple(registry)
    shown = " ".join(CliRunner().invoke(main, ["convert", "--help"]).output.split())
    for row in registry.values():
        assert f"{row.name} ({row.help})" in shown


@pytest.fixture
def added() -> Iterator[Callable[[Any, Any], None]]:
    """Adds rows to registries for one test."""
    rows: list[tuple[Any, str]] = []

    def add(registry: Any, row: Any) -> None:
        registry.add(row)
        rows.append((registry, row.name))

    yield add
    for registry, name in rows:
        registry.remove(name)


@pytest.mark.slow
def test_a_mask_of_ones_own(encoder: tuple[Path, Path], tmp_path: Path, added: Callable[[Any, Any], None]):
    """This one wants the first weights that changed."""

    def first(subject: Any) -> Callable[[int, torch.Tensor], torch.Tensor]:
        return lambda index, magnitude: -torch.arange(len(magnitude)).float() - 1e9 * (magnitude == 0)

    added(MASKS, FitMask("first", "the first ones", first))
    report = fit(encoder, tmp_path / "a.shd", mask="first", steps=1)
    import shiradelta

    with shiradelta.open_delta(tmp_path / "a.shd") as delta:
        for tensor in report.tensors:
            positions = delta[tensor.name].positions()
            assert positions.tolist() == list(range(len(positions)))


def test_a_method_of_ones_own(encoder: tuple[Path, Path], tmp_path: Path, added: Callable[[Any, Any], None]):
    """This one leaves top-k as it is."""

    def nothing(job: Any, subject: Any, nonzeros: Any, result: Any) -> None:
        nonzeros.write(nonzeros.values)

    added(METHODS, FitMethod("nothing", "not at all", nothing))
    report = fit(encoder, tmp_path / "a.shd", method="nothing", values="f32")
    assert report.fit.fitted == report.fit.topk


@pytest.mark.parametrize("settings", [{"mask": "x"}, {"method": "x"}])
def test_others_are_refused_by_name(settings: dict[str, str]):
    with pytest.raises(ArgumentError, match=r"'x' is unknown; take (refit|train), "):
        replace(SETTINGS, **settings)


@pytest.mark.parametrize("method", [row.name for row in METHODS.values() if not row.trains])
@pytest.mark.parametrize("mask", [row.name for row in MASKS.values() if row.begin == 1])
def test_a_method_that_finds_its_own_mask_takes_no_other(method: str, mask: str):
    with pytest.raises(ArgumentError, match="finds its own mask"):
        Fit([], method=method, mask=mask)
