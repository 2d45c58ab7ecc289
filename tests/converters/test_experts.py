"""LoRA on parameters by name (PEFT's target_parameters): stacked experts change as where PEFT merges them."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
)

import shiradelta
from shiradelta.errors import SourceError
from tests.conftest import write_model

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 32,
    "num_local_experts": 3,
    "num_experts_per_tok": 1,
}
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
EXPERTS = "model.layers.0.mlp.experts"


def mixtral(**sizes: Any) -> Any:
    return MixtralForCausalLM(MixtralConfig(**{**SIZES, **sizes}))


def gpt_oss(**sizes: Any) -> Any:
    return GptOssForCausalLM(GptOssConfig(**{**SIZES, "layer_types": ["full_attention"], **sizes}))


def llama4(**sizes: Any) -> Any:
    config = Llama4TextConfig(**{**SIZES, "intermediate_size_mlp": 24, "moe_layers": [0], **sizes})
    return Llama4ForCausalLM(config)


def nemotron(**sizes: Any) -> Any:
    layers = {"layers_block_type": ["moe"], "n_routed_experts": 3, "n_group": 1, "topk_group": 1}
    widths = {"moe_intermediate_size": 24, "moe_shared_expert_intermediate_size": 8}
    return NemotronHForCausalLM(NemotronHConfig(**{**SIZES, **layers, **widths, **sizes}))


def make(folder: Path, build: Callable[..., Any], config: dict[str, Any], **sizes: Any) -> dict[str, Tensor]:
    """A base and a LoRA of it; returns what the LoRA changes where PEFT merges it, by name in memory."""
    torch.manual_seed(0)
    model = build(**sizes)
    model.save_pretrained(folder / "base")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lora = LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": [], "init_lora_weights": False, **config})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that patterns match no module
        tuned = get_peft_model(model, lora)
    tuned.save_pretrained(folder / "lora")
    after = tuned.merge_and_unload().state_dict()
    return {name: after[name] - before[name] for name in before if not torch.equal(after[name], before[name])}


@cache
def class_of(build: Callable[..., Any]) -> Any:
    return type(build())


def changed(folder: Path, build: Callable[..., Any]) -> dict[str, Tensor]:
    """What a conversion changes in the loaded base, by name in memory."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    shiradelta.convert(folder / "lora", folder / "a.shd", 1.0, folder / "base", "f32")
    shiradelta.apply(folder / "base", folder / "a.shd", out=folder / "out")
    kind = class_of(build)
    before, after = (kind.from_pretrained(folder / name).state_dict() for name in ("base", "out"))
    return {name: after[name] - before[name] for name in before if not torch.equal(after[name], before[name])}


def check(folder: Path, build: Callable[..., Any], merged: dict[str, Tensor], count: int) -> None:
    found = changed(folder, build)
    assert len(merged) == count
    assert found.keys() == merged.keys()
    for name, change in merged.items():
        torch.testing.assert_close(found[name], change, rtol=1e-4, atol=1e-5)


