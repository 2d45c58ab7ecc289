"""A delta goes over to a new base: with it the new base behaves as the old one does with the old delta."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import shiradelta
from shiradelta.cli import main
from shiradelta.errors import ArgumentError, BaseMismatchError, SourceError
from shiradelta.fit import Fit
from shiradelta.text.batches import split
from tests.fit.test_fit import WORDS, texts
from tests.fit.test_gain import EXAMPLES, write_trained

TEXTS = texts(140)


def write_bases(root: Path) -> tuple[Path, Path, Path]:
    """An old base, a new one, which is the old one trained a little more, and a delta for the old one."""
    old, tuned = write_trained(root)
    shiradelta.convert(tuned, root / "style.shd", 0.3, old, "f16")
    model = AutoModelForCausalLM.from_pretrained(old)
    torch.manual_seed(2)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for text in TEXTS[120:]:
        row = torch.tensor([[WORDS.index(word) + 2 for word in text.split()]])
        optimizer.zero_grad()
        model(input_ids=row, labels=row).loss.backward()
        optimizer.step()
    shutil.copytree(old, root / "new")
    model.save_pretrained(root / "new")
    return old, root / "new", root / "style.shd"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return write_bases(tmp_path_factory.mktemp("new_base"))


def moved(bases: tuple[Path, Path, Path], out: Path, sparsity: float = 0.2, **settings: Any) -> Any:
    old, new, style = bases
    fit = Fit(EXAMPLES, **{"method": "refit", "batch": 16, "held_out": 24, "device": "cpu", "tokens": 32, **settings})
    return shiradelta.convert(style, out, sparsity, new, fit=fit, from_base=old)


def logits(folder: Path, rows: list[list[int]]) -> list[torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return [model(input_ids=torch.tensor([row])).logits[0] for row in rows]


def distance(student: Path, teacher: Path, rows: list[tuple[int, list[int]]]) -> float:
    """Mean divergence of the predictions of the completions' tokens."""
    total, number = 0.0, 0
    both = (logits(folder, [ids for _, ids in rows]) for folder in (student, teacher))
    for (prompt, _), own, wanted in zip(rows, *both, strict=True):
        s, t = (one[prompt - 1 : -1].log_softmax(-1) for one in (own, wanted))
        total += float((t.exp() * (t - s)).sum())
        number += len(s)
    return total / number


@pytest.mark.parametrize(
    "settings",
    [{"method": "refit"}, pytest.param({"method": "train", "steps": 30}, marks=pytest.mark.slow)],
    ids=["refit", "train"],
)
def test_it_is_nearer_than_the_old_delta_and_the_new_base(
    bases: tuple[Path, Path, Path], tmp_path: Path, settings: dict[str, Any]
):
    """By the report, and by the folders that `apply` writes."""
    report = moved(bases, tmp_path / "moved.shd", **settings)
    fit = report.fit
    assert fit.fitted < 0.8 * min(fit.old_delta, fit.base)
    old, new, style = bases
    for base, delta, out in ((old, style, "teacher"), (new, style, "carried"), (new, tmp_path / "moved.shd", "fitted")):
        forced = {"check": out != "carried"}
        shiradelta.apply(base, delta, tmp_path / out, **forced)
    held_out = split(len(EXAMPLES), 24, 0)[1]
    rows = []
    for index in held_out:
        prompt, completion = (EXAMPLES[index][key].split() for key in ("prompt", "completion"))
        rows.append((len(prompt), [WORDS.index(word) + 2 for word in (*prompt, *completion)]))
    far = {name: distance(tmp_path / name, tmp_path / "teacher", rows) for name in ("carried", "fitted")}
    assert far["fitted"] < 0.8 * min(far["carried"], distance(new, tmp_path / "teacher", rows))
    assert far["carried"] == pytest.approx(fit.old_delta, rel=0.15)
    assert far["fitted"] == pytest.approx(fit.fitted, rel=0.15)
    assert distance(new, old, rows) == pytest.approx(fit.apart[fit.measure]["new_base"], rel=0.15)
    assert distance(old, tmp_path / "teacher", rows) == pytest.approx(fit.apart[fit.measure]["old_delta"], rel=0.15)
    assert distance(new, tmp_path / "fitted", rows) == pytest.approx(fit.apart[fit.measure]["fitted"], rel=0.15)
    with shiradelta.open_delta(style) as before, shiradelta.open_delta(tmp_path / "moved.shd") as after:
        assert set(after) <= set(before)
        assert after.metadata["old_base"] == "base"
        assert after.metadata["base"] == "new"
    shiradelta.verify(new, tmp_path / "moved.shd")


