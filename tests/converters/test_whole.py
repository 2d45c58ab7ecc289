"""Whole or refused: what a source holds and the file lacks is an error, or allowed by a pattern and counted as lost."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import shiradelta
from shiradelta.cli import main
from shiradelta.converters import SkipReason
from shiradelta.errors import ArgumentError, SourceError
from tests.conftest import write_lora, write_model

HERE, ELSEWHERE = "here", "other.elsewhere"
MODULES = {HERE: (24, 16), ELSEWHERE: (40, 16)}
#: Parts of a kohya file -> shapes.
PARTS = {"lora_down": (4, 16), "lora_up": (16, 4)}


def write(folder: Path) -> tuple[Path, Path]:
    """A LoRA of two modules, and a base that has only one."""
    lora = write_lora(folder / "lora", MODULES, {"lora_alpha": 8})
    return lora, write_model(folder / "base", {f"{HERE}.weight": torch.zeros(24, 16)})


def energy(lora: Path, module: str) -> float:
    """The squared norm of a module's change, by other code."""
    tensors = load_file(lora / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "AB")
    return float(((8 / a.shape[0] * (b @ a)) ** 2).sum())


def test_reasons_that_lose_nothing():
    assert {reason for reason in SkipReason if not reason.loses} == {SkipReason.DUPLICATE, SkipReason.EMPTY}


@pytest.mark.parametrize("pattern", [ELSEWHERE, "*elsewhere*", "other.elsewhere.weight", "*.elsewhere.lora_A.*", "*"])
def test_what_is_skipped_is_energy_lost_and_said(tmp_path: Path, pattern: str):
    lora, base = write(tmp_path)
    with pytest.raises(SourceError, match=r"lora: 1 tensor cannot be converted: other.elsewhere: the base has no such"):
        shiradelta.convert(lora, base=base)
    assert not (tmp_path / "lora.shd").exists()
    report = shiradelta.convert(lora, None, 1.0, base, "f32", skip=pattern)
    here, lost = energy(lora, HERE), energy(lora, ELSEWHERE)
    assert report.energy_kept == pytest.approx(here / (here + lost), rel=1e-5)
    assert report.lost == {ELSEWHERE: pytest.approx(lost, rel=1e-5)}
    assert ELSEWHERE in report.skipped
    assert any("1 tensor skipped" in warning and ELSEWHERE in warning for warning in report.warnings)
    with shiradelta.open_delta(tmp_path / "lora.shd") as delta:
        assert delta.metadata["skipped"] == f"1 by {pattern}"
        assert float(delta.metadata["energy_kept"]) == pytest.approx(report.energy_kept, abs=1e-4)


def test_from_the_command_line(tmp_path: Path):
    lora, base = write(tmp_path)
    arguments = ["convert", str(lora), "--base", str(base), "--json"]
    refused = CliRunner().invoke(main, arguments)
    assert refused.exit_code == 1
    assert refused.stderr.count("\n") == 1
    assert "--skip PATTERN" in refused.stderr
    found = CliRunner().invoke(main, [*arguments, "--skip", "*elsewhere"])
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["lost"] == {ELSEWHERE: pytest.approx(energy(lora, ELSEWHERE), rel=1e-5)}
    assert ELSEWHERE in json.loads(found.stdout)["skipped"]


@pytest.mark.parametrize("patterns", ["nothing*", ["*elsewhere", "nothing*"], [HERE, "*elsewhere"]])
def test_a_pattern_that_matches_nothing_is_an_error(tmp_path: Path, patterns: str | list[str]):
    lora, base = write(tmp_path)
    unused = HERE if HERE in patterns else r"nothing\*"
    with pytest.raises(ArgumentError, match=f"skip pattern '{unused}' matches no tensor"):
        shiradelta.convert(lora, base=base, skip=patterns)


def test_a_change_of_zero_is_no_loss(tmp_path: Path):
    lora, base = write(tmp_path)
    tensors = load_file(lora / "adapter_model.safetensors")
    tensors[f"base_model.model.{ELSEWHERE}.lora_B.weight"].zero_()
    save_file(tensors, lora / "adapter_model.safetensors")
    report = shiradelta.convert(lora, None, 1.0, base, "f32")
    assert (list(report.skipped), report.lost) == ([ELSEWHERE], {})
    assert report.energy_kept == pytest.approx(1)


