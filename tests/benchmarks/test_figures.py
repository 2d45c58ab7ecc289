"""The tables of the documents have the figures of the results' files."""

from __future__ import annotations

import csv
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"
DOCUMENTS = [ROOT / "docs/benchmarks.md", RESULTS / "README.md"]
Row = Mapping[str, str]


def rows(name: str, **equal: str) -> list[Row]:
    with open(RESULTS / name, encoding="utf-8", newline="") as stream:
        return [row for row in csv.DictReader(stream) if equal.items() <= row.items()]


def tables(document: Path) -> Iterator[tuple[list[str], dict[str, list[str]]]]:
    """The tables of a document: (head, first cell -> cells)."""
    for block in re.findall(r"(?m)(?:^\|.*\n)+", document.read_text(encoding="utf-8")):
        head, _, *body = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in block.splitlines()]
        yield head, {cells[0]: [cell.replace("**", "") for cell in cells] for cells in body}


def spread(values: Sequence[float], digits: int) -> str:
    return f"{statistics.fmean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


#: Model -> (digits of a gain, what 1 is in its unit; digits and bytes of a file's unit; of memory's).
NEIGHBOURS = {"small": (3, 1, 1, 1e3, 2, 1e6), "real": (3, 1, 1, 1e6, 1, 1e9), "encoder": (1, 100, 0, 1e3, 2, 1e9)}


def neighbour(model: str, method: str) -> dict[str, str]:
    """What a table has of a method, by the head of the column."""
    digits, unit, file_digits, file_unit, held_digits, held_unit = NEIGHBOURS[model]
    found = rows("neighbours.csv", model=model, method=method)
    assert len(found) == 3

    def of(name: str, less: str | None = None) -> list[float]:
        return [float(row[name]) - (float(row[less]) if less else 0) for row in found]

    gain, forgotten = (
        [unit * one for one in of(*names)] for names in (("score", "base"), ("other_before", "other_after"))
    )
    prepare, step = (statistics.fmean(of(name)) for name in ("prepare_seconds", "step_seconds"))
    return {
        "trained": f"{int(found[0]['trained']):,}",
        "gain": spread(gain, digits),
        "forgotten": spread(forgotten, digits),
        "forgotten a gain": spread([a / b for a, b in zip(forgotten, gain, strict=True)], 2),
        "beside the model": f"{statistics.fmean(of('held_bytes')) / held_unit:.{held_digits}f} ",
        "preparation, a step": f"{prepare:.{0 if prepare > 30 else 1}f} s, {1000 * step:.0f} ms",
        "file": f"{statistics.fmean(of('file_bytes')) / file_unit:.{file_digits}f} ",
    }


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_neighbours(document: Path):
    found = [(head, table) for head, table in tables(document) if any(name.startswith("RIGSA") for name in table)]
    assert len(found) == len(NEIGHBOURS)
    for model, (head, table) in zip(NEIGHBOURS, found, strict=True):
        for name, cells in table.items():
            expected = neighbour(model, re.split(r"[,(]", name)[0].strip())
            for column, cell in zip(head[1:], cells[1:], strict=True):
                assert cell.startswith(expected.get(column, "")), (model, name, column, expected[column])


#: What a row is called -> the method.
FAMILIES = {
    "base model": "base model",
    "one delta, (400|80) steps": "one delta",
    "experts, .* a prompt": "experts, one weight average a prompt",
    "the same, .* a group": "experts, one weight average a group",
    "the same, ensemble": "experts, ensemble of logits",
    "the same, only": "experts, the best one",
    "one delta, (800|160) steps": "one delta, twice the steps",
}
KINDS = {"small": ("define", "api", "synonym", "sound"), "real": ("define", "code", "explain", "word")}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_families(document: Path):
    found = [table for _, table in tables(document) if any(name.startswith("experts, ") for name in table)]
    models = list(KINDS)[-len(found) :]
    for model, table in zip(models, found, strict=True):
        for name, cells in table.items():
            (method,) = (method for pattern, method in FAMILIES.items() if re.match(pattern, name))
            scores = [
                [float(row[kind]) for kind in KINDS[model]] for row in rows("experts.csv", model=model, method=method)
            ]
            means = [statistics.fmean(some) for some in scores]
            mean = f"{statistics.fmean(means):.3f}" if model == "small" or name == "base model" else spread(means, 3)
            by_kind = (
                [] if model == "small" else [f"{statistics.fmean(some):.3f}" for some in zip(*scores, strict=True)]
            )
            assert cells[1 : len(by_kind) + 2] == [*by_kind, mean], (model, name)


def test_rapid_switching():
    by_size, stages = ([*rows("rapid.csv", table=name)] for name in ("sizes", "stages"))
    seconds = {(row["what"], row["x"]): float(row["seconds"]) for row in (*by_size, *stages)}
    heads = {head[0]: table for head, table in tables(DOCUMENTS[0])}
    for side, cells in heads["a square float32 weight, 1 %, LoRA r32"].items():
        if not side.startswith("paper"):
            fuse, scatter, switch = (
                seconds[what, side.replace(",", "")] for what in ("LoRA fuse", "scatter_", "switch")
            )
            assert cells[4:] == [f"{fuse / scatter:.1f}", f"{fuse / switch:.1f}"], side
            assert float(cells[1].removesuffix(" ms")) == pytest.approx(1000 * fuse, rel=0.02)
    for stage, cells in heads["a layer of Llama-2-7B's shapes, bf16"].items():
        if stage != "all four":
            peft, ours = (seconds[f"{who} {stage.split(';')[0]}", ""] for who in ("PEFT", "HotSwap"))
            assert float(cells[3]) == pytest.approx(peft / ours, rel=0.05), stage
