"""A small share of the fuzzing of `fuzz.py`, and that it would find something."""

from __future__ import annotations

import pytest

from shiradelta.errors import REASONS
from shiradelta.format.codecs import raw
from tests import fuzz, fuzzing
from tests.reference import VALID, by_decoder, by_package

COUNT = 3000


@pytest.mark.slow
def test_all_readers_agree_on_mutated_files():
    report = fuzzing.run(fuzz.start, seed=0, count=COUNT)
    assert not report.problems, str(report)
    assert report.done == sum(report.outcomes.values()) == COUNT
    assert report.outcomes["accepted"] > COUNT // 50
    assert len(report.outcomes.keys() & REASONS.keys()) > 25


def test_cases_depend_on_nothing_but_seed_and_number():
    files = fuzz.corpus()
    cases = [fuzz.case(files, 5, i) for i in range(50)]
    assert cases == [fuzz.case(files, 5, i) for i in range(50)]
    assert cases != [fuzz.case(files, 6, i) for i in range(50)]


def test_repairing_a_right_file_changes_nothing():
    files = [path.read_bytes() for path in sorted(VALID.glob("*.shd"))]
    assert files
    for data in files:
        assert fuzz.repaired(data) == data


def test_repairing_makes_changed_contents_acceptable():
    data = (VALID / "values_f32_129.shd").read_bytes()
    at = fuzz.layout(data).sections[1][0]
    changed = fuzz.put(data, at, 1, data[at] ^ 1)
    assert by_package(changed) == by_decoder(changed) == "section_checksum"
    assert by_package(fuzz.repaired(changed)) == by_decoder(fuzz.repaired(changed)) != "section_checksum"


def test_a_missing_check_is_found(monkeypatch):
    monkeypatch.setattr(raw, "check_zero", lambda data, offset: None)
    data = (VALID / "raw.shd").read_bytes()
    end = fuzz.layout(data).sections[0][1]
    _, problem = fuzz.difference_in(fuzz.repaired(fuzz.put(data, end - 1, 1, 1)), 0)
    assert problem.startswith("numpy: accepted, ")
    assert problem.endswith("decoder: padding_not_zero")


def test_another_exception_is_found(monkeypatch):
    monkeypatch.setattr(raw.Raw, "decode", lambda *_: 1 // 0)
    report = fuzzing.judged(0, lambda: fuzz.difference_in((VALID / "raw.shd").read_bytes(), 0), 5)
    assert report.outcomes["failure"] == 1
    assert "ZeroDivisionError" in report.problems[0][1]


def test_a_difference_in_patching_is_found(monkeypatch):
    if "libshd" not in fuzz.BACKENDS:
        pytest.skip("the package was built without libshd")
    monkeypatch.setattr("shiradelta.format.arithmetic.result", lambda adds, bits, weight, *_: weight)
    assert fuzz.difference_in((VALID / "example.shd").read_bytes(), 0) == (
        "difference",
        "the backends patch differently",
    )