def configure(folder: Path, **settings: Any) -> None:
    file = folder / "lora" / "adapter_config.json"
    config = {**json.loads(file.read_text()), **settings}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.mark.parametrize(
    ("build", "targets", "count"),
    [
        (mixtral, BOTH, 2),
        *(
            pytest.param(mixtral, *rest, marks=pytest.mark.slow)
            for rest in ((BOTH[::-1], 2), (BOTH[:1], 1), (["down_proj"], 1))
        ),
        (mixtral, [f"{EXPERTS}.down_proj", "mlp.gate.weight", "q_proj.weight"], 3),
        (gpt_oss, BOTH, 2),
        pytest.param(llama4, BOTH, 2, marks=pytest.mark.slow),
        (nemotron, ["experts.up_proj", "experts.down_proj"], 2),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_as_peft_merges(tmp_path: Path, build: Callable[..., Any], targets: list[str], count: int):
    """Bases store these stacked, or one tensor an expert; matrices are [out, in] or [in, out]."""
    check(tmp_path, build, make(tmp_path, build, {"target_parameters": targets}), count)


def test_ranks_scales_and_modules_beside_parameters(tmp_path: Path):
    """Patterns match a parameter's name, not its module's."""
    config = {
        "target_parameters": BOTH,
        "target_modules": ["q_proj"],
        "rank_pattern": {r".*\.gate_up_proj": 5, "experts": 7},
        "alpha_pattern": {r".*experts\.down_proj": 11, "q_proj": 3},
        "use_rslora": True,
    }
    check(tmp_path, mixtral, make(tmp_path, mixtral, config), 3)


def test_as_peft_converts_adapters_of_single_experts(tmp_path: Path):
    """PEFT takes names of single experts' layers for the parameters that they became, and doubles the rank of two."""
    merged = make(tmp_path, mixtral, {"target_modules": ["w1", "w2", "w3"]})
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert sorted(config["target_parameters"]) == ["down_proj", "gate_up_proj"]
    check(tmp_path, mixtral, merged, 2)


# ------------------------------------------------------------------------- what shapes do not tell


def test_parameters_of_one_shape_follow_the_models_order(tmp_path: Path):
    """[out, in] of one is [in, out] of the other."""
    targets = {"target_parameters": ["experts.down_proj", "experts.up_proj"]}
    check(tmp_path, nemotron, make(tmp_path, nemotron, targets, moe_intermediate_size=16), 2)


@pytest.mark.parametrize("build", [mixtral, gpt_oss])
def test_square_matrices(tmp_path: Path, build: Callable[..., Any]):
    """Releases of PEFT before 0.19 took all for [in, out]; 0.19.0 asked the model, and did the opposite."""
    merged = make(tmp_path, build, {"target_parameters": BOTH[1:]}, intermediate_size=16)
    check(tmp_path, build, merged, 1)
    configure(tmp_path, peft_version="0.18.1")
    old = {name: change if build is gpt_oss else change.mT for name, change in merged.items()}
    check(tmp_path, build, old, 1)
    for version in ("0.19.0", "0.19.1.dev0", None):
        configure(tmp_path, peft_version=version)
        with pytest.raises(
            SourceError, match=r"'\S+experts.down_proj' has square matrices, which PEFT takes .* peft_ver"
        ):
            shiradelta.convert(tmp_path / "lora", base=tmp_path / "base")


def test_without_the_model_shapes_tell_the_order(tmp_path: Path):
    """A base without config.json, whose tensors are stacked as in memory."""
    merged = make(tmp_path, gpt_oss, {"target_parameters": BOTH})
    (tmp_path / "base" / "config.json").unlink()
    report = shiradelta.convert(tmp_path / "lora", None, 1.0, tmp_path / "base", "f32")
    assert {tensor.name for tensor in report.tensors} == merged.keys()
    with shiradelta.open_delta(tmp_path / "lora.shd") as delta:
        for name, change in merged.items():
            torch.testing.assert_close(torch.from_numpy(delta[name].to_dense()), change, rtol=1e-4, atol=1e-5)


def test_without_the_model_an_order_is_not_guessed(tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    shapes = {"experts.up": (3, 8, 6), "experts.down": (3, 6, 8)}
    write_model(tmp_path / "base", {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()})
    factors = {"experts": (6, 8), "experts.base_layer": (8, 6)}
    keys = {}
    for module, (rows, columns) in factors.items():
        keys[f"base_model.model.{module}.lora_A.weight"] = torch.randn(6, columns, generator=generator)
        keys[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, 6, generator=generator)
    (tmp_path / "lora").mkdir()
    save_file(keys, tmp_path / "lora" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_parameters": list(shapes)}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=r"may be those of 'experts\.up' or 'experts\.down', in whose order"):
        shiradelta.convert(tmp_path / "lora", base=tmp_path / "base")


# ------------------------------------------------------------------------- what is refused


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    make(folder, mixtral, {"target_parameters": BOTH})
    return folder


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_parameters": BOTH[:1]}, r"has factors for 2 parameters, and 1 of the base's are among target_param"),
        ({"target_parameters": None}, r"has factors for 2 parameters, and 0 of the base's .*: none; give the right"),
        ({"target_parameters": [*BOTH, "experts.gate"]}, None),
        ({"r": 3}, r"_proj: has rank 2, and adapter_config.json says 3"),
    ],
    ids=str,
)
def test_a_configuration_of_other_parameters(made: Path, tmp_path: Path, settings: dict[str, Any], message: str | None):
    folder = Path(shutil.copytree(made, tmp_path / "made"))
    configure(folder, **settings)
    if message is None:
        assert len(shiradelta.convert(folder / "lora", None, 1.0, folder / "base").tensors) == 9
        return
    with pytest.raises(SourceError, match=message):
        shiradelta.convert(folder / "lora", base=folder / "base")


def test_the_shapes_are_the_bases(made: Path, tmp_path: Path):
    with pytest.raises(
        SourceError, match=r"adapts parameters .target_parameters., whose shapes the base has; give --base"
    ):
        shiradelta.convert(made / "lora", tmp_path / "a.shd")


def test_another_number_of_experts(made: Path, tmp_path: Path):
    mixtral(num_local_experts=5).save_pretrained(tmp_path / "base")
    message = r"the factors of '\S+gate_up_proj' .A \[6, 16\], B \[48, 6\]. do not fit its shape \[5, 48, 16\]"
    with pytest.raises(SourceError, match=message):
        shiradelta.convert(made / "lora", tmp_path / "a.shd", base=tmp_path / "base")


def test_factors_of_one_name_in_a_file(made: Path, tmp_path: Path):
    folder = Path(shutil.copytree(made, tmp_path / "made"))
    file = folder / "lora" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("experts.lora_A.weight"))
    save_file({**tensors, key.replace("lora_A", "lora_A.default"): tensors[key] + 1}, file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(SourceError, match=r"lora_A.default.weight' and '\S+lora_A.weight' are the same factor"):
            shiradelta.convert(folder / "lora", base=folder / "base")