@pytest.mark.parametrize("rows", [20, 28])
def test_the_energy_of_a_resized_tensor(tmp_path: Path, rows: int):
    """Rows that both have change; the others come or go whole."""
    torch.manual_seed(0)
    base, tuned = ({"embed": torch.randn(size, 8, 6), "w": torch.randn(4, 4)} for size in (24, rows))
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "tuned", tuned)
    with pytest.raises(SourceError, match=r"embed: its shape is \[\d+, 8, 6\]"):
        shiradelta.convert(tmp_path / "tuned", base=tmp_path / "base")
    report = shiradelta.convert(tmp_path / "tuned", None, 1.0, tmp_path / "base", "f32", skip="embed")
    padded = [np.pad(m["embed"].numpy(), ((0, 28 - len(m["embed"])), (0, 0), (0, 0))) for m in (base, tuned)]
    lost = float(((padded[1] - padded[0]).astype("f8") ** 2).sum())
    assert report.lost == {"embed": pytest.approx(lost, rel=1e-5)}


def test_what_cannot_be_counted_is_said(tmp_path: Path):
    lora, base = write(tmp_path)
    tensors = load_file(lora / "adapter_model.safetensors")
    del tensors[f"base_model.model.{ELSEWHERE}.lora_B.weight"]
    save_file(tensors, lora / "adapter_model.safetensors")
    report = shiradelta.convert(lora, None, 1.0, base, "f32", skip="*")
    assert report.lost == {ELSEWHERE: None}
    assert (report.energy_kept, report.error, report.as_dict()["energy_kept"]) == (None, None, None)
    assert "unknown share of the update's energy kept" in report.summary
    assert any(f"the energy kept is unknown, as nothing tells the change of {ELSEWHERE}" in w for w in report.warnings)
    with shiradelta.open_delta(tmp_path / "lora.shd") as delta:
        assert delta.metadata["energy_kept"] == "unknown"
    shown = CliRunner().invoke(main, ["info", str(tmp_path / "lora.shd")])
    assert "energy_kept: unknown" in shown.stdout
    assert shiradelta.convert(lora, base=base, skip="*", target_size="2KB").energy_kept is None
    with pytest.raises(SourceError, match=f"the error is unknown, as nothing tells the change of '{ELSEWHERE}'"):
        shiradelta.convert(lora, base=base, skip="*", target_error=0.5)


def test_a_tensor_of_another_width_has_an_unknown_change(tmp_path: Path):
    base, tuned = ({"embed": torch.randn(24, width), "w": torch.randn(4, 4)} for width in (8, 12))
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "tuned", tuned)
    arguments = ["convert", str(tmp_path / "tuned"), "--base", str(tmp_path / "base"), "--skip", "embed"]
    shown = CliRunner().invoke(main, arguments)
    assert shown.exit_code == 0, shown.output
    assert "100" not in shown.stdout.partition("weights change")[2]
    found = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).stdout)
    assert (found["energy_kept"], found["error"], found["lost"]) == (None, None, {"embed": None})


def stacked(*prefixes: str) -> dict[str, tuple[int, int]]:
    return {f"{prefix}layers.{i}.proj": (16, 16) for prefix in prefixes for i in range(3)}


@pytest.mark.parametrize("kind", ["lora", "diff", "full"])
def test_a_skipped_tensor_makes_no_other_unclear(tmp_path: Path, kind: str):
    """Text and vision both may be the base's layers, until one of them is left out."""
    shapes = {f"{module}.weight": shape for module, shape in stacked("").items()}
    base = write_model(tmp_path / "base", {name: torch.zeros(shape) for name, shape in shapes.items()})
    if kind == "lora":
        source = write_lora(tmp_path / "source", stacked("text.", "vision."), {"lora_alpha": 8})
    else:
        ones = {f"{name}.weight": torch.ones(shape) for name, shape in stacked("text.", "vision.").items()}
        source = write_model(tmp_path / "source", ones)
    with pytest.raises(SourceError, match=r"may both be 'layers\.\d\.proj\.weight'"):
        shiradelta.convert(source, base=base, kind=kind)
    report = shiradelta.convert(source, None, 1.0, base, "f32", kind=kind, skip="*vision.*")
    assert {tensor.name for tensor in report.tensors} == shapes.keys()
    assert len(report.lost) == 3
    with pytest.raises(SourceError, match="nothing in it can be converted"):
        shiradelta.convert(source, base=base, kind=kind, skip="*")


