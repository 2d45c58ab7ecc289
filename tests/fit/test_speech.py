"""Fits and training of a model that hears, from sounds and their texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from scipy.io import wavfile

import shiradelta
from shiradelta.cli import main
from shiradelta.errors import SourceError
from shiradelta.fit import Fit
from shiradelta.fit.training import FitTrainer
from tests.speech import RATE, write_pair

Folders = tuple[Path, Path, Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return write_pair(tmp_path_factory.mktemp("speech"))


def fit(made: Folders, out: Path, **settings: Any) -> Any:
    options = {"texts": made[2], "batch": 12, "held_out": 12, "steps": 20, "device": "cpu", **settings}
    return shiradelta.convert(made[1], out, 0.1, made[0], fit=Fit(**options)).fit


@pytest.mark.parametrize("method", ["refit", "train"])
def test_it_comes_closer_than_the_largest_changes(made: Folders, method: str, tmp_path: Path):
    found = fit(made, tmp_path / "a.shd", method=method)
    assert found.fitted < 0.7 * found.topk < found.topk < found.base
    assert found.gain.measure == "nats per token that counts"
    assert found.gain.kept.kept > found.gain.shares["topk"].kept


@pytest.mark.slow
def test_from_the_command_line(made: Folders, tmp_path: Path):
    base, tuned, heard = map(str, made)
    out, trained = str(tmp_path / "a.shd"), str(tmp_path / "b.shd")
    words = ["convert", tuned, "--base", base, "--sparsity", "10%", "--fit", heard, "--fit-batch", "12", "-o", out]
    result = CliRunner().invoke(main, [*words, "--fit-method", "refit"])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(main, [*words, "--fit-generate", "5", "--fit-method", "refit"])
    assert result.exit_code == 1
    assert "no texts are generated for WhisperForConditionalGeneration" in " ".join(result.stderr.split())
    words = ["train", base, "--texts", heard, "--sparsity", "10%", "--steps", "20", "--batch", "12", "-o", trained]
    result = CliRunner().invoke(main, [*words, "--relative-lr", "0.2", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["after"] < 0.97 * report["before"]


@pytest.mark.slow
def test_a_run_goes_on_only_with_the_sounds_it_began_with(
    made: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("shiradelta.nonzeros.unfinished.SAVE_EVERY", -1)
    step, told = FitTrainer.step, list[str]()

    def stop(self: Any, batch: list[int]) -> Any:
        if self.state.step == 12:
            raise KeyboardInterrupt
        return step(self, batch)

    monkeypatch.setattr(FitTrainer, "step", stop)
    for message in ("goes on from step 12", "belongs to a run with other settings or inputs"):
        with pytest.raises(KeyboardInterrupt):
            fit(made, tmp_path / "a.shd", mask="prune", log=told.append)
        assert any(message in line for line in told)
        clip, told = made[2].parent / "clips" / "3.wav", []
        before = clip.read_bytes()
        wavfile.write(clip, RATE, np.zeros(RATE // 2, np.int16))
    clip.write_bytes(before)


@pytest.mark.slow
def test_sounds_are_no_examples_without_an_extractor(made: Folders, tmp_path: Path):
    extractor = made[0] / "preprocessor_config.json"
    held = extractor.read_text()
    extractor.unlink()
    try:
        with pytest.raises(SourceError, match="has no preprocessor_config"):
            fit(made, tmp_path / "a.shd")
    finally:
        extractor.write_text(held)
