"""The benchmark of families, with models and tasks small enough for a test."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from benchmarks.experts import __main__ as benchmark
from benchmarks.experts import measure, subjects
from benchmarks.quality import answers, real, small
from benchmarks.quality.compare import read
from benchmarks.quality.gemma import _words

VOCABULARY = 64


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> dict[str, dict[str, str]]:
    monkeypatch.setattr(measure, "TIMED", 2)
    given = [
        "--examples",
        "30",
        "--items",
        "4",
        "--steps",
        "20",
        "--experts",
        "2",
        "--seeds",
        "0",
        "--sparsity",
        "0.05",
    ]
    monkeypatch.setattr(sys, "argv", ["experts", str(folder), *given, *options])
    benchmark.main()
    rows = {row["method"]: row for row in read(folder / "experts.csv")}
    assert list(rows) == list(measure.METHODS)
    return rows


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_method_has_a_row_and_training_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("sklearn")
    words = {"words": lambda number: f"w{number}", "digits": lambda number: f"{number} {number + 1}"}
    pairs: dict[str, Any] = {
        name: [(word(number), word(number).upper() + "!") for number in range(60)] for name, word in words.items()
    }
    monkeypatch.setattr(subjects, "load", lambda task, held_out: (pairs[task], [], pairs[task]))
    monkeypatch.setattr(small, "PRETRAINING_STEPS", 2)
    monkeypatch.setattr(small, "FILES", 20)
    monkeypatch.setattr(small, "HELD_OUT", 8)
    rows = run(tmp_path, monkeypatch, "--tasks", "words", "digits")
    for name, row in rows.items():
        if name != "base model":
            assert float(row["words"]) < float(rows["base model"]["words"]), name
    monkeypatch.setattr(benchmark, "Experiment", lambda *_: 1 // 0)
    assert run(tmp_path, monkeypatch, "--tasks", "words", "digits") == rows


def write_gemma(folder: Path) -> None:
    """A folder as `python -m benchmarks.quality.gemma` makes one, with a tiny model and two tasks."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY,
        num_key_value_heads=1,
        head_dim=16,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
        **sizes,
    )
    Gemma3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "model")
    _words(VOCABULARY).save_pretrained(folder / "model")
    generator = random.Random(0)
    for first, kind in enumerate(("define", "code")):
        rows = []
        for _ in range(50):
            said = [4 + 30 * first + generator.randrange(30) for _ in range(5)]
            prompt, completion = ("".join(f"<{token}>" for token in part) for part in ([2, *said], said[:3]))
            rows.append(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
        (folder / f"{kind}.jsonl").write_text("".join(rows))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_real_language_model_runs_with_its_own_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(answers, "HELD_OUT", 10)
    monkeypatch.setattr(real, "HELD_OUT", 10)
    write_gemma(tmp_path / "real")
    monkeypatch.setattr(measure.Experiment, "_cost", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, monkeypatch, "--model", "real", "--tasks", "define", "code")
    assert len(read(tmp_path / "experts.csv")) == len(measure.METHODS) - 1
    monkeypatch.undo()
    monkeypatch.setattr(real, "HELD_OUT", 10)
    monkeypatch.setattr(measure.FamilyTraining, "family", lambda *_: 1 // 0)  # it is there
    rows = run(tmp_path, monkeypatch, "--model", "real", "--tasks", "define", "code")
    assert float(rows["one delta"]["code"]) < float(rows["base model"]["code"])
    shown = capsys.readouterr().out
    assert "nats a token of held-out answers" in shown
    assert "ms, a route" in shown


def test_a_query_is_predicted_by_itself():
    tokens: Any = object.__new__(subjects.Real)
    assert tokens.query(([2, 5, 6, 7, 1], 3)) == ([2, 5, 6], 1)
    assert tokens.length(([2, 5, 6, 7, 1], 3)) == 2
    letters: Any = object.__new__(subjects.Bytes)
    assert letters.query((b"ask\n", b"answer\n")) == (b"a", b"sk\n")
