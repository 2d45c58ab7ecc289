"""The quality benchmark, on a task small enough for a test: rows, what is taken up, what is compared with what."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from benchmarks.quality import compare, corpus, methods, recipe, summary
from benchmarks.quality.tasks import Task
from tests.fit.test_fit import build, texts, write_tokenizer


class Echo(Task):
    """A causal LM that learns to repeat a token."""

    name = "echo"
    linears = ("q_proj", "v_proj", "down_proj")
    rates = {"LoRA": 1e-2, "full": 3e-3, "sparse": 1e-2}  # noqa: RUF012
    measures = ("log-likelihood", "accuracy")

    def __init__(self, folder: Path) -> None:
        self.base = folder / "base"
        if not self.base.exists():
            build("causal").save_pretrained(self.base)
            write_tokenizer(self.base)
        self.texts = texts()
        self._held_out = torch.arange(2, 60)[:, None].repeat(1, 5)

    def load(self) -> nn.Module:
        return LlamaForCausalLM.from_pretrained(self.base).eval()

    def batches(self, seed: int) -> Iterator[Tensor]:
        while True:
            yield self._held_out

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return model(input_ids=batch, labels=batch).loss

    def answers(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        with torch.inference_mode():
            logits = model(input_ids=self._held_out).logits[:, :-1].flatten(0, 1)
        yield logits, self._held_out[:, 1:].flatten()

    def score(self, model: nn.Module) -> tuple[float, ...]:
        logits, right = next(self.answers(model))
        return -float(nn.functional.cross_entropy(logits, right)), float((logits.argmax(-1) == right).double().mean())

    def trained(self, name: str) -> bool:
        return name.startswith("model.layers.")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(methods.TASKS, "echo", Echo)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    return tmp_path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("source", ["LoRA", "full"])
def test_every_file_gets_a_row_once(folder: Path, source: str):
    arguments = "echo", source, 0, folder, [0.05], list(methods.METHODS["full"]), 12, 12
    compare.compare(*arguments)
    first = (folder / f"{source}0.csv").read_text()
    rows = compare.read(folder / f"{source}0.csv")
    expected = list(methods.METHODS[source])
    assert [row["method"] for row in rows] == (["itself", *expected] if source == "LoRA" else expected)
    assert all(float(row["tuned"]) > float(row["base"]) for row in rows)
    kept = {row["method"]: float(row["kept"]) for row in rows}
    assert kept["fitted"] > kept["top-k"]
    compare.compare(*arguments)
    assert (folder / f"{source}0.csv").read_text() == first
    assert summary.summarise(rows).count("\n") == len(rows) + 1
    summary.draw(rows, folder / "quality.png")
    assert (folder / "quality.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_an_extracted_lora_of_full_rank_is_the_fine_tune_on_its_layers(folder: Path):
    task = Echo(folder)
    base, tuned = task.load(), task.load()
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if methods.is_linear(task, name):
                weight += 0.1 * torch.randn_like(weight)
    methods.extract_lora(base, dict(tuned.named_parameters()), task, 1 << 30)
    for (name, found), wanted in zip(base.named_parameters(), tuned.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-3, rtol=0, msg=name)
    small = task.load()
    size = methods.extract_lora(small, dict(tuned.named_parameters()), task, 1)
    assert size == 2 * sum(sum(w.shape) for n, w in small.named_parameters() if methods.is_linear(task, n))
    assert 0 < task.divergence(base, tuned) < task.divergence(small, tuned)
    assert task.divergence(tuned, tuned) == pytest.approx(0, abs=1e-9)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_recipe_varied(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(recipe.by_training, "STEPS", 40)
    rows = recipe.measure("echo", "full", 0, ["the recipe", "the output alone"], folder, 0.05, 12)
    assert [row["variant"] for row in rows] == ["the recipe", "the output alone"]
    assert all(0 < row["divergence"] < 1 for row in rows)
    assert rows[0]["distance"] != rows[1]["distance"]


def test_every_variant_names_something_there_is():
    for settings in recipe.VARIANTS.values():
        with recipe.varied(settings) as rest:
            assert set(rest) <= {"mask", "relative_lr", "steps", "values", "scope", "text_share"}


def test_text_of_a_module(tmp_path: Path):
    (tmp_path / "a.py").write_text(
        '"""Prose."""\ndef f():\n    """More prose, ' + "x" * 60 + '."""\n    return 1  # why\n'
    )
    assert "More prose" in corpus.docstrings(tmp_path / "a.py")
    assert corpus.code(tmp_path / "a.py") == "pass\n\ndef f():\n    pass\n    return 1"
    (tmp_path / "b.py").write_text("def broken(")
    assert corpus.docstrings(tmp_path / "b.py") == corpus.code(tmp_path / "b.py") == ""
    lines = [f"line {number}, of some length to be cut somewhere\n" for number in range(40)]
    pieces = corpus.pieces("".join(lines))
    assert "".join(pieces) == "".join(lines)
    assert all(len(piece) <= corpus.CHARACTERS for piece in pieces)


def test_tables_are_read_as_written(tmp_path: Path):
    with open(tmp_path / "a.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, summary.FIELDS)
        writer.writeheader()
        writer.writerow(dict.fromkeys(summary.FIELDS, "1"))
    assert compare.read(tmp_path / "a.csv") == [dict.fromkeys(summary.FIELDS, "1")]
