"""Quantised checkpoints are refused in one line that says what works, whatever command meets them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import shiradelta
from shiradelta.errors import ShiraDeltaError

BYTES, SCALES = torch.zeros(8, 4, dtype=torch.uint8), torch.ones(8, 1)
INTS, ZEROS = torch.zeros(4, 2, dtype=torch.int32), torch.zeros(1, 2, dtype=torch.int32)
#: What each producer stores of a layer "l" in place of its weight.
PACKED: dict[str, dict[str, torch.Tensor]] = {
    "bitsandbytes, 4 bits": {
        "l.weight": torch.zeros(16, 1, dtype=torch.uint8),
        "l.weight.absmax": torch.ones(1),
        "l.weight.quant_map": torch.ones(16),
        "l.weight.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8),
    },
    "bitsandbytes, 8 bits": {"l.weight": torch.zeros(8, 4, dtype=torch.int8), "l.SCB": torch.ones(8)},
    "GPTQ": {"l.qweight": INTS, "l.qzeros": ZEROS, "l.scales": SCALES.half(), "l.g_idx": INTS[:, 0].clone()},
    "AWQ": {"l.qweight": INTS, "l.qzeros": ZEROS, "l.scales": SCALES.half()},
    "compressed-tensors": {"l.weight_packed": INTS, "l.weight_scale": SCALES, "l.weight_shape": torch.tensor([8, 4])},
    "NVFP4": {
        "l.weight": BYTES,
        "l.weight_scale": SCALES.to(torch.float8_e4m3fn),
        "l.weight_scale_2": torch.tensor(1.0),
    },
    "MXFP4": {"l.gate_up_proj_blocks": BYTES, "l.gate_up_proj_scales": torch.zeros(8, 1, dtype=torch.uint8)},
    "int8": {"l.weight": BYTES.to(torch.int8), "l.weight_scale": SCALES},
    "ComfyUI": {"l.weight": BYTES, "l.weight_scale": SCALES, "l.comfy_quant": BYTES[0].clone()},
    "HQQ": {"l.W_q": BYTES, "l.scale": SCALES, "l.zero": SCALES + 1},
    "quanto": {"l.weight._data": BYTES.to(torch.int8), "l.weight._scale": SCALES},
}
#: quantization_config -> whether its elements are float8 weights.
CONFIGS: list[tuple[dict[str, Any], bool]] = [
    ({"quant_method": "fp8", "weight_block_size": [128, 128]}, True),
    ({"quant_method": "fbgemm_fp8"}, True),
    ({"quant_method": "compressed-tensors", "format": "float-quantized"}, True),
    ({"quant_method": "modelopt", "quant_algo": "FP8"}, True),
    ({}, True),
    ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, False),
    ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, False),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, False),
    ({"quant_method": "mxfp4"}, False),
    ({"quant_method": "torchao"}, False),
    ({"quant_method": "of tomorrow"}, False),
    ({"load_in_4bit": True}, False),
]


def write(folder: Path, tensors: dict[str, torch.Tensor], quantised: dict[str, Any] | None = None) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    about = {} if quantised is None else {"quantization_config": quantised}
    (folder / "config.json").write_text(json.dumps(about))
    return folder


def refused(message: str, function: Any, *arguments: Any, **options: Any) -> None:
    with pytest.raises(ShiraDeltaError, match=message) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("; give the unquantised model, and quantise the result")


@pytest.mark.parametrize("lone_file", [True, False])
@pytest.mark.parametrize("kind", PACKED)
def test_packed_weights_are_refused_without_a_configuration(tmp_path: Path, made: Path, kind: str, lone_file: bool):
    folder = write(tmp_path / "m", {**PACKED[kind], "norm.weight": torch.ones(4)})
    path = folder / "model.safetensors" if lone_file else folder
    refused("is packed", shiradelta.convert, made / "tuned_a", tmp_path / "out.shd", base=path)
    refused("is packed", shiradelta.convert, path, tmp_path / "out.shd", base=made / "bf16")
    for function in (shiradelta.apply, shiradelta.verify):
        refused("is packed", function, folder, made / "a.shd")
    refused("is packed", shiradelta.export, made / "a.shd", "sparse", tmp_path / "x.safetensors", model=path)
    assert not (tmp_path / "out.shd").exists()


@pytest.mark.parametrize(("config", "read"), CONFIGS)
def test_only_float8_configurations_are_read(tmp_path: Path, made: Path, config: dict[str, Any], read: bool):
    folder = write(tmp_path / "m", {"l.weight": torch.ones(4, 4).to(torch.float8_e4m3fn)}, config)
    if read:
        tensor = shiradelta.TensorDelta((4, 4), [1], np.array([3], np.uint8), "float8_e4m3fn", "set")
        shiradelta.save_delta(tmp_path / "x.shd", {"l.weight": tensor})
        assert shiradelta.apply(folder, tmp_path / "x.shd").changed == 1
    else:
        refused("belongs to a quantised model", shiradelta.apply, folder, made / "a.shd")


def test_plain_models_with_such_names_are_read(tmp_path: Path):
    """A learned scale, and integers, without what makes a packed format."""
    plain = {"attn.q": torch.ones(4, 4), "attn.q_scale": torch.ones(1), "ids": INTS, "x_blocks": BYTES}
    base = write(tmp_path / "base", plain)
    tuned = write(tmp_path / "tuned", {**plain, "attn.q_scale": torch.full((1,), 2.0)})
    report = shiradelta.convert(tuned, tmp_path / "x.shd", base=base)
    assert [tensor.name for tensor in report.tensors] == ["attn.q_scale"]
