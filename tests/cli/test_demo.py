"""`shiradelta demo`: what it prints was run, what it says of the files holds, and they are a model and a LoRA."""

from __future__ import annotations

import hashlib
import json
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

import shiradelta as sd
from shiradelta.cli import main
from shiradelta.cli.demo import STEPS
from shiradelta.models.tiny import LLAMA, RANK, TARGETS, write_lora, write_model


def test_the_demo_runs_every_step_and_leaves_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["demo", "--keep", "tiny"])
    assert result.exit_code == 0, result.output
    assert [line for line in result.output.splitlines() if line.startswith("$ ")] == [
        f"$ shiradelta {s}" for s in STEPS
    ]
    assert "patched: exactly lora.shd" in result.output
    assert "took out lora.shd, bit for bit" in result.output
    assert Path.cwd() == tmp_path
    weights = (tmp_path / "tiny/model/model.safetensors").read_bytes()
    assert f"{hashlib.sha256(weights).hexdigest()[:16]}... reverted" in result.output
    assert len(weights) < 250_000
    with sd.open_delta("tiny/lora.shd") as delta:
        assert len(delta) == len(TARGETS) * LLAMA["num_hidden_layers"]


def test_the_demo_alone_leaves_nothing_and_prints_json_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    result = CliRunner().invoke(main, ["demo", "--json"])
    about = json.loads(result.stdout)
    assert about["base"] == about["reverted"] != about["patched"]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_refused(tmp_path: Path):
    result = CliRunner().invoke(main, ["demo", "--keep", str(tmp_path)])
    assert (result.exit_code, result.output) == (1, f"error: {tmp_path}: is there already; name a new folder\n")


def test_a_step_that_fails_ends_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shiradelta.cli.demo.STEPS", ("verify lora", *STEPS))
    result = CliRunner().invoke(main, ["demo"])
    assert result.exit_code == 1
    assert shlex.split(result.output.splitlines()[-1])[0] == "error:"


@pytest.mark.filterwarnings("ignore")
def test_transformers_and_peft_take_the_files(tmp_path: Path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    write_model(tmp_path / "model")
    write_lora(tmp_path / "lora", "model")
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(report.values())
    tuned = PeftModel.from_pretrained(model, str(tmp_path / "lora"))
    assert tuned.peft_config["default"].r == RANK
    changed = [name for name, weight in tuned.named_parameters() if "lora_B" in name and bool(weight.any())]
    assert len(changed) == len(TARGETS) * LLAMA["num_hidden_layers"]
