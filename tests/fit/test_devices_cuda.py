"""A fit and training over real devices: a GPU and the CPU, and two GPUs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from shiradelta.cli import main
from tests.fit.test_fit import FEW, fit, pair, texts  # noqa: F401

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
DEVICES = ["cuda:0,cpu", "cpu,cuda:0", *(pytest.param(two, marks=TWO) for two in ("cuda:0,cuda:1", "cuda:1,cuda:0"))]


@pytest.mark.parametrize(
    ("pair", "settings"),
    [
        ("causal", {"mask": "prune"}),
        ("causal", {"mask": "refit"}),
        ("causal", {"mask": "gradient", "scope": "model"}),
        ("causal", {"method": "refit", "generate": 8}),
        ("encoder", {"mask": "prune"}),
        ("classifier", {"mask": "refit"}),
    ],
    indirect=["pair"],
    ids=str,
)
@pytest.mark.parametrize("devices", DEVICES)
def test_a_model_over_devices_is_fitted_as_on_one(
    pair: tuple[Path, Path],  # noqa: F811
    tmp_path: Path,
    settings: dict[str, Any],
    devices: str,
):
    lines: list[str] = []
    one = fit(pair, tmp_path / "one.shd", **FEW, **settings, device="cuda:0")
    several = fit(pair, tmp_path / "several.shd", **FEW, **settings, device=devices, log=lines.append)
    first, second = devices.split(",")
    assert f"layers of the model: 1 on {first}, 1 on {second}" in lines
    assert several.fit.topk == pytest.approx(one.fit.topk, rel=0.02)
    if "generate" not in settings:  # each device has samples of its own
        assert several.fit.fitted == pytest.approx(one.fit.fitted, rel=0.15)
    assert several.fit.fitted < several.fit.base
    assert several.nnz == one.nnz


@pytest.mark.parametrize("pair", ["causal"], indirect=True)
@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("mask", ["rand", "grad"])
def test_a_model_over_devices_is_trained_as_on_one(
    pair: tuple[Path, Path],  # noqa: F811
    tmp_path: Path,
    devices: str,
    mask: str,
):
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(60)))
    words = ["train", str(pair[0]), "--texts", str(tmp_path / "texts.jsonl"), "--sparsity", "0.1", "--steps", "30"]
    words += ["--batch", "16", "--mask", mask, "--relative-lr", "0.1", "--json"]
    found = []
    for name, device in (("one", "cuda:0"), ("several", devices)):
        result = CliRunner().invoke(main, [*words, "--device", device, "-o", str(tmp_path / f"{name}.shd")])
        assert result.exit_code == 0, result.output
        found.append(json.loads(result.stdout))
    assert found[1]["after"] == pytest.approx(found[0]["after"], rel=0.05)
    assert found[1]["after"] < found[1]["before"]
