"""LoRA on models whose layers the library renames, stacks, splits or ties on loading: as PEFT merges, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

import shiradelta
from benchmarks.architectures.columns import COLUMNS, Case
from benchmarks.architectures.rows import ROWS
from shiradelta.errors import SourceError

pytestmark = pytest.mark.filterwarnings("ignore")  # of PEFT and transformers about each other

#: Both halves of vision-language models, an encoder beside a decoder, renamed layers, split and fused ones.
QUICK = ("gemma3",)
OTHERS = (
    "whisper",
    "vit",
    "llava",
    "qwen2.5-vl",
    "swin",
    "dinov2",
    "detr",
    "phimoe",
    "jina-embeddings-v3",
    "paligemma",
    "mpt",
)


@pytest.mark.parametrize("row", [*QUICK, *(pytest.param(row, marks=pytest.mark.slow) for row in OTHERS)])
def test_every_linear_layer_changes_as_peft_merges(row: str, tmp_path: Path):
    COLUMNS["lora-linear"](Case(ROWS[row], tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_a_half_that_was_adapted_alone_is_not_taken_for_the_other(half: str, tmp_path: Path):
    """Its names lack what tells the halves apart."""
    case = Case(ROWS["whisper"], tmp_path)
    part = case.load(case.base).model.get_submodule(half)
    config = LoraConfig(r=2, target_modules=["self_attn.q_proj"], init_lora_weights=False)
    get_peft_model(part, config).save_pretrained(tmp_path / "lora")
    name = r"layers\.\d\.self_attn\.q_proj\.weight"
    message = rf"'{name}' may be 'model\.decoder\.{name}' or 'model\.encoder\.{name}'"
    with pytest.raises(SourceError, match=message):
        shiradelta.convert(tmp_path / "lora", tmp_path / "a.shd", base=case.base)
    assert not (tmp_path / "a.shd").exists()


def test_a_half_that_was_adapted_in_the_whole_model(tmp_path: Path):
    case = Case(ROWS["whisper"], tmp_path)
    model = case.load(case.base)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = LoraConfig(r=2, target_modules=r".*encoder.*q_proj", init_lora_weights=False)
    tuned = get_peft_model(model, config)
    tuned.save_pretrained(tmp_path / "lora")
    merged = tuned.merge_and_unload().state_dict()
    report = shiradelta.convert(tmp_path / "lora", tmp_path / "a.shd", 1.0, case.base, "f32")
    changed = [name for name in before if not torch.equal(merged[name], before[name])]
    assert changed
    assert sorted(tensor.name for tensor in report.tensors) == sorted(changed)
