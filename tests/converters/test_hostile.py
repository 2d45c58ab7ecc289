"""Sources from strangers: each is converted or refused in one line, soon.  What a fuzzer found has its name here."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import shiradelta
from shiradelta.errors import ShiraDeltaError, SourceError
from shiradelta.models.checkpoint import open_checkpoint
from tests.conftest import write_lora
from tests.converters.test_convert import MODULES

DEEP = "[" * 200_000 + "]" * 200_000


def refusal(source: Path, **options: Any) -> str:
    """The one line that refuses a source; nothing is written."""
    out = source.parent / "out.shd"
    with pytest.raises(ShiraDeltaError) as caught:
        shiradelta.convert(source, out, **options)
    assert not out.exists()
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 1000
    return line


# ------------------------------------------------------------------------------------------ configurations


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"alpha_pattern": [1]}, r"alpha_pattern is \[1\], not alphas by name; get it again"),
        ({"alpha_pattern": {"q": {}}, "lora_alpha": {}}, r"up_proj: alpha \{\} is not a finite number"),
        ({"alpha_pattern": {"(a+)+b|.*": "x"}}, "'x' is not a finite number"),
        ({"alpha_pattern": {r"(.)\1": 1}}, "adapter_config.json: alpha_pattern: .* unbounded time"),
        ({"rank_pattern": "q_proj"}, "rank_pattern is 'q_proj', not ranks by name"),
        ({"rank_pattern": {"(": 4}}, "rank_pattern: .* is not a regular expression"),
        ({"r": 4.0}, "r is 4.0, not an integer from 1 to"),
        ({"r": True}, "r is True, not an integer from 1 to"),
        ({"r": 0}, "r is 0, not an integer from 1 to"),
        ({"r": 10**400}, r"\(401 characters\), not an integer from 1 to 2\^31"),
        ({"rank_pattern": {".*proj": 10**4000}}, r"says 1000.* \[\.\.\. 3,\d+ characters \.\.\.\] .*another adapter's"),
        ({"lora_alpha": 10**400}, "is not a finite number"),
        ({"lora_alpha": float("inf")}, "inf is not a finite number"),
        ({"use_rslora": "no"}, "use_rslora is 'no', not true or false"),
        ({"fan_in_fan_out": 1}, "fan_in_fan_out is 1, not true or false"),
        ({"modules_to_save": 5}, "modules_to_save is 5, not a list of names"),
        ({"modules_to_save": "score"}, "modules_to_save is 'score', not a list of names"),
        ({"modules_to_save": [["score"]]}, "not a list of names"),
        ({"peft_type": {"a": 1}}, "can be converted"),
        ({"peft_type": "A" * 100_000}, "can be converted"),
        ({"init_r": -1}, "init_r is -1, not an integer from 1 to"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_configurations_of_other_types_are_refused_by_key(tmp_path: Path, config: dict[str, Any], message: str):
    assert re.search(message, refusal(write_lora(tmp_path / "lora", MODULES, config)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (DEEP, "is nested too deep|nested too deep"),
        ('{"r": ' + "9" * 10_000 + "}", "is not JSON"),
        ("[]", "is not a PEFT configuration"),
        ("{", "is not JSON"),
        ("\ud800", "is not JSON"),
        ('{"peft_type": "LORA\\ud800"}', "only LORA"),
    ],
)
def test_configurations_that_are_hardly_json(tmp_path: Path, text: str, message: str):
    lora = write_lora(tmp_path / "lora", MODULES, {})
    (lora / "adapter_config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert re.search(message, refusal(lora))


def test_a_configuration_of_gigabytes_is_not_read(tmp_path: Path):
    lora = write_lora(tmp_path / "lora", MODULES, {})
    with open(lora / "adapter_config.json", "wb") as stream:
        stream.truncate(8 << 30)
    assert "more than 100 MiB" in refusal(lora)


@pytest.mark.parametrize("text", ["{", "[]", DEEP, '"x"'])
def test_damaged_metadata_are_no_missing_metadata(tmp_path: Path, text: str):
    """Without an alpha the rank would be taken for it."""
    lora = write_lora(tmp_path / "lora", MODULES, {})
    (lora / "adapter_config.json").unlink()
    tensors = load_file(lora / "adapter_model.safetensors")
    save_file(tensors, lora / "x.safetensors", metadata={"lora_adapter_metadata": text})
    assert "lora_adapter_metadata in it is not a configuration" in refusal(lora / "x.safetensors")


# ------------------------------------------------------------------------------------- files that are none


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_pipe_in_the_place_of_a_file_is_refused_at_once(tmp_path: Path, name: str):
    lora = write_lora(tmp_path / "lora", MODULES, {})
    (lora / name).unlink()
    os.mkfifo(lora / name)
    assert re.search(f"{name}: .*not a regular file", refusal(lora))


def write_index(folder: Path, weight_map: object) -> Path:
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize(
    "weight_map",
    [
        {"a": "\0"},
        {"a": "x\ud800.safetensors"},
        {"a": "x" * 300},
        {"a": ""},
        {"a": "."},
        {"a": ".."},
        {"a": "../x.safetensors"},
        {"a": "/dev/zero"},
        {"a": 1},
        {"a": ["x"]},
        {"a": None, "b": "x"},
        ["a"],
        None,
    ],
    ids=lambda value: repr(value)[:30],
)
def test_an_index_with_impossible_names(tmp_path: Path, made: Path, weight_map: object):
    refusal(write_index(tmp_path / "tuned", weight_map), base=made / "bf16")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_an_index_that_names_a_pipe_or_a_device(tmp_path: Path, made: Path):
    folder = write_index(tmp_path / "tuned", {"a": "x.safetensors"})
    os.mkfifo(folder / "x.safetensors")
    assert "not a regular file" in refusal(folder, base=made / "bf16")
    (folder / "x.safetensors").unlink()
    (folder / "x.safetensors").symlink_to("/dev/zero")
    assert "not a regular file" in refusal(folder, base=made / "bf16")


def test_a_name_longer_than_any_file_may_have(tmp_path: Path):
    save_file({"a." * 600 + "diff": torch.ones(4)}, tmp_path / "x.safetensors")
    assert "has a name of 1,204 bytes" in refusal(tmp_path / "x.safetensors")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_for_a_delta_is_refused_at_once(tmp_path: Path, model: Path):
    os.mkfifo(tmp_path / "x.shd")
    with pytest.raises(ShiraDeltaError, match="not a regular file"):
        shiradelta.apply(model, tmp_path / "x.shd")


# ------------------------------------------------------------------------------------- what the fuzzer has found


def lora_of(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A file with a LoRA of one module, and further tensors."""
    save_file({"a.b.lora_A.weight": torch.ones(2, 8), "a.b.lora_B.weight": torch.ones(8, 2), **tensors}, path)
    return path


