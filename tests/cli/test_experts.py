"""`shiradelta experts`: a family from a folder and a file, and routes of prompts."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from transformers import AutoTokenizer, LlamaForCausalLM

import shiradelta
from shiradelta import experts
from shiradelta.cli import main
from shiradelta.experts.run import FamilyReport, _FamilyRun
from shiradelta.experts.training import FamilyTraining
from tests.fit.test_fit import WORDS, write_tokenizer
from tests.train.test_attach import llama

SHORT = ("--experts", "2", "--steps", "12", "--batch", "8", "--sparsity", "5%", "--dims", "64", "--relative-lr", "0.3")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["experts", *arguments], catch_exceptions=False)


def pairs(count: int) -> list[dict[str, str]]:
    """Of two kinds in turn, with words of their own."""
    rng, rows = random.Random(0), []
    for number in range(count):
        first = rng.randrange(25)
        words = [WORDS[(first + i) % 25 + 25 * (number % 2)] for i in range(4)]
        rows.append({"prompt": " ".join(words[:2]), "completion": " ".join(words[2:])})
    return rows


def write(path: str, rows: list[Any]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sklearn")
    root = tmp_path_factory.mktemp("families")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        llama(torch.bfloat16, vocab_size=100).save_pretrained("model")
        write_tokenizer(root / "model")
        write("data.jsonl", pairs(80))
        result = run("train", "model", "--texts", "data.jsonl", "-o", "family", "--longer", "one.shd", *SHORT)
    assert result.exit_code == 0, result.output
    (root / "said.txt").write_text(result.stdout)
    return root


@pytest.fixture
def folder(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(made)
    return made


@pytest.mark.slow
def test_training_says_what_the_family_is_worth(folder: Path):
    said = (folder / "said.txt").read_text()
    for what in ("base model", "base delta alone", "one delta trained as long", "family, each group"):
        assert what in said
    assert "route a prompt with: shiradelta experts route model family PROMPT" in said
    with shiradelta.open_delta("one.shd") as one, shiradelta.open_delta("family/base.shd") as base:
        assert one.digest != base.digest
    assert not Path("family.train").exists()


@pytest.mark.slow
def test_info_shows_the_members(folder: Path):
    found = json.loads(run("info", "family", "--json").stdout)
    assert [each["name"] for each in found["members"]] == ["base", "expert-0", "expert-1"]
    assert sum(each["examples"] for each in found["members"][1:]) == found["members"][0]["examples"] == 64
    assert "64 dimensions" in run("info", "family").stdout


@pytest.mark.slow
def test_a_route_is_the_routers_and_its_average_is_what_a_switch_gives(folder: Path):
    prompts = [" ".join(WORDS[:2]), " ".join(WORDS[30:32])]
    found = json.loads(run("route", "model", "family", *prompts, "--json", "-o", "average.shd").stdout)
    model = LlamaForCausalLM.from_pretrained("model", dtype=torch.bfloat16)
    loss = experts.prompt_loss(AutoTokenizer.from_pretrained("model"))
    router = experts.ExpertRouter(model, experts.open_family("family"), loss)
    for prompt, each in zip(prompts, found["prompts"], strict=True):
        assert each["prompt"] == prompt
        assert each["strengths"] == pytest.approx(router.route([prompt]), abs=1e-3)
    assert sum(found["together"].values()) == pytest.approx(1)
    router.swap.switch(found["together"])
    shiradelta.apply("model", "average.shd", out="patched")
    patched = LlamaForCausalLM.from_pretrained("patched", dtype=torch.bfloat16)
    for name, weight in patched.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name
    shown = run("route", "model", "family", prompts[0]).stdout.splitlines()
    assert shown[0].split() == ["prompt", "expert-0", "expert-1"]
    assert len(shown) == 3
    write("prompts.jsonl", [{"text": prompt} for prompt in prompts])
    again = json.loads(run("route", "model", "family", "--texts", "prompts.jsonl", "--json").stdout)
    assert again["prompts"] == found["prompts"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["base.shd", "expert-0.shd", "average.shd"])
def test_an_average_is_not_written_into_the_family(name: str, folder: Path):
    result = CliRunner().invoke(main, ["experts", "route", "model", "family", WORDS[0], "-o", f"family/{name}"])
    assert result.exit_code == 1
    assert "lies in the folder of the family" in result.stderr
    experts.open_family("family")


@pytest.mark.slow
def test_a_model_that_has_deltas_on_it_is_refused(folder: Path, tmp_path: Path):
    patched = str(tmp_path / "patched")
    shiradelta.apply("model", "family/expert-0.shd", out=patched)
    result = CliRunner().invoke(main, ["experts", "route", patched, "family", WORDS[0] + " " + WORDS[1]])
    assert result.exit_code == 1
    assert f"or take them out with `shiradelta revert {patched}`" in result.stderr


@pytest.mark.slow
def test_members_that_exist_become_a_family(folder: Path, tmp_path: Path):
    rows = pairs(20)
    write("a.jsonl", rows[::2])
    write("b.jsonl", rows[1::2][:3])
    own = [f"family/{name}.shd" for name in ("base", "expert-0", "expert-1")]
    out = str(tmp_path / "f")
    result = run("assemble", "model", *own, "--texts", "a.jsonl", "--texts", "b.jsonl", "-o", out, "--dims", "64")
    assert result.stdout == f"{out}: 2 experts, routed by 13 examples\n"
    family = experts.open_family(out)
    assert family.digests == experts.open_family("family").digests
    assert family.examples == (10, 3)


@pytest.mark.slow
def test_an_interrupted_run_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out, left = str(tmp_path / "f"), []
    arguments = ("train", "model", "--texts", "data.jsonl", "-o", out, *SHORT)
    expert = FamilyTraining.expert

    def interrupted(self: FamilyTraining, *given: Any) -> None:
        left.append(1)
        if len(left) == 2:
            raise KeyboardInterrupt
        expert(self, *given)

    monkeypatch.setattr(FamilyTraining, "expert", interrupted)
    result = CliRunner().invoke(main, ["experts", *arguments])
    assert result.exit_code == 1
    assert f"the same command goes on from what is in {out}.train" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.train"]
    monkeypatch.setattr(FamilyTraining, "expert", expert)
    monkeypatch.setattr("shiradelta.experts.training.measured", lambda *_: 1 // 0)  # features are there
    again = run(*arguments)
    assert f"base: going on from step 12 of 12, found in {out}.train" in again.stderr
    assert experts.open_family(out).digests == experts.open_family("family").digests
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f"]


@pytest.mark.slow
def test_a_family_that_is_worse_is_not_written_unless_asked_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "f"
    arguments = ("train", "model", "--texts", "data.jsonl", "-o", str(out), *SHORT)
    monkeypatch.setattr(_FamilyRun, "_losses", lambda *_: {"one_delta": 3.0, "longer": None, "after": 99.0})
    result = CliRunner().invoke(main, ["experts", *arguments])
    assert result.exit_code == 1
    assert "is worse than the base model on 16 examples held out" in result.stderr
    assert "--accept-worse" in result.stderr
    monkeypatch.setattr(_FamilyRun, "_losses", lambda *_: {"one_delta": 3.0, "longer": None, "after": math.nan})
    assert CliRunner().invoke(main, ["experts", *arguments]).exit_code == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.train"]
    assert run(*arguments, "--accept-worse").exit_code == 0
    assert out.is_dir()


def report(**losses: Any) -> FamilyReport:
    numbers = {"nnz": 1, "examples": 8, "held_out": 2, "steps": 4, "relative_lr": 0.1, "seconds": 1.0, "bytes": 9}
    return FamilyReport(out="f", experts={"expert-0": 8}, before=3.0, **numbers, **losses)


def test_what_is_better_than_the_family_is_said():
    assert report(one_delta=2.0, longer=None, after=1.9).warning is None
    assert "worse than its base delta" in str(report(one_delta=1.8, longer=None, after=1.9).warning)
    assert "worse than one delta trained as long" in str(report(one_delta=2.0, longer=1.7, after=1.9).warning)


def test_a_warning_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(
        "shiradelta.experts.run.run_family", lambda *_, **__: report(one_delta=1.8, longer=None, after=1.9)
    )
    result = run("train", "model", "--texts", "x.jsonl", "-o", str(tmp_path / "f"))
    assert result.stderr.startswith("warning: the family is worse than its base delta")
    assert "base delta alone" in result.stdout
    said = json.loads(run("train", "model", "--texts", "x.jsonl", "-o", str(tmp_path / "f"), "--json").stdout)
    assert said["warning"].startswith("the family is worse")


WRONG_ARGUMENTS = ("give prompts, or --texts FILE", "one of the two", "once for each expert")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["route", "model", "family"], "give prompts, or --texts FILE"),
        (["route", "model", "family", "a", "--texts", "x.jsonl"], "one of the two"),
        (["route", "model", "nowhere", "a"], "has no family.safetensors"),
        (["assemble", "model", "b.shd", "e.shd", "--texts", "a", "--texts", "b", "-o", "f"], "once for each expert"),
        (["train", "model", "--texts", "x.jsonl", "-o", "there"], "is there already"),
        (["train", "model", "--texts", "x.jsonl", "-o", "no/f"], "no such folder"),
        (["train", "model", "--texts", "x.jsonl", "-o", "f", "--longer", "f"], "is a folder of the family"),
        (["train", "model", "--texts", "x.jsonl", "-o", "f", "--longer", "./f.train"], "is a folder of the family"),
        (["info", "there"], "is no family of experts"),
    ],
)
def test_wrong_use_is_refused(arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    result = CliRunner().invoke(main, ["experts", *arguments])
    assert result.exit_code == (2 if message in WRONG_ARGUMENTS else 1)
    assert message in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.slow
def test_examples_without_a_prompt_are_refused(folder: Path, tmp_path: Path):
    write("talk.jsonl", [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 12)
    result = CliRunner().invoke(main, ["experts", "train", "model", "--texts", "talk.jsonl", "-o", str(tmp_path / "f")])
    assert result.exit_code == 1
    assert "no prompt to route by" in result.stderr or "chat template" in result.stderr
    assert not list(tmp_path.iterdir())
