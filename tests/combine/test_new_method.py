"""The how-to for a new merge method, run as it stands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

import shiradelta
from shiradelta.cli import main
from shiradelta.combine.methods import METHODS, merge_method
from shiradelta.errors import ArgumentError

PAGE = Path(__file__).parents[2] / "docs" / "extend" / "merge-method.md"


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[str]:
    """What the example prints; its method is registered during the test."""
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(example.splitlines()) <= 40
    monkeypatch.chdir(tmp_path)
    try:
        exec(compile(example, str(PAGE), "exec"), {})
        yield capsys.readouterr().out
    finally:
        METHODS.remove("median")


def test_a_method_from_outside_is_used(added: str):
    assert added == "[3. 4.]\n"
    with shiradelta.open_delta("median.shd") as fused:
        assert fused["w"].positions().tolist() == [0, 4]


def test_the_command_line_takes_it(added: str):
    assert "median" in CliRunner().invoke(main, ["fuse", "--help"]).stdout
    result = CliRunner().invoke(main, ["fuse", "a.shd", "b.shd", "-o", "x.shd", "--method", "median"])
    assert result.exit_code == 0, result.stderr
    result = CliRunner().invoke(main, ["fuse", "a.shd", "-o", "x.shd", "--method", "median", "--seed", "1"])
    assert result.exit_code == 2
    assert "--seed is an option of dare and della; add --method dare" in result.stderr


def test_names_are_unique_and_unknown_ones_are_refused_by_name(tmp_path: Path):
    with pytest.raises(ArgumentError, match="'ties' is registered already"):
        merge_method("ties", "Another one.")(lambda overlay: overlay.sum())
    with pytest.raises(ArgumentError, match=r"merge method 'median' is unknown; take sum, mean, .*, della"):
        shiradelta.fuse({"a.shd": 1.0}, tmp_path / "x.shd", method="median")
