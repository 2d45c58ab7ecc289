"""Every public function refuses an argument of a wrong type in one line: where, what, and what to give."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import shiradelta
from shiradelta.errors import ArgumentError
from shiradelta.experts import ExpertRouter, assemble_family, open_family, train_family
from shiradelta.fit import Fit
from shiradelta.train import Tuner, attach
from shiradelta.util.arguments import (
    ANY,
    COMMON,
    LIST,
    OPEN,
    PAIRS,
    SHAPE,
    STRENGTHS,
    ArgumentKind,
    checked,
)


class Nothing:
    """A value of a type that no argument takes."""


def public() -> dict[str, Callable[..., Any]]:
    """The public functions and methods that take arguments, by name."""
    found: dict[str, Callable[..., Any]] = {"attach": attach, "Fit": Fit.__init__}
    found |= {each.__name__: each for each in (train_family, assemble_family, open_family)}
    for name in shiradelta.__all__:
        one = getattr(shiradelta, name)
        if not isinstance(one, type):
            found[name] = one
        elif not issubclass(one, Exception):
            found[name] = one.__init__
    found |= {"ExpertRouter": ExpertRouter.__init__, "ExpertRouter.ensemble": ExpertRouter.ensemble}
    found |= {f"HotSwap.{name}": getattr(shiradelta.HotSwap, name) for name in ("load", "unload", "switch", "rebase")}
    return found | {f"Tuner.{name}": getattr(Tuner, name) for name in ("save", "export")}


PUBLIC = public()
CASES = [
    (name, argument)
    for name, function in PUBLIC.items()
    for argument, kind in getattr(inspect.unwrap(function, stop=lambda f: hasattr(f, "kinds")), "kinds", {}).items()
    if kind is not ANY
]


def test_every_public_function_is_checked():
    assert {name for name, _ in CASES} == set(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_wrong_type_is_one_line_that_names_the_argument(name: str):
    function = PUBLIC[name]
    own = [Nothing()] if "self" in inspect.signature(function).parameters else []
    for argument in (argument for owner, argument in CASES if owner == name):
        with pytest.raises(ArgumentError) as caught:
            function(*own, **{argument: Nothing()})
        line = str(caught.value)
        assert line.startswith(f"{name}: {argument} is <tests.test_arguments.Nothing object at ")
        assert "; give " in line
        assert "\n" not in line


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [
        (COMMON["source"], ["a", Path("a")], ["", "a\0b", b"a", 5, True, ["a"]]),
        (COMMON["strength"], [1, 0.5, np.float32(2), float("nan")], ["1", True, b"1", np.ones(2), 1j]),
        (COMMON["seed"], [1, np.int64(1)], [1.0, "1", True]),
        (COMMON["check"], [True, False, np.bool_(True), 0, 1], [2, 1.0, "no"]),
        (COMMON["skip"], ["*", [], ["*"], ("a", "b"), {"a"}, {"a": 1}.keys(), None], [5, [5], b"*", iter(["a"])]),
        (COMMON["progress"], [print], ["x", 1]),
        (COMMON["key"], ["a", ["a", Path("b")], {Path("a")}], [5, [5], b"a", ""]),
        (OPEN, ["a", b"a", np.zeros(1, np.uint8), open], [5, None, ["a"], ""]),
        (
            LIST,
            [[], (), np.zeros(2), torch.utils.data.TensorDataset(torch.zeros(2))],
            [iter([]), "ab", {}, {1}, 5, b"a"],
        ),
        (SHAPE, [(), [4, 4], np.array([4, 4]), torch.Size([4, 4])], [4, "44", [4.0]]),
        (PAIRS, [{}, {"a": "b"}], [{"a": 1}, [("a", "b")]]),
        (STRENGTHS, [{}, {"a": 1}, {Path("a"): 0.5}], [["a"], {"a": "1"}, {5: 1.0}, "a"]),
    ],
    ids=lambda value: value.what if isinstance(value, ArgumentKind) else "",
)
def test_what_each_kind_takes(kind: ArgumentKind, right: list[Any], wrong: list[Any], tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    with open(tmp_path / "file", "rb") as binary, open(tmp_path / "file", encoding="utf-8") as text:
        right = [binary if value is open else value for value in right]
        wrong = [*wrong, text] if kind is OPEN else wrong
        assert [value for value in right if not kind.holds(value)] == []
        assert [value for value in wrong if kind.holds(value)] == []


def test_none_is_right_only_where_it_is_the_default():
    @checked()
    def function(source: str, base: str | None = None) -> None:
        pass

    function("a", None)
    with pytest.raises(ArgumentError, match=r"function: source is None; give a path"):
        function(None)  # type: ignore[arg-type]


def test_the_mistakes_of_a_first_hour(made: Path, tmp_path: Path):
    for call, message in (
        (lambda: shiradelta.fuse([made / "a.shd", made / "b.shd"], tmp_path / "o.shd"), "a mapping of files"),  # type: ignore[arg-type]
        (lambda: shiradelta.convert(made / "tuned_a", base=made / "bf16", skip=5), "give a pattern such as"),  # type: ignore[arg-type]
        (lambda: shiradelta.HotSwap({"a": torch.ones(2)}).load("a", None), "give a path, bytes or a binary"),  # type: ignore[arg-type]
        (lambda: shiradelta.HotSwap({"a": torch.ones(2)}).switch(["a"]), "a mapping of names to strengths"),  # type: ignore[arg-type]
        (lambda: shiradelta.apply(made / "bf16", {"a": 1}), "give a path or an open delta"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ArgumentError, match=message):
            call()
    out = tmp_path / "o.shd"
    assert shiradelta.convert(made / "tuned_a", out, base=made / "bf16", skip=None).tensors
