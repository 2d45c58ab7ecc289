"""Fine-tunes and bases of one model in different forms: as the library saves it, as in memory, as on the hub."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

import shiradelta
from shiradelta.errors import SourceError
from tests.converters.test_experts import SIZES

Tensors = dict[str, Tensor]
Model = tuple[Path, Path, Tensors]


def folders(root: Path, model: nn.Module | Any) -> Model:
    """A base's folder, a fine-tune's, and the fine-tune's weights by name in memory."""
    model.save_pretrained(root / "base")
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.5 * torch.rand_like(weight)
    model.save_pretrained(root / "tuned")
    return root / "base", root / "tuned", {name: tensor.clone() for name, tensor in model.state_dict().items()}


def rewritten(folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """A copy of a folder with its tensors changed."""
    copy = folder.with_name(f"{folder.name}-rewritten")
    shutil.copytree(folder, copy)
    file = copy / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    return copy


def as_in_memory(model: type[Any]) -> Callable[[Path], Path]:
    def change(folder: Path) -> Path:
        weights = model.from_pretrained(folder).state_dict()
        return rewritten(folder, lambda _: {name: tensor.contiguous() for name, tensor in weights.items()})

    return change


def turned(folder: Path) -> Path:
    """A copy with stacked experts as [experts, in, out], as the hub has them."""

    def turn(name: str, tensor: Tensor) -> Tensor:
        return tensor.transpose(1, 2).contiguous() if ".experts." in name else tensor

    return rewritten(folder, lambda tensors: {name: turn(name, tensor) for name, tensor in tensors.items()})


def check(root: Path, base: Path, tuned: Path, model: type[Any], wanted: Tensors) -> None:
    """Checks that the fine-tune's file makes the base the fine-tune, and keeps its form."""
    report = shiradelta.convert(tuned, root / "x.shd", sparsity=1.0, base=base, values="f32")
    assert report.exact
    assert not report.warnings
    shiradelta.apply(base, root / "x.shd", out=root / "out")
    assert load_file(root / "out" / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()
    found = model.from_pretrained(root / "out").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def check_live(root: Path, folder: Path, model: type[Any], wanted: Tensors) -> None:
    """Checks that the file makes a live model the fine-tune, and back."""
    live = model.from_pretrained(folder)
    before = {name: tensor.clone() for name, tensor in live.state_dict().items()}
    swap = shiradelta.HotSwap(live)
    assert not swap.load("x", root / "x.shd").unchecked
    swap.switch("x")
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in live.state_dict().items())
    swap.revert()
    assert all(torch.equal(tensor, before[name]) for name, tensor in live.state_dict().items())


@pytest.fixture
def mixtral(tmp_path: Path) -> Model:
    torch.manual_seed(0)
    return folders(tmp_path, MixtralForCausalLM(MixtralConfig(**SIZES)))


def test_a_fine_tune_with_its_weights_as_in_memory_goes_into_a_base_as_saved(tmp_path: Path, mixtral: Model) -> None:
    base, tuned, wanted = mixtral
    check(tmp_path, base, as_in_memory(MixtralForCausalLM)(tuned), MixtralForCausalLM, wanted)


def test_a_fine_tune_as_saved_goes_into_a_base_with_its_weights_as_in_memory(tmp_path: Path, mixtral: Model) -> None:
    base, tuned, wanted = mixtral
    check(tmp_path, as_in_memory(MixtralForCausalLM)(base), tuned, MixtralForCausalLM, wanted)


def test_a_fine_tune_in_another_form_that_lacks_a_part_is_refused(tmp_path: Path, mixtral: Model) -> None:
    base, tuned, _ = mixtral
    part = next(name for name in load_file(tuned / "model.safetensors") if "experts.1." in name)
    less = rewritten(tuned, lambda tensors: {name: one for name, one in tensors.items() if name != part})
    with pytest.raises(SourceError, match="the fine-tune lacks the rest"):
        shiradelta.convert(less, tmp_path / "x.shd", sparsity=1.0, base=as_in_memory(MixtralForCausalLM)(base))


def test_tensors_in_another_form_are_refused_where_no_library_tells_what_they_are(
    tmp_path: Path, mixtral: Model
) -> None:
    base, tuned, _ = mixtral
    other = as_in_memory(MixtralForCausalLM)(tuned)
    (base / "config.json").unlink()
    with pytest.raises(SourceError, match="as many elements in other shapes"):
        shiradelta.convert(other, tmp_path / "x.shd", sparsity=1.0, base=base)


def test_a_fine_tune_that_has_a_tensor_in_both_forms_is_refused(tmp_path: Path, mixtral: Model) -> None:
    base, tuned, wanted = mixtral
    stacks = {name: tensor for name, tensor in wanted.items() if "experts" in name}
    both = rewritten(tuned, lambda tensors: tensors | {name: tensor.contiguous() for name, tensor in stacks.items()})
    with pytest.raises(SourceError, match="which is the same tensor; keep one"):
        shiradelta.convert(both, tmp_path / "x.shd", sparsity=1.0, base=base)


@pytest.fixture
def qwen3_vl_moe(tmp_path: Path) -> Model:
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    text = {**SIZES, "moe_intermediate_size": 12, "num_experts": 3, "rope_parameters": rope}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 16}
    vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    model = Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(text_config=text, vision_config=vision))
    return folders(tmp_path, model)


@pytest.mark.parametrize(
    "form",
    [
        "tuned as saved, base of the hub",
        pytest.param("tuned of the hub, base as saved", marks=pytest.mark.slow),
        pytest.param("both of the hub", marks=pytest.mark.slow),
    ],
)
def test_stacks_are_turned_as_the_library_does_on_loading(tmp_path: Path, qwen3_vl_moe: Model, form: str) -> None:
    base, tuned, wanted = qwen3_vl_moe
    one = base if form == "tuned of the hub, base as saved" else turned(base)
    other = tuned if form == "tuned as saved, base of the hub" else turned(tuned)
    check(tmp_path, one, other, Qwen3VLMoeForConditionalGeneration, wanted)
    for folder in base, turned(base) if one == base else one:
        check_live(tmp_path, folder, Qwen3VLMoeForConditionalGeneration, wanted)
