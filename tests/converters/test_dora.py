"""DoRA: against PEFT's merge, and against LyCORIS' formula."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import shiradelta
from shiradelta.errors import SourceError
from tests.conftest import write_model

LINEAR, CONV = (
    {"lora_down.weight": (2, 12), "lora_up.weight": (8, 2)},
    {
        "lora_down.weight": (2, 12, 3, 3),
        "lora_up.weight": (8, 2, 1, 1),
    },
)


class Layers(nn.Module):
    """One layer of each kind that PEFT makes a DoRA of."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.one = nn.Linear(12, 8), nn.Linear(12, 1)
        self.transposed, self.embedding = Conv1D(8, 12), nn.Embedding(20, 6)
        self.conv1, self.conv2, self.conv3 = nn.Conv1d(4, 6, 3), nn.Conv2d(4, 6, (3, 2)), nn.Conv3d(2, 3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def peft_dora(folder: Path, dtype: torch.dtype, **options: object) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """(the base's folder, the adapter's, the weights that PEFT merges in float32)."""
    torch.manual_seed(0)
    layers = Layers()
    for parameter in layers.parameters():
        parameter.data = parameter.data.to(dtype).float()
    base = write_model(folder / "base", {name: tensor.to(dtype) for name, tensor in layers.state_dict().items()})
    targets = [name for name, _ in layers.named_children()]
    tuned = get_peft_model(layers, LoraConfig(target_modules=targets, r=2, lora_alpha=3, use_dora=True, **options))
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            change = torch.rand_like(parameter) + 0.5 if "magnitude" in name else torch.randn_like(parameter)
            parameter.data = change
    tuned.save_pretrained(folder / "lora")
    return base, folder / "lora", dict(tuned.merge_and_unload(safe_merge=True).state_dict())


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=str)
def test_every_layer_changes_as_peft_merges_it(tmp_path: Path, options: dict[str, object]):
    base, lora, merged = peft_dora(tmp_path, torch.float32, **options)
    report = shiradelta.convert(lora, sparsity=1, base=base, values="f32")
    assert len(report.tensors) == 7
    shiradelta.apply(base, tmp_path / "lora.shd")
    for name, tensor in load_file(base / "model.safetensors").items():
        torch.testing.assert_close(tensor, merged[name], rtol=2e-6, atol=2e-6, msg=name)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_the_change_of_a_base_in_half_precision_is_that_in_float32(tmp_path: Path):
    base, lora, merged = peft_dora(tmp_path, torch.bfloat16)
    shiradelta.convert(lora, tmp_path / "x.shd", sparsity=1, base=base, values="f32")
    before = load_file(base / "model.safetensors")
    with shiradelta.open_delta(tmp_path / "x.shd") as delta:
        for name in delta:
            change = torch.zeros(before[name].numel())
            change[torch.from_numpy(delta[name].positions())] = torch.from_numpy(delta[name].values())
            wanted = merged[name] - before[name].float()
            torch.testing.assert_close(change.reshape(wanted.shape), wanted, rtol=1e-5, atol=2e-6, msg=name)


