"""The benchmark of the paper's tables, small enough for a test."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

from benchmarks import fusion_models, fusion_quality, rapid
from benchmarks.quality import small


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, *only: str) -> None:
    monkeypatch.setattr(sys, "argv", ["rapid", str(folder), "--quick", "--threads", "1", "--only", *only])
    rapid.main()


@pytest.mark.filterwarnings("ignore")
def test_times_stand_beside_the_papers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(rapid, "SIDES", {32: 2, 64: 2})
    monkeypatch.setattr(rapid.switch, "LLAMA_7B_LAYER", dict.fromkeys(rapid.switch.LLAMA_7B_LAYER, (96, 64)))
    run(tmp_path, monkeypatch, "sizes", "stages")
    with open(tmp_path / "rapid.csv", encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["what"] for row in rows if row["table"] == "sizes"} == {"LoRA fuse", "scatter_", "switch", "revert"}
    stages = {f"{who} {stage}" for who in ("PEFT", "HotSwap") for stage in rapid.PAPER_STAGES}
    assert {row["what"] for row in rows if row["table"] == "stages"} == stages
    assert all(float(row["seconds"]) > 0 for row in rows)
    shown = capsys.readouterr().out
    assert "3.003 s" in shown
    assert "paper: LLaMA2-7B" in shown


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_what_fused_adapters_lose_stands_beside_the_papers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    words = {"define": "d{}", "api": "a{}", "synonym": "s{}", "sound": "o{}"}
    pairs = {
        name: [(text.format(number), text.format(number).upper()) for number in range(40)]
        for name, text in words.items()
    }
    for module in (fusion_quality, fusion_models):
        monkeypatch.setattr(module, "load", lambda task, held_out: (pairs[task], [], pairs[task]), raising=False)
    monkeypatch.setattr(small, "PRETRAINING_STEPS", 2)
    monkeypatch.setattr(small, "FILES", 20)
    monkeypatch.setattr(small, "HELD_OUT", 8)

    class AtOnce:
        """In this process, where the tasks are those of the test."""

        def __init__(self, *arguments: object) -> None: ...

        def __enter__(self) -> AtOnce:
            return self

        def __exit__(self, *error: object) -> None: ...

        def submit(self, work: object) -> Done:
            return Done(work)

    class Done:
        def __init__(self, work) -> None:
            self.result = work

    monkeypatch.setattr(fusion_quality, "ProcessPoolExecutor", AtOnce)
    monkeypatch.setattr(fusion_quality, "as_completed", list)
    monkeypatch.setattr(rapid, "METHODS", ("LoRA", "SHiRA wm, disjoint"))
    run(tmp_path, monkeypatch, "fusion")
    rows = fusion_quality.read(tmp_path / fusion_quality.FILE)
    assert {(row["method"], row["task"]) for row in rows} == {(m, task) for m in rapid.METHODS for task in words}
    assert all(row["shared"] == 0 for row in rows if row["method"] != "LoRA")
    shown = capsys.readouterr().out
    assert "11.08" in shown
    assert "small Llama of bytes; define, api, sound" in shown
    assert "MiniLM, one H100" in shown