def test_a_skipped_half_may_be_what_an_underscore_hides(tmp_path: Path):
    names = ("a.b_c", "a_b.c", "d")
    base = write_model(tmp_path / "base", {f"{name}.weight": torch.zeros(16, 16) for name in names})
    keys = ("lora_unet_a_b_c", "lora_unet_d")
    factors = {f"{key}.{part}.weight": torch.ones(shape) for key in keys for part, shape in PARTS.items()}
    save_file(factors, tmp_path / "x.safetensors")
    with pytest.raises(SourceError, match=r"'a_b_c.weight' may be 'a\.b_c\.weight' or 'a_b\.c\.weight'"):
        shiradelta.convert(tmp_path / "x.safetensors", base=base)
    report = shiradelta.convert(tmp_path / "x.safetensors", base=base, skip="*a_b_c*")
    assert [tensor.name for tensor in report.tensors] == ["d.weight"]


def test_an_untied_output_may_be_skipped(tmp_path: Path):
    """Its change counts as lost."""
    base, tuned = torch.randn(24, 8), torch.randn(24, 8)
    write_model(tmp_path / "base", {"embed_tokens.weight": base})
    write_model(tmp_path / "tuned", {"embed_tokens.weight": base + 1, "lm_head.weight": tuned})
    with pytest.raises(SourceError, match=r"lm_head\.weight: the fine-tune untied its embeddings"):
        shiradelta.convert(tmp_path / "tuned", base=tmp_path / "base")
    report = shiradelta.convert(tmp_path / "tuned", None, 1.0, tmp_path / "base", "f32", skip="lm_head*")
    assert report.lost == {"lm_head.weight": pytest.approx(float(((tuned - base).double() ** 2).sum()), rel=1e-4)}


def test_an_error_includes_what_is_skipped(tmp_path: Path):
    lora, base = write(tmp_path)
    here, lost = energy(lora, HERE), energy(lora, ELSEWHERE)
    least = (lost / (here + lost)) ** 0.5
    with pytest.raises(SourceError, match=f"what is skipped {least:.2f}"):
        shiradelta.convert(lora, base=base, skip="*", target_error=0.9 * least, values="f32")
    report = shiradelta.convert(lora, base=base, skip="*", target_error=(1 + least) / 2, values="f32")
    assert report.error <= (1 + least) / 2


@pytest.mark.parametrize("same", [True, False])
def test_a_copy_of_the_base_beside_factors(tmp_path: Path, same: bool):
    """PEFT saves an embedding with its LoRA; a copy that differs from the base is a second change."""
    torch.manual_seed(0)
    weight = torch.randn(24, 16)
    base = write_model(tmp_path / "base", {f"{HERE}.weight": weight})
    lora = write_lora(tmp_path / "lora", {HERE: (24, 16)}, {"lora_alpha": 8})
    tensors = load_file(lora / "adapter_model.safetensors")
    tensors[f"base_model.model.{HERE}.base_layer.weight"] = weight.clone() if same else weight + 1
    save_file(tensors, lora / "adapter_model.safetensors")
    if same:
        assert shiradelta.convert(lora, None, 1.0, base).lost == {}
    else:
        with pytest.raises(SourceError, match=r"'here\.weight' is changed by other tensors"):
            shiradelta.convert(lora, base=base)
        report = shiradelta.convert(lora, None, 1.0, base, skip="*base_layer*")
        assert list(report.lost.values()) == [pytest.approx(24 * 16, rel=1e-4)]