@pytest.mark.parametrize("count", [0, 1, 3])
def test_adalora_with_another_number_of_singular_values(tmp_path: Path, count: int):
    lora = write_lora(tmp_path / "lora", {"a.b": (8, 8)}, {"peft_type": "ADALORA", "init_r": 4})
    tensors = load_file(lora / "adapter_model.safetensors") | {"base_model.model.a.b.lora_E": torch.ones(count, 1)}
    save_file(tensors, lora / "adapter_model.safetensors")
    assert f"E has {count} value{'s' if count != 1 else ''} for rank 4" in refusal(lora)


@pytest.mark.parametrize("large", [1e34, 3e38])
def test_a_scale_that_overflows(tmp_path: Path, large: float):
    source = lora_of(tmp_path / "x.safetensors", {"a.b.lora_B.weight": torch.full((8, 2), large)})
    line = refusal(source, alpha=1e5)
    assert re.search("beyond float32|has NaN or infinity in it", line)


def test_lycoris_factors_that_overflow(tmp_path: Path):
    parts = {"w1_a": (8, 2), "w1_b": (2, 8), "w2_a": (8, 2), "w2_b": (2, 8)}
    save_file(
        {f"a.b.hada_{part}": torch.full(shape, 1e20) for part, shape in parts.items()}, tmp_path / "x.safetensors"
    )
    assert "has NaN or infinity in it" in refusal(tmp_path / "x.safetensors", alpha=1)


