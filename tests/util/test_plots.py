"""Pictures, and the checks before they are drawn."""

from __future__ import annotations

from pathlib import Path

import pytest

from shiradelta import TargetError
from shiradelta.util import plots


def test_a_figure_is_written_as_a_png_that_may_be_replaced(tmp_path: Path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "a.png"
    for _ in range(2):
        plots.check_plot(path)
        plots.save(plots.new_figure(2, 1), path)
        assert path.read_bytes().startswith(b"\x89PNG")


def test_what_is_no_png_is_not_replaced(tmp_path: Path):
    pytest.importorskip("matplotlib")
    (tmp_path / "a.png").write_text("my notes")
    with pytest.raises(TargetError, match="is not a PNG"):
        plots.check_plot(tmp_path / "a.png")
    with pytest.raises(TargetError, match="no such folder"):
        plots.check_plot(tmp_path / "nowhere" / "a.png")


def test_labels_of_axes_are_short_and_no_formulas():
    assert plots.tick("model.layers.0") == "model.layers.0"
    assert plots.tick("a$b") == r"a\$b"
    assert plots.tick("x" * 30 + "end") == "..." + "x" * 18 + "end"
