"""Patterns of module names from a stranger's configuration: as `re` decides, and soon."""

from __future__ import annotations

import random
import re
import time
import warnings

import pytest
from shiradelta.converters.patterns import PatternTable

from shiradelta.errors import SourceError

ATOMS = ["a", "b", "_", ".", "0", r"\.", r"\d", r"\w", "[ab]", "[^a]", "[a-c0]", "[]a]", "^", "$", r"\Z", r"\A"]
REPEATS = ["*", "+", "?", "*?", "+?", "??", "{2}", "{,2}", "{1,}", "{0,2}", "{,}", "{", "{}", "{a}"]


def expression(rng: random.Random, depth: int) -> str:
    """A regular expression, or nearly one."""
    form = rng.randrange(10) if depth else 0
    if form < 4:
        return rng.choice(ATOMS)
    inner = expression(rng, depth - 1)
    if form < 6:
        return inner + expression(rng, depth - 1)
    if form == 6:
        return f"{inner}|{expression(rng, depth - 1)}"  # not in a group: PEFT's frame is part of it, too
    if form == 7:
        return f"(?:{inner}|{expression(rng, depth - 1)})"
    return f"({inner}){rng.choice(REPEATS)}"


def by_re(pattern: str, name: str) -> bool:
    """PEFT's rule (`get_pattern_key`)."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


@pytest.mark.filterwarnings("ignore:Possible nested set:FutureWarning")
def test_patterns_match_what_re_matches():
    rng, matching, tried = random.Random(1), 0, 0
    while tried < 1500:
        pattern = expression(rng, 4)
        try:
            re.compile(rf"(.*\.)?({pattern})$")
        except re.error:
            with pytest.raises(SourceError, match="is not a regular expression"):
                PatternTable({pattern: True}, "here")
            continue
        tried += 1
        table = PatternTable({pattern: True}, "here")
        for name in ("".join(rng.choices("aab._0", k=rng.randrange(8))) for _ in range(10)):
            expected = by_re(pattern, name)
            assert table.value(name, False) == expected, (pattern, name)
            matching += expected
    assert tried < matching < 9 * tried


def test_the_first_pattern_that_matches_counts():
    patterns = {"v_proj": 1, r"layers\.(0|1)\.q_proj": 2, "q.proj": 3, "layers.2.q_proj": 4, ".*": 5}
    names = ["model.layers.0.q_proj", "model.layers.2.q_proj", "v_proj", "av_proj", "model.v_proj"]
    found = [PatternTable(patterns, "here").value(name, None) for name in names]
    assert found == [2, 3, 1, 5, 1]
    assert PatternTable({}, "here").value("q_proj", 7) == PatternTable({"k": 1}, "here").value("q_proj", 7) == 7


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+b", "(a|a)*b", "(a|aa)+b", "(.*)*b", r"(\w+\.?)+!", "a*" * 40 + "b", "(" * 30 + "a" + "+)" * 30 + "b"],
)
def test_what_would_take_years_takes_no_time(pattern: str):
    began = time.perf_counter()
    assert PatternTable({pattern: 1}, "here").value("a" * 200, 2) == 2
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "is not a regular expression"),
        ("a**", "is not a regular expression"),
        (r"(a)\1", r"has '\\\\1'"),
        ("(?=a)a", r"has '\(\?=a'"),
        ("(?<!a)b", "unbounded time"),
        ("(?>a)", "unbounded time"),
        ("a++", "possessive"),
        (r"\bq_proj", r"has '\\\\b'"),
        ("a{60000}", "repeats too much"),
        ("((){2000}){2000}", "repeats too much"),
        ("a{99999999999}", "is not a regular expression"),
        ("(a)" * 1000, "is too long for a pattern"),
        ("(" * 900 + ")" * 900, "is not a regular expression"),
    ],
)
def test_other_expressions_are_refused_by_name(pattern: str, message: str):
    with pytest.raises(SourceError, match=rf"here: .*({message})") as caught:
        PatternTable({pattern: 1}, "here")
    assert len(str(caught.value)) < 300


def test_remarks_of_re_are_no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert PatternTable({"[[a]": 1}, "here").value("[", 2) == 1


def test_many_patterns_and_many_modules_take_no_time():
    names = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(1000) for p in "qkvo"]
    began = time.perf_counter()
    table = PatternTable({name: i for i, name in enumerate(names)}, "here")
    assert [table.value(f"base.{name}", None) for name in names] == list(range(len(names)))
    assert time.perf_counter() - began < 5


@pytest.mark.slow
def test_patterns_that_take_long_together_are_refused():
    table = PatternTable({f"(a|b)*a(a|b){{{i}}}": i for i in range(300, 330)}, "here")
    names = [f"{i:b}".replace("0", "a").replace("1", "b") * 200 for i in range(100)]
    with pytest.raises(SourceError, match="here: its patterns take too long to match; write plain names"):
        list(map(table.value, names, names))


def test_a_name_with_a_line_break_is_refused():
    with pytest.raises(SourceError, match=r"'a\\n' has a line break"):
        PatternTable({"a": 1}, "here").value("a\n", None)
