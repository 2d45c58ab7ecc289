"""`shiradelta train` of encoder-decoders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import shiradelta
from shiradelta.cli import main
from shiradelta.errors import SourceError
from shiradelta.experts import prompt_loss
from shiradelta.models.loading import load_tokenizer
from shiradelta.train.run import run
from shiradelta.train.settings import TrainSettings
from tests.seq2seq import build, examples, write_tokenizer
from tests.train.test_run import interrupted

pytestmark = pytest.mark.slow

SETTINGS = TrainSettings(sparsity=0.1, steps=20, batch=12, relative_lr=0.4, tokens=16)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for kind in ("t5", "bart"):
        build(kind).save_pretrained(root / kind)
        write_tokenizer(kind, root / kind)
    return root


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in examples(60)))
    return path


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_it_learns_and_the_file_fits_the_folder(kind: str, folders: Path, answers: Path, tmp_path: Path):
    """With a learning rate that it finds itself."""
    told: list[str] = []
    settings = TrainSettings(**{**vars(SETTINGS), "relative_lr": None})
    report = run(folders / kind, answers, tmp_path / "task.shd", settings, "cpu", log=told.append)
    assert report.after < 0.97 * report.before
    assert sum("learning rate" in line for line in told) > 2
    shiradelta.apply(folders / kind, tmp_path / "task.shd", out=tmp_path / "patched")
    assert shiradelta.verify(folders / kind, tmp_path / "task.shd").state == "base"


def test_an_interrupted_run_goes_on_exactly(
    folders: Path, answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = TrainSettings(**{**vars(SETTINGS), "values": "f32"})
    run(folders / "bart", answers, tmp_path / "whole.shd", settings, "cpu")
    told: list[str] = []
    with interrupted(monkeypatch, 11):
        run(folders / "bart", answers, tmp_path / "task.shd", settings, "cpu", log=told.append)
    assert "goes on from step 11" in told[-1]
    run(folders / "bart", answers, tmp_path / "task.shd", settings, "cpu", log=told.append)
    assert (tmp_path / "task.shd").read_bytes() == (tmp_path / "whole.shd").read_bytes()


def test_the_command(folders: Path, answers: Path, tmp_path: Path):
    command = ["train", str(folders / "t5"), "--texts", str(answers), "-o", str(tmp_path / "task.shd")]
    result = CliRunner().invoke(main, [*command, "--steps", "3", "--batch", "8", "--sparsity", "0.1", "--accept-worse"])
    assert result.exit_code == 0, result.output
    (tmp_path / "texts.jsonl").write_text((json.dumps({"text": "w1 w2"}) + "\n") * 12)
    command[3] = str(tmp_path / "texts.jsonl")
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1
    assert 'give {"prompt": "...", "completion": "..."}' in " ".join(result.output.split())


def test_prompts_are_not_routed(folders: Path):
    with pytest.raises(SourceError, match="predicts no prompts, so that none can be routed"):
        prompt_loss(load_tokenizer(folders / "t5"))(build("t5"), ["w1 w2"])
