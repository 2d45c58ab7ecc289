"""Masks as a registry: the how-to, capabilities of each row, refusals by name."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import shiradelta
from shiradelta import train
from shiradelta.cli import main
from shiradelta.errors import ArgumentError
from shiradelta.format.draw import Draw
from shiradelta.train.masks import MASKS, Chosen, MaskInput, mask
from tests.train.test_attach import BATCH, llama

HOW_TO = (Path(__file__).parents[2] / "docs" / "extend" / "mask.md").read_text(encoding="utf-8")
TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(autouse=True)
def clean_registry() -> Iterator[None]:
    before = set(MASKS)
    yield
    for name in set(MASKS) - before:
        MASKS.remove(name)


def attach(name: str, sparsity: float | str = 0.1, **options: Any) -> train.Tuner:
    return train.attach(llama(), sparsity, name, TARGETS, [BATCH], **options)


def test_the_how_to_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (code,) = re.findall(r"```python\n(.*?)```", HOW_TO, re.DOTALL)
    assert code.count("\n") <= 40
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "mask.md", "exec"), {})
    for name, nnz in (("columns", {"0.weight": 6 * 32, "2.weight": 6 * 32}), ("wanda", {})):
        with shiradelta.open_delta(tmp_path / f"{name}.shd") as delta:
            assert delta.metadata["mask"] == name
            if nnz:
                assert {key: len({*(tensor.positions() % tensor.shape[1])}) for key, tensor in delta.items()} == {
                    "0.weight": 3,
                    "2.weight": 6,
                }
            else:
                assert all(tensor.nnz == round(0.1 * 32 * 64) for tensor in delta.values())
    # A mask from outside is a mask everywhere: in what it can do, in refusals, on the command line.
    assert attach("wanda", "1:8").nnz
    assert attach("wanda", scope="model").nnz
    assert attach("columns", avoid=[{"model.layers.0.self_attn.q_proj.weight": range(512)}]).nnz
    with pytest.raises(ArgumentError, match="columns"):
        attach("colums")
    for options in ({"sparsity": "1:8"}, {"scope": "model"}):
        with pytest.raises(ArgumentError, match="'columns'"):
            attach("columns", **options)
    with pytest.raises(ArgumentError, match="can be larger: snip, grad, wm, rand, wanda"):
        attach("columns", prune_steps=3)
    shown = CliRunner().invoke(main, ["train", "--help"]).output
    assert "columns with the largest norm" in " ".join(shown.split())


def test_the_table_of_the_how_to_is_the_registry():
    head, _, *rows = (line for line in HOW_TO.splitlines() if line.startswith("|"))
    assert head.count("|") == 8
    answers = {True: "yes", False: "no"}
    assert rows == [
        f"| `{row.name}` | {row.help} | {row.gives} |"
        f" {answers[row.needs_gradients]} | {answers[row.can_be_larger]} | {answers[row.whole_model]} |"
        f" {answers[row.scores is not None]} |"
        for row in MASKS.values()
    ]


@pytest.mark.parametrize("name", list(MASKS))
def test_each_mask_does_what_its_row_says_or_is_refused_by_name(name: str):
    row = MASKS[name]
    ways: list[tuple[bool, dict[str, Any]]] = [
        (row.scores is not None, {"sparsity": "2:8"}),
        (row.whole_model, {"scope": "model"}),
        (row.can_be_larger, {"prune_steps": 2}),
    ]
    for can, options in ways:
        if can:
            assert attach(name, **options).nnz
        else:
            with pytest.raises(ArgumentError, match=f"'{name}'|can be larger"):
                attach(name, **options)
    needs = pytest.raises(shiradelta.ShiraDeltaError, match="calibration set is empty")
    if row.needs_gradients:
        with needs:
            train.attach(llama(), 0.1, name, TARGETS)
    else:
        assert train.attach(llama(), 0.1, name, TARGETS).nnz


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda given: torch.arange(3).flip(0), "increasing positions"),
        (lambda given: np.array([1, 1]), "increasing positions"),
        (lambda given: torch.tensor([-1, 4]), "increasing positions"),
        (lambda given: np.array([given.weight.numel()]), "increasing positions"),
        (lambda given: torch.ones(4), "increasing positions"),
    ],
)
def test_positions_that_are_wrong_are_refused(given: Any, message: str):
    mask("toy", "a toy", gives="positions")(given)
    with pytest.raises(ArgumentError, match=f"'toy'.*{message}"):
        attach("toy")


@pytest.mark.parametrize(
    "given", [lambda given: torch.ones(3), lambda given: -given.weight.abs() - 1, lambda given: given.weight[:1]]
)
def test_scores_that_are_wrong_are_refused(given: Any):
    mask("toy", "a toy")(given)
    for options in ({}, {"scope": "model"}, {"sparsity": "1:8"}):
        with pytest.raises(ArgumentError, match=r"'toy' does not give a score"):
            attach("toy", **options)


def test_a_mask_may_return_the_weight_itself():
    """What is avoided is not written into it."""

    @mask("itself", "the weight")
    def itself(given: MaskInput) -> torch.Tensor:
        return given.weight.abs_()

    model = llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    name = "model.layers.0.self_attn.q_proj.weight"
    tuner = train.attach(model, 0.1, "itself", TARGETS, avoid=[{name: range(512)}])
    assert int(tuner.positions[name].min()) >= 512
    tuner.detach()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_registering():
    with pytest.raises(ArgumentError, match="take scores, positions or tickets"):
        mask("toy", "a toy", gives="mask")
    with pytest.raises(ArgumentError, match="registered already"):
        mask("snip", "another")(lambda given: given.weight)


@pytest.mark.slow
def test_listing_the_masks_does_not_import_torch():
    code = "import sys; from shiradelta.train.masks import MASKS; print(*MASKS); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, list(MASKS)), done.stderr


def test_training_without_torch_ends_in_one_error():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from shiradelta import train\nfrom shiradelta.errors import MissingDependencyError\n"
        "try:\n    train.attach\nexcept MissingDependencyError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "training needs torch" in done.stdout, done.stderr


@pytest.mark.parametrize("draw", [Draw(1, 100), Draw(0, 99), Draw(-1, 100), Draw(0, 0)])
def test_a_wrong_draw_of_a_mask_is_refused_before_training(draw: Draw):
    @mask("drawn", "from a seed", gives="positions")
    def drawn(given: MaskInput) -> Chosen:
        return Chosen(Draw(0, 100).positions(given.weight.numel()), {given.views[0].name: draw})

    with pytest.raises(ArgumentError, match=r"'drawn' names a wrong draw: position \d+ .*; mend its function"):
        attach("drawn")