@pytest.mark.slow
def test_the_figures_are_in_the_report_and_what_is_printed(bases: tuple[Path, Path, Path], tmp_path: Path):
    old, new, style = map(str, bases)
    Path(tmp_path / "texts.jsonl").write_text("".join(json.dumps(example) + "\n" for example in EXAMPLES))
    words = ["convert", style, "--base", new, "--from-base", old, "--fit", str(tmp_path / "texts.jsonl"), "--sparsity"]
    words += ["20%", "--fit-method", "refit", "--fit-batch", "16", "--device", "cpu", "-o", str(tmp_path / "moved.shd")]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert "the model is loaded as a whole, for it is measured beside the old base" in result.stderr
    for head in (
        "new base",
        "old delta",
        "new base from the old",
        "old delta adds to the old",
        "fitted adds to the new",
    ):
        assert head in result.stdout
    found = json.loads(CliRunner().invoke(main, [*words, "--json"]).stdout)["fit"]
    assert set(found["gain"]["losses"]) == {"base", "topk", "old_delta", "fitted", "tuned"}
    assert set(found["gain"]["shares"]) == {"topk", "old_delta", "fitted"}
    assert all(set(values) == {"new_base", "old_delta", "fitted"} for values in found["apart"].values())
    assert set(found["apart"]) == {found["measure"], *found["further"]}
    shown = CliRunner().invoke(main, ["info", str(tmp_path / "moved.shd")]).stdout
    for key in (
        "apart_new_base",
        "apart_old_delta",
        "apart_fitted",
        "distance_old_delta",
        "loss_old_delta",
        "old_base",
    ):
        assert f"{key}: " in shown


def test_a_fit_that_is_worse_than_the_old_delta_is_said_to_be(bases: tuple[Path, Path, Path], tmp_path: Path):
    """The same base twice: the old delta is the teacher itself, and few nonzeros cannot be."""
    old, _, style = bases
    report = moved((old, old, style), tmp_path / "same.shd", sparsity=0.005)
    assert report.fit.old_delta == pytest.approx(0, abs=1e-6)
    assert report.fit.apart[report.fit.measure]["new_base"] == 0
    assert "than the old delta as it was" in report.worse


@pytest.mark.slow
def test_a_full_fine_tune_goes_over_as_well(bases: tuple[Path, Path, Path], tmp_path: Path):
    old, new, style = bases
    shiradelta.apply(old, style, tmp_path / "tuned")
    one, other = (moved((old, new, source), tmp_path / "x.shd") for source in (style, tmp_path / "tuned"))
    assert other.fit.fitted == pytest.approx(one.fit.fitted, rel=1e-4)


def write(root: Path, tensors: dict[str, torch.Tensor]) -> Path:
    root.mkdir()
    save_file(tensors, root / "model.safetensors")
    return root