def lycoris(folder: Path, shapes: dict[str, tuple[int, ...]], lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """A base with one layer, an adapter of LyCORIS beside it, and the layer's weight as LyCORIS computes it."""
    torch.manual_seed(1)
    parts = {name: torch.randn(shape) for name, shape in shapes.items()}
    down, up = parts["lora_down.weight"], parts["lora_up.weight"]
    weight, magnitudes = torch.randn(up.shape[0], *down.shape[1:]), torch.rand(lengths) + 0.5
    write_model(folder / "base", {"block.x.weight": weight})
    held = {**parts, "alpha": torch.tensor(3.0), "dora_scale": magnitudes}
    save_file({f"lycoris_block_x.{part}": tensor for part, tensor in held.items()}, folder / "lora.safetensors")
    summed = weight + 1.5 * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    dims = [dim for dim in range(weight.dim()) if lengths[dim] == 1]
    return {"block.x.weight": magnitudes / summed.square().sum(dim=dims, keepdim=True).sqrt() * summed}


@pytest.mark.parametrize("values", [1 << 20, 7])
@pytest.mark.parametrize(
    ("shapes", "lengths"),
    [(LINEAR, (8, 1)), (LINEAR, (1, 12)), (CONV, (8, 1, 1, 1)), (CONV, (1, 12, 1, 1))],
    ids=["linear-out", "linear-in", "conv-out", "conv-in"],
)
def test_lycoris_has_lengths_of_outputs_or_of_inputs(
    tmp_path: Path,
    shapes: dict[str, tuple[int, ...]],
    lengths: tuple[int, ...],
    values: int,
    monkeypatch: pytest.MonkeyPatch,
):
    """Also where a row of what is computed is a part of an output's, as in large convolutions."""
    monkeypatch.setattr("shiradelta.select.topk._BLOCK_ELEMENTS", values)
    wanted = lycoris(tmp_path, shapes, lengths)
    shiradelta.convert(tmp_path / "lora.safetensors", sparsity=1, base=tmp_path / "base", values="f32")
    shiradelta.apply(tmp_path / "base", tmp_path / "lora.shd")
    found = load_file(tmp_path / "base/model.safetensors")
    torch.testing.assert_close(found, wanted, rtol=2e-6, atol=2e-6)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_without_a_base_a_dora_says_nothing(tmp_path: Path):
    _, lora, _ = peft_dora(tmp_path, torch.float32)
    with pytest.raises(SourceError, match="is a DoRA, whose change depends on the base's weights; give --base MODEL"):
        shiradelta.convert(lora)


def edited(folder: Path, change: dict[str, torch.Tensor | None], **config: object) -> Path:
    """A DoRA of one layer, with other tensors."""
    lora = folder / "lora"
    lora.mkdir()
    held: dict[str, torch.Tensor | None] = {
        "lora_A.weight": torch.ones(2, 8),
        "lora_B.weight": torch.ones(4, 2),
        "lora_magnitude_vector": torch.ones(4),
        **change,
    }
    tensors = {f"base_model.model.x.{part}": tensor for part, tensor in held.items() if tensor is not None}
    save_file(tensors, lora / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "use_dora": True, **config}
    (lora / "adapter_config.json").write_text(json.dumps(about))
    return lora


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (
            {"lora_magnitude_vector": torch.ones(5)},
            {},
            r"magnitudes .* of shape \[5\] do not fit a tensor of shape \[4, 8",
        ),
        ({"lora_magnitude_vector": torch.ones(8)}, {}, "do not fit"),
        ({"lora_magnitude_vector": torch.ones(4).int()}, {}, "are int32"),
        ({"lora_magnitude_vector": torch.full((4,), torch.nan)}, {}, "NaN"),
        ({"lora_magnitude_vector": None}, {}, "use_dora is true, and 'x' lacks magnitudes"),
        ({}, {"use_dora": False}, "use_dora is false, and 'x' has magnitudes"),
        ({"lora_A.weight": None, "lora_B.weight": None}, {}, "of a DoRA whose factors are not here"),
        ({"lora_magnitude_vector.default.weight": torch.ones(4)}, {}, "are the same; remove one"),
        ({"lora_magnitude_vector.other.weight": torch.ones(4)}, {}, "named after the adapter"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, change: dict[str, torch.Tensor | None], config: dict[str, object], message: str
):
    base = write_model(tmp_path / "base", {"x.weight": torch.ones(4, 8)})
    with pytest.raises(SourceError, match=message):
        shiradelta.convert(edited(tmp_path, change, **config), sparsity=1, base=base)


def test_a_base_of_zeros_has_no_direction(tmp_path: Path):
    base = write_model(tmp_path / "base", {"x.weight": torch.zeros(4, 8)})
    lora = edited(tmp_path, {"lora_B.weight": torch.zeros(4, 2)})
    with pytest.raises(SourceError, match="NaN"):
        shiradelta.convert(lora, sparsity=1, base=base)


def test_a_tied_weight_that_two_modules_change(tmp_path: Path):
    base = write_model(tmp_path / "base", {"model.embed_tokens.weight": torch.randn(20, 6)})
    lora = tmp_path / "lora"
    lora.mkdir()
    tensors = {
        "lm_head.lora_A.weight": torch.ones(2, 6),
        "lm_head.lora_B.weight": torch.ones(20, 2),
        "lm_head.lora_magnitude_vector": torch.ones(20),
        "model.embed_tokens.lora_embedding_A": torch.ones(2, 20),
        "model.embed_tokens.lora_embedding_B": torch.ones(6, 2),
        "model.embed_tokens.lora_magnitude_vector": torch.ones(6),
    }
    save_file({f"base_model.model.{key}": held for key, held in tensors.items()}, lora / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "use_dora": True}
    (lora / "adapter_config.json").write_text(json.dumps(about))
    with pytest.raises(SourceError, match="is a DoRA of a tensor that another module changes too"):
        shiradelta.convert(lora, base=base)
