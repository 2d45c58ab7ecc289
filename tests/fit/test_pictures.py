"""Fits and training of models that see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import shiradelta
from shiradelta.cli import main
from shiradelta.fit import Fit
from tests.pictures import write_pair

Folders = tuple[Path, Path, Path]


@pytest.fixture(scope="module", params=["clip", pytest.param("siglip", marks=pytest.mark.slow), "llava"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return write_pair(request.param, tmp_path_factory.mktemp(request.param))


def fit(made: Folders, out: Path, **settings: Any) -> Any:
    options = {"texts": made[2], "batch": 12, "held_out": 12, "steps": 20, "device": "cpu", **settings}
    return shiradelta.convert(made[1], out, 0.1, made[0], fit=Fit(**options)).fit


@pytest.mark.parametrize("method", ["refit", "train"])
def test_it_comes_closer_than_the_largest_changes(made: Folders, method: str, tmp_path: Path):
    found = fit(made, tmp_path / "a.shd", method=method)
    assert found.fitted < 0.8 * found.topk < found.topk < found.base
    sees = "llava" in str(made[0])
    assert found.measure == ("KL divergence of the output, nats" if sees else "relative error of the embeddings")
    expected = "nats per token that counts" if sees else "nats to find a text's partner among all held out"
    assert found.gain.measure == expected


@pytest.mark.slow
def test_from_the_command_line(made: Folders, tmp_path: Path):
    base, tuned, seen = map(str, made)
    out, trained = str(tmp_path / "a.shd"), str(tmp_path / "b.shd")
    words = ["convert", tuned, "--base", base, "--sparsity", "10%", "--fit", seen, "--fit-batch", "12", "-o", out]
    result = CliRunner().invoke(main, [*words, "--fit-method", "refit"])
    assert result.exit_code == 0, result.output
    assert "the model is loaded as a whole, for its examples have a picture each" in result.stderr
    result = CliRunner().invoke(main, [*words, "--fit-generate", "5", "--fit-method", "refit"])
    assert result.exit_code == 1
    words = ["train", base, "--texts", seen, "--sparsity", "10%", "--steps", "20", "--batch", "12", "-o", trained]
    result = CliRunner().invoke(main, [*words, "--relative-lr", "0.2", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["after"] < 0.97 * report["before"]