def test_lycoris_factors_without_elements(tmp_path: Path):
    save_file({"a.b.lokr_w1": torch.ones(0, 4), "a.b.lokr_w2": torch.ones(4, 4)}, tmp_path / "x.safetensors")
    assert "one of its factors has no elements" in refusal(tmp_path / "x.safetensors")


def test_a_signalling_nan(tmp_path: Path):
    bits = torch.tensor([0x7F800001] * 16, dtype=torch.int32).view(torch.float32)
    lora = lora_of(tmp_path / "x.safetensors", {"a.b.lora_B.weight": bits.reshape(8, 2)})
    assert "has NaN or infinity in it" in refusal(lora)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (torch.tensor([1, 2, 3], dtype=torch.int64), "3 indices, which are no pairs"),
        (torch.tensor([1.0, 0.5, 1.0, 0.5]), "not all of it are integers"),
        (torch.tensor([1.0, torch.nan]), "not all of it are integers"),
        (torch.tensor([1.0, torch.inf]), "not all of it are integers"),
        (torch.tensor([1.0, 1e30]), "not all of it are integers"),
        (torch.tensor([1, 0x7F800001], dtype=torch.int32).view(torch.float32), "not all of it are integers"),  # signals
        (torch.tensor([-1.0, 2.0], dtype=torch.bfloat16), "index outside of shape"),
        (torch.tensor([-1, 2], dtype=torch.int32), "index outside of shape"),
    ],
)
def test_indices_that_are_none(tmp_path: Path, made: Path, where: torch.Tensor, message: str):
    name = "model.layers.0.mlp.up_proj"
    tensors = {f"{name}.shira_indices": where, f"{name}.shira_weight": torch.ones(max(1, where.numel() // 2))}
    save_file(tensors, tmp_path / "x.safetensors")
    assert message in refusal(tmp_path / "x.safetensors", base=made / "bf16")


@pytest.mark.parametrize("kind", [10**4000, "x" * 100_000, ["x"] * 10_000, None])
def test_a_module_of_no_type(tmp_path: Path, model: Path, kind: object):
    (model / "modules.json").write_text(json.dumps([{"path": "0_Transformer", "type": kind}]))
    with pytest.raises(ShiraDeltaError) as caught:
        open_checkpoint(model)
    assert len(str(caught.value)) < 1000


def test_added_tensors_without_elements(tmp_path: Path, made: Path):
    tensors = load_file(made / "bf16" / "model.safetensors")
    empty = {f"extra.{i}": torch.empty(0, 8) for i in range(len(tensors))}
    save_file({**tensors, **empty}, tmp_path / "x.safetensors")
    with pytest.raises(ShiraDeltaError, match=r"same as the base|nothing"):
        shiradelta.convert(tmp_path / "x.safetensors", tmp_path / "out.shd", base=made / "bf16")


def test_refusals_are_source_errors(tmp_path: Path):
    with pytest.raises(SourceError):
        shiradelta.convert(write_lora(tmp_path / "lora", MODULES, {"r": "4"}))


def test_a_bias_without_elements(tmp_path: Path, made: Path):
    module = "model.layers.0.mlp.up_proj"
    lora = write_lora(tmp_path / "lora", {module: (96, 32)}, {"lora_bias": True})
    file = lora / "adapter_model.safetensors"
    save_file({**load_file(file), f"base_model.model.{module}.lora_B.bias": torch.empty(0)}, file)
    assert "bias" in refusal(lora, base=made / "bf16")
