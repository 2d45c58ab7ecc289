"""The benchmark of serving: requests and groups as said, and all of it on a model small enough for a test."""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.serve import __main__ as serve
from benchmarks.serve import results, workload
from benchmarks.serve.workload import Load, Request, Server


@pytest.mark.parametrize("every", [1, 4, 16])
def test_the_adapter_changes_as_often_as_said(every: int):
    names = ["a", "b", "c"]
    found = [one.adapter for one in Load(count=48).requests(names, every, 100)]
    changes = [i for i in range(1, 48) if found[i] != found[i - 1]]
    assert changes == list(range(every, 48, every))
    assert found == [one.adapter for one in Load(count=48).requests(names, every, 100)]
    assert {one.adapter for one in Load(count=9).requests(["a"], 1, 100)} == {"a"}


def test_a_window_is_served_by_adapter_and_all_requests_are_answered():
    load = Load(count=12, window=6, batch=2)
    done: list[tuple[str, list[str]]] = []
    selected: list[str] = []

    def generate(requests: Sequence[Request]) -> list[float]:
        done.append((selected[-1], [one.adapter for one in requests]))
        return [load.now()] * len(requests)

    requests = [Request(name, [index]) for index, name in enumerate("abcabccbaaaa")]
    found = Server(load, generate, selected.append).serve(requests)
    # The second window begins with the adapter that is active.
    assert done == [("a", ["a"] * 2), ("b", ["b"] * 2), ("c", ["c"] * 2), ("c", ["c"]), ("b", ["b"]), ("a", ["a"] * 4)]
    assert (found.switches, len(found.latencies)) == (5, 12)
    assert 0 <= found.switching <= found.seconds


def test_where_unfused_adapters_are_ahead_it_is_said():
    speeds = {"HotSwap, grouped": (50, 90), "PEFT LoRA, mixed": (60, 70), "PEFT LoRA, grouped": (40, 80)}
    rows = [
        {"adapters": 8, "way": way, "every": every, "count": 64, "tokens_a_second": speed}
        for way, each in speeds.items()
        for every, speed in zip((1, 64), each, strict=True)
    ]
    (said,) = results.verdicts(rows)
    assert said.endswith("1: 0.83 x, never: 1.12 x; unfused LoRA is ahead where it changes every 1")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_way_has_rows_and_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for module in ("transformers", "peft", "matplotlib"):
        pytest.importorskip(module)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    monkeypatch.setattr(workload, "SIZES", small)
    options = ["--adapters", "1", "3", "--every", "1", "4", "--repeats", "1", "--count", "8", "--window", "4"]
    sizes = ["--batch", "2", "--prompt", "4", "--answer", "2", "--plot", str(tmp_path / "serve.png")]
    monkeypatch.setattr(sys, "argv", ["serve", str(tmp_path), *options, *sizes])
    serve.main()
    assert (tmp_path / "serve.png").read_bytes().startswith(b"\x89PNG")
    with open(tmp_path / "serve.csv", encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 4 * (1 + 2)
    assert all(float(row["tokens_a_second"]) > 0 for row in rows)
    switches = {(row["way"], row["adapters"]): int(row["switches"]) for row in rows}
    assert switches["HotSwap, grouped", "3"] > 0 == switches["PEFT LoRA, mixed", "3"]
    monkeypatch.setattr(serve, "WAYS", {"no adapter": serve.WAYS["no adapter"]})
    serve.main()
    assert len(results.read(tmp_path / "serve.csv")) == 3  # rows of an engine that is measured again are replaced
