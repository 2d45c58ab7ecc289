"""A small share of the fuzzing of `fuzz_sources.py`, and that it would find something."""

from __future__ import annotations

import random

import pytest

import shiradelta
from shiradelta.chain.wires import WIRES
from shiradelta.converters import lora_modules
from tests import BRIEF, fuzz_sources, fuzzing
from tests.fuzz_sources import case
from tests.source_files import Raw, Special, Strange
from tests.strange_wires import whole_wire
from tests.whole_sources import KINDS, whole

COUNT = 50 if BRIEF else 200


@pytest.mark.slow
def test_damaged_sources_are_converted_or_refused():
    report = fuzzing.run(fuzz_sources.start, seed=0, count=COUNT)
    assert not report.problems, str(report)
    assert report.done == sum(report.outcomes.values()) == COUNT
    assert len(report.outcomes) > len(KINDS)


@pytest.mark.slow
def test_cases_depend_on_nothing_but_seed_and_number():
    def written(seed: int, i: int) -> dict[str, object]:
        files = case(seed, i).files.items()
        return {name: content.what if isinstance(content, Special) else content.bytes() for name, content in files}

    assert [written(5, i) for i in range(50)] == [written(5, i) for i in range(50)]
    assert [written(5, i) for i in range(50)] != [written(6, i) for i in range(50)]


@pytest.mark.parametrize("kind", [*KINDS, "target"])
def test_a_whole_source_is_converted(kind: str):
    """Otherwise its damaged ones would all be refused for the same reason."""
    patch = fuzz_sources.delta()
    found = {fuzz_sources.tried(whole(kind, random.Random(seed)), patch) for seed in range(2 if BRIEF else 6)}
    assert found == {(f"{kind}: {'planned' if kind == 'target' else 'converted'}", None)}


@pytest.mark.parametrize("wire", WIRES)
def test_a_whole_step_is_read(wire: str):
    assert fuzz_sources.tried(whole_wire(wire), b"") == (f"wire: {wire} read", None)


def judged(strange: Strange) -> fuzzing.Report:
    return fuzzing.judged(0, lambda: fuzz_sources.tried(strange, b""), 5)


def test_another_exception_is_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lora_modules, "alpha_in", lambda *_: 1 // 0)
    report = judged(whole("kohya", random.Random(0)))
    assert report.outcomes["failure"] == 1
    assert "ZeroDivisionError" in report.problems[0][1]


def test_a_long_line_is_found(monkeypatch: pytest.MonkeyPatch):
    class LongError(shiradelta.SourceError):
        def __str__(self) -> str:
            return "a" * 10_000

    def refuse(*_: object, **__: object) -> None:
        raise LongError

    monkeypatch.setattr(shiradelta, "convert", refuse)
    assert "a line of 10000 characters" in judged(whole("dense", random.Random(0))).problems[0][1]


def test_what_is_left_behind_is_found(monkeypatch: pytest.MonkeyPatch):
    def convert(source: object, out: object, **_: object) -> None:
        open(f"{out}.tmp", "w").close()
        raise shiradelta.SourceError("no")

    monkeypatch.setattr(shiradelta, "convert", convert)
    assert "out.shd.tmp" in judged(whole("dense", random.Random(0))).problems[0][1]


def test_a_hang_is_found(monkeypatch: pytest.MonkeyPatch):
    def convert(*_: object, **__: object) -> None:
        while True:
            pass

    monkeypatch.setattr(shiradelta, "convert", convert)
    report = fuzzing.judged(0, lambda: fuzz_sources.tried(whole("dense", random.Random(0)), b""), 0.2)
    assert "TooSlow" in report.problems[0][1]


def test_a_source_without_files_is_refused():
    assert judged(Strange("dense", {"base/x": Raw(b"")}, "source", None)).outcomes["dense: SourceError"] == 1
