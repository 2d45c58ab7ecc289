"""The benchmark of the method's neighbours, on a task small enough for a test."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import shiradelta
from benchmarks.quality import neighbours, small
from benchmarks.quality.compare import read
from tests.benchmarks.test_quality import Echo


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> list[dict[str, str]]:
    monkeypatch.setitem(neighbours.PAIRS, "small", lambda out: (Echo(out), Echo(out)))
    monkeypatch.setattr(neighbours, "RATES", (1.0,))
    arguments = [str(folder), "--seeds", "1", "--steps", "4", "--epoch", "2", *options]
    monkeypatch.setattr(sys, "argv", ["neighbours", *arguments])
    neighbours.main()
    return read(folder / "neighbours.csv")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_method_has_a_row_a_seed_and_none_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    rows = run(tmp_path, monkeypatch)
    assert [(row["method"], row["seed"]) for row in rows] == [(name, "0") for name in neighbours.METHODS]
    by_method = {row["method"]: row for row in rows}
    budget = int(by_method["LoRA"]["trained"])
    for name, row in by_method.items():
        assert 0.5 * budget <= int(row["trained"]) <= (1.6 if name == "DoRA" else 1.1) * budget, name
        assert int(row["file_bytes"]) > 0 < int(row["held_bytes"])
    assert float(by_method["LoRA"]["score"]) != float(by_method["LoRA"]["base"])
    adapter = tmp_path / "files" / "small-SymLoRA-0.safetensors"
    shiradelta.convert(adapter, tmp_path / "x.shd", 1.0, tmp_path / "base", "f32")
    assert "SHiRA-DoRA" in capsys.readouterr().out
    monkeypatch.setattr(neighbours, "fit", lambda *_: 1 // 0)
    assert run(tmp_path, monkeypatch) == rows


@pytest.mark.slow
def test_a_model_without_square_weights_has_no_symlora(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(Echo, "linears", ("down_proj",))
    assert run(tmp_path, monkeypatch, "--methods", "SymLoRA") == []
    assert "SymLoRA is left out" in capsys.readouterr().out


def test_the_symmetric_layer_is_the_converters_change():
    torch.manual_seed(0)
    layer = nn.Linear(6, 6)
    symmetric = neighbours.Symmetric(layer, 3)
    x = torch.randn(4, 6)
    assert torch.equal(symmetric(x), layer(x))
    symmetric.Lambda.data = torch.randn(3)
    change = symmetric.Q @ torch.diag(symmetric.Lambda) @ symmetric.Q.T
    torch.testing.assert_close(symmetric(x), layer(x) + x @ change.T)


def test_texts_are_cut_to_pieces_of_bytes():
    rows = small._bytes(["a" * 100, "short"])
    assert rows.shape == (2, small.WIDTH)  # the rest of the first and the second are too short
    assert set(rows.flatten().tolist()) == {ord("a")}