def test_the_change_is_from_the_new_base_to_what_the_old_one_gives(tmp_path: Path):
    """Values that are added, and elements that are set, in the rounding of the old base."""
    from shiradelta.converters.new_base import on_new_base

    from shiradelta.converters import open_source
    from shiradelta.models.checkpoint import open_checkpoint

    torch.manual_seed(0)
    old = {name: torch.randn(6, 5).bfloat16() for name in ("a", "b", "c")} | {"ids": torch.arange(3)}
    new = {name: w if name == "ids" else (w.float() + 0.1 * torch.randn(6, 5)).bfloat16() for name, w in old.items()}
    bases = [open_checkpoint(write(tmp_path / name, model)) for name, model in (("old", old), ("new", new))]
    bits = old["b"].view(torch.int16).numpy().view(np.uint16).reshape(-1)
    ones = np.full(2, 0x3F80, np.uint16)
    shiradelta.save_delta(
        tmp_path / "s.shd",
        {
            "a": shiradelta.TensorDelta((6, 5), [1, 7], [0.5, 1e-3], "bfloat16"),
            "b": shiradelta.TensorDelta((6, 5), [0, 4], ones, "bfloat16", "set", base_bits=bits[[0, 4]]),
        },
        values="f32",
    )
    shiradelta.apply(tmp_path / "old", tmp_path / "s.shd", tmp_path / "tuned")
    tuned = load_file(tmp_path / "tuned" / "model.safetensors")
    source, before = on_new_base(open_source(tmp_path / "s.shd", "shd", bases[0], None), *bases)
    for item in source.items:
        assert item.dense is not None
        wanted = tuned[item.name].float() - new[item.name].float()
        assert np.array_equal(item.dense()(0, 6), wanted.numpy())
    assert [item.name for item in source.items] == ["a", "b"]
    for target in before.base:
        assert np.array_equal(target.dense(), (old[target.name].float() - new[target.name].float()).flatten().numpy())
    assert [target.name for target in before.tuned] == ["a", "b", "c"]
    a, b = (target.dense() for target in before.delta)
    assert np.array_equal(a[[1, 7]], np.float32([0.5, 1e-3]))
    assert np.array_equal(b, (tuned["b"].float() - old["b"].float()).flatten().numpy())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.pop("model.norm.weight"),
            "1 tensor is not as in the old base .*: it lacks 'model.norm.weight'; a d",
        ),
        (lambda w: w.update(extra=torch.zeros(2)), "the old base lacks 'extra'"),
        (
            lambda w: w.update({"lm_head.weight": torch.zeros(65, 32)}),
            r"'lm_head.weight' has shape \[65, 32\], the old b",
        ),
        (
            lambda w: w.update({"lm_head.weight": torch.zeros(64, 32).int()}),
            "'lm_head.weight' is int32 and not the old b",
        ),
        (lambda w: [w.pop(name) for name in list(w)[:6]], "6 tensors are not as .* and 3 more"),
    ],
)
def test_other_bases_are_refused(bases: tuple[Path, Path, Path], tmp_path: Path, change: Any, message: str):
    old, new, style = bases
    shutil.copytree(new, tmp_path / "other")
    tensors = load_file(new / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "other" / "model.safetensors")
    with pytest.raises(SourceError, match=message):
        moved((old, tmp_path / "other", style), tmp_path / "out.shd")
    assert not (tmp_path / "out.shd").exists()


def test_what_does_not_go_over_is_refused(bases: tuple[Path, Path, Path], tmp_path: Path):
    old, new, style = bases
    with pytest.raises(BaseMismatchError, match="give the base that it was made for"):
        moved((new, old, style), tmp_path / "out.shd")
    base, fit = (f"--{what} \\({what.split()[0]}=\\)" for what in ("base MODEL", "fit TEXTS"))
    for given, missing in (({"base": new}, fit), ({"fit": Fit(EXAMPLES)}, base), ({}, f"{base} and {fit}")):
        with pytest.raises(ArgumentError, match=f"by a fit only; give {missing}, too"):
            shiradelta.convert(style, tmp_path / "out.shd", from_base=old, **given)
    with pytest.raises(ArgumentError, match="so from base cannot be chosen"):
        shiradelta.convert(new, tmp_path / "out.shd", base=old, lossless=True, from_base=old)
    added = shiradelta.TensorDelta((2,), None, np.zeros(2, np.uint32), "float32", "new")
    shiradelta.save_delta(tmp_path / "new.shd", {"extra": added})
    with pytest.raises(SourceError, match="'extra' is NEW, which does not go over to a new base"):
        moved((old, new, tmp_path / "new.shd"), tmp_path / "out.shd")
