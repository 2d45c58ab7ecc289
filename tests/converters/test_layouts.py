"""Layouts of foreign files: what real tools write is read whole or refused by name, never half."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification

import shiradelta
from shiradelta.converters import default_output
from shiradelta.errors import DeltaError, SourceError, TargetError
from shiradelta.select.topk import row_shape, top_k
from tests.conftest import random_tensors, write_lora, write_model
from tests.converters.test_convert import MODULES, UP, stored

# PEFT asks a model of transformers for what that has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

UP_MODULE = UP.removesuffix(".weight")


def factors(module: str, down: str, up: str, shape: tuple[int, int] = (8, 8), seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{module}.{down}": torch.randn(2, shape[1], generator=generator),
        f"{module}.{up}": torch.randn(shape[0], 2, generator=generator),
    }


def kohya(module: str, shape: tuple[int, int] = (8, 8)) -> dict[str, torch.Tensor]:
    return factors(module, "lora_down.weight", "lora_up.weight", shape)


def peft(module: str, shape: tuple[int, int] = (8, 8)) -> dict[str, torch.Tensor]:
    return factors(module, "lora_A.weight", "lora_B.weight", shape)


def converted(source: Path, base: Path | None = None, **options: object) -> dict[str, str]:
    """name -> operation of what a conversion that keeps everything writes."""
    report = shiradelta.convert(source, source.parent / "out.shd", 1.0, base, "f32", **options)
    return {tensor.name: tensor.op for tensor in report.tensors}


@pytest.fixture(scope="module")
def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=40, num_labels=3
    )
    return BertForSequenceClassification(config)


def write_bert(folder: Path, model: torch.nn.Module) -> Path:
    return write_model(folder, {name: tensor.clone() for name, tensor in model.state_dict().items()})


# ------------------------------------------------------------------------- what PEFT saves beside factors


@pytest.mark.parametrize("away", ["", "bert."])
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_pefts_biases_embeddings_and_heads_find_their_tensors(tmp_path: Path, bert, away: str, bias: str):
    write_bert(tmp_path / "base", bert.bert if away else bert)
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"], bias=bias, init_lora_weights=False)
    tuned = get_peft_model(deepcopy(bert), config)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter += 1
    tuned.save_pretrained(tmp_path / "lora", save_embedding_layers=True)
    report = shiradelta.convert(tmp_path / "lora", base=tmp_path / "base", sparsity=1.0, values="f32")
    new = {tensor.name for tensor in report.tensors if tensor.op == "new"}
    assert new == ({"classifier.weight", "classifier.bias"} if away else set())
    shiradelta.apply(tmp_path / "base", tmp_path / "lora.shd")
    patched = load_file(tmp_path / "base" / "model.safetensors")
    merged = tuned.merge_and_unload().state_dict()
    assert len(patched) == len(merged)
    for name, tensor in merged.items():
        assert torch.allclose(patched[name.removeprefix(away)], tensor, atol=1e-5), name


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(target_modules=["query"], init_lora_weights="pissa"), "path_initial_model"),
        (LoraConfig(target_modules=["query"], r=2, init_lora_weights="olora"), "path_initial_model"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_pefts_other_methods_are_refused(tmp_path: Path, bert, config: LoraConfig, message: str):
    get_peft_model(deepcopy(bert), config).save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    with pytest.raises(SourceError, match=message):
        shiradelta.convert(tmp_path / "lora", base=write_bert(tmp_path / "base", bert))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"init_lora_weights": "PiSSA_niter_16"}, "PiSSA_niter_16"),
        ({"init_lora_weights": "corda"}, "corda"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"alora_invocation_tokens": [1]}, "activated LoRA"),
        ({"use_bdlora": {"nblocks": 2}}, "BD-LoRA"),
        ({"use_qalora": True}, "QALoRA"),
        ({"arrow_config": {"top_k": 3}}, "Arrow router"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"target_parameters": [UP]}, "whose shapes the base has"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"peft_type": "SHIRA"}, "SHIRA"),
        ({"alpha_pattern": {"(": 1}}, "regular expression"),
        ({"lora_alpha": "many"}, "not a finite number"),
    ],
)
def test_configurations_that_are_refused(tmp_path: Path, config: dict[str, object], message: str):
    with pytest.raises(SourceError, match=message):
        shiradelta.convert(write_lora(tmp_path / "lora", MODULES, config))


@pytest.mark.parametrize("init", [True, "gaussian", "eva", "orthogonal", "mica"])
def test_initialisations_that_leave_the_base_alone(tmp_path: Path, init: object):
    assert converted(write_lora(tmp_path / "lora", MODULES, {"lora_alpha": 4, "init_lora_weights": init}))


@pytest.mark.parametrize(
    ("config", "key", "op"),
    [
        ({"modules_to_save": ["score"]}, "score.weight", "new"),
        ({"modules_to_save": ["score"]}, "score.modules_to_save.default.weight", "new"),
        ({"modules_to_save": ["score"]}, "underscore.weight", None),
        ({}, "score.weight", None),
        (None, "score.weight", None),
        (None, f"{UP_MODULE}.diff", None),
        (None, f"{UP_MODULE}.w_norm", None),
        (None, "elsewhere.alpha", None),
        ({}, "model.layers.0.norm.base_layer.weight", "add"),
    ],
)
def test_only_what_was_to_be_saved_is_new(tmp_path: Path, made: Path, config, key: str, op: str | None):
    lora = write_lora(tmp_path / "lora", MODULES, {"lora_alpha": 4, **(config or {})})
    if config is None:
        (lora / "adapter_config.json").unlink()
    tensors = load_file(lora / "adapter_model.safetensors")
    save_file({**tensors, f"base_model.model.{key}": torch.ones(32)}, lora / "adapter_model.safetensors")
    skip = [f"*{key}"] if op is None and "alpha" not in key else []
    if skip:
        with pytest.raises(SourceError, match=f"1 tensor cannot be converted: [^;]*{re.escape(key)}"):
            shiradelta.convert(lora, base=made / "bf16")
    report = shiradelta.convert(lora, base=made / "bf16", skip=skip)
    assert [tensor.op for tensor in report.tensors[2:]] == ([op] if op else [])
    assert bool(report.skipped) == (op is None)
    if skip:
        assert any("skipped" in warning and key in warning for warning in report.warnings)


def test_a_wrong_base_is_an_error_even_if_a_head_could_be_new(tmp_path: Path, made: Path):
    lora = write_lora(tmp_path / "lora", {"elsewhere": (8, 8)}, {"modules_to_save": ["score"]})
    tensors = load_file(lora / "adapter_model.safetensors")
    save_file({**tensors, "base_model.model.score.weight": torch.ones(32)}, lora / "adapter_model.safetensors")
    with pytest.raises(SourceError, match="elsewhere: the base has no such tensor"):
        shiradelta.convert(lora, base=made / "bf16")


@pytest.mark.parametrize("kind", ["auto", "lora", "full"])
@pytest.mark.parametrize("adapter", ["default", "mine"])
def test_an_unmerged_model_is_refused(tmp_path: Path, bert, kind: str, adapter: str):
    tuned = get_peft_model(deepcopy(bert), LoraConfig(target_modules=["query", "key"], r=2), adapter_name=adapter)
    write_bert(tmp_path / "tuned", tuned)
    with pytest.raises(SourceError, match="merge it first, or save the adapter alone"):
        shiradelta.convert(tmp_path / "tuned", base=write_bert(tmp_path / "base", bert), kind=kind)


# ---------------------------------------------------------------------------------- alphas and factors


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float64, torch.float16, torch.bfloat16])
def test_alpha_tensors_of_any_dtype(tmp_path: Path, dtype: torch.dtype):
    save_file({**peft("a.b"), "a.b.alpha": torch.tensor(4, dtype=dtype)}, tmp_path / "x.safetensors")
    converted(tmp_path / "x.safetensors")
    down, up = peft("a.b").values()
    assert np.allclose(stored(tmp_path / "out.shd", "a.b.weight"), (2 * up @ down).numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a.b.alpha": torch.zeros(0)}, "'a.b.alpha' is empty"),
        ({"a.b.alpha": torch.tensor(torch.nan)}, "'a.b.alpha' nan"),
        ({"a.b.lora_A.weight": torch.zeros(2, 8, dtype=torch.uint8)}, "'a.b.lora_A.weight' is uint8"),
        ({"a.b.lora_A.weight": torch.zeros(0, 8), "a.b.lora_B.weight": torch.zeros(8, 0)}, "do not multiply"),
        ({"a.b.lora_A.weight": torch.tensor(1.0)}, "do not multiply"),
    ],
)
def test_bad_alphas_and_factors_are_named(tmp_path: Path, tensors: dict[str, torch.Tensor], message: str):
    save_file(peft("a.b") | tensors, tmp_path / "x.safetensors")
    with pytest.raises(SourceError, match=f"x.safetensors: .*{message}"):
        shiradelta.convert(tmp_path / "x.safetensors")


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_an_alpha_that_is_not_finite(tmp_path: Path, alpha: float):
    with pytest.raises(DeltaError, match="alpha"):
        shiradelta.convert(write_lora(tmp_path / "lora", MODULES, {}), alpha=alpha)


def test_diffusers_metadata_is_kept_per_component(tmp_path: Path):
    metadata = {"unet.lora_alpha": 2, "text_encoder.lora_alpha": 4, "text_encoder_2.lora_alpha": 8, "unet.r": 2}
    tensors = peft("unet.a") | peft("text_encoder.a") | peft("text_encoder_2.a")
    save_file(tensors, tmp_path / "x.safetensors", metadata={"lora_adapter_metadata": json.dumps(metadata)})
    converted(tmp_path / "x.safetensors")
    unet, first, second = (
        stored(tmp_path / "out.shd", f"{name}.a.weight") for name in ("unet", "text_encoder", "text_encoder_2")
    )
    assert np.allclose(first, 2 * unet)
    assert np.allclose(second, 4 * unet)


@pytest.mark.parametrize(
    ("tensors", "name"),
    [
        (factors("x.attn1.processor.to_q_lora", "down.weight", "up.weight"), "x.attn1.to_q.weight"),
        (factors("x.attn1.processor.to_out_lora", "down.weight", "up.weight"), "x.attn1.to_out.0.weight"),
        (factors("x.q_proj.lora_linear_layer", "down.weight", "up.weight"), "x.q_proj.weight"),
        (factors("x.q_proj.lora", "down.weight", "up.weight"), "x.q_proj.weight"),
    ],
)
def test_older_diffusers_layouts(tmp_path: Path, tensors: dict[str, torch.Tensor], name: str):
    save_file(tensors, tmp_path / "x.safetensors")
    assert converted(tmp_path / "x.safetensors") == {name: "add"}


# ------------------------------------------------------------------------------------------- pipelines

TEXT = "text_model.encoder.layers.0.mlp.fc1"
MANGLED = TEXT.replace(".", "_")


def write_pipeline(folder: Path, main: str = "unet") -> Path:
    for component, module, size in ((main, "mid.to_q", 8), ("text_encoder", TEXT, 8), ("text_encoder_2", TEXT, 12)):
        write_model(folder / component, {f"{module}.weight": torch.zeros(size, size)})
    (folder / "model_index.json").write_text("{}")
    return folder


@pytest.mark.parametrize("main", ["unet", "transformer"])
@pytest.mark.parametrize("first", ["te", "te1"])
def test_kohya_names_on_a_pipeline(tmp_path: Path, main: str, first: str):
    base = write_pipeline(tmp_path / "base", main)
    tensors = (
        kohya("lora_unet_mid_to_q") | kohya(f"lora_{first}_{MANGLED}") | kohya(f"lora_te2_{MANGLED}", shape=(12, 12))
    )
    save_file(tensors, tmp_path / "x.safetensors")
    names = {f"{main}/mid.to_q.weight", f"text_encoder/{TEXT}.weight", f"text_encoder_2/{TEXT}.weight"}
    assert set(converted(tmp_path / "x.safetensors", base)) == names


@pytest.mark.parametrize("style", ["kohya", "peft"])
@pytest.mark.parametrize(("component", "size"), [("text_encoder", 8), ("text_encoder_2", 12), ("elsewhere", 12)])
def test_a_lone_component_takes_one_prefix(tmp_path: Path, style: str, component: str, size: int):
    base = write_model(tmp_path / component, {f"{TEXT}.weight": torch.zeros(size, size)})
    if style == "kohya":
        one, two = (kohya(f"lora_te{n}_{MANGLED}", (s, s)) for n, s in ((1, 8), (2, 12)))
    else:
        one, two = (peft(f"text_encoder{n}.{TEXT}", (s, s)) for n, s in (("", 8), ("_2", 12)))
    save_file(one | two, tmp_path / "x.safetensors")
    other = "te1" if size == 12 else "te2"
    if style == "peft":
        other = {"te1": "text_encoder.", "te2": "text_encoder_2."}[other]
    with pytest.raises(SourceError, match=rf"1 tensor cannot be converted: \S*{other}.*the base of"):
        shiradelta.convert(tmp_path / "x.safetensors", base=base)
    report = shiradelta.convert(tmp_path / "x.safetensors", base=base, skip=f"*{other}*")
    assert [tensor.name for tensor in report.tensors] == [f"{TEXT}.weight"]
    assert len(report.skipped) == 1
    assert "the base of" in next(iter(report.skipped.values()))


def test_two_text_encoders_that_both_fit_are_ambiguous(tmp_path: Path):
    base = write_model(tmp_path / "base", {f"{TEXT}.weight": torch.zeros(8, 8)})
    save_file(kohya(f"lora_te1_{MANGLED}") | kohya(f"lora_te2_{MANGLED}"), tmp_path / "x.safetensors")
    with pytest.raises(SourceError, match="may be that of te1 or of te2"):
        shiradelta.convert(tmp_path / "x.safetensors", base=base)


@pytest.mark.parametrize("module", ["lora_unet_input_blocks_4_1_to_q", "diffusion_model.double_blocks.0.qkv"])
def test_the_original_checkpoints_names_are_explained(tmp_path: Path, module: str):
    save_file(kohya("lora_unet_mid_to_q") | kohya(module), tmp_path / "x.safetensors")
    base = write_pipeline(tmp_path / "base")
    with pytest.raises(SourceError, match=f"{module}: it has the original checkpoint's name"):
        shiradelta.convert(tmp_path / "x.safetensors", base=base)
    report = shiradelta.convert(tmp_path / "x.safetensors", base=base, skip=module)
    assert "original checkpoint" in report.skipped[module]


# --------------------------------------------------------------------------------------------- Conv1D


@pytest.mark.parametrize(
    ("others", "model_type", "swapped", "warned"),
    [
        ({"h.attn": ((24, 8), True)}, "test", True, False),
        ({"h.attn": ((24, 8), False)}, "test", False, False),
        ({"h.attn": ((24, 8), True), "head": ((40, 8), False)}, "test", False, True),
        ({"h.attn": ((24, 8), True), "head": ((40, 8), False)}, "gpt2", True, False),
        ({}, "gpt2", True, False),
        ({}, "imagegpt", True, False),
        ({}, "llama", False, False),
    ],
)
def test_square_layers_go_with_the_others(tmp_path: Path, others, model_type: str, swapped: bool, warned: bool):
    modules = {"h.proj": (8, 8), **{name: shape for name, (shape, _) in others.items()}}
    turned = {name for name, (_, swap) in others.items() if swap}
    tensors = {f"{name}.weight": torch.zeros(s[::-1] if name in turned else s) for name, s in modules.items()}
    base = write_model(tmp_path / "base", tensors)
    (base / "config.json").write_text(json.dumps({"model_type": model_type}))
    save_file({k: v for name, s in modules.items() for k, v in peft(name, s).items()}, tmp_path / "x.safetensors")
    report = shiradelta.convert(tmp_path / "x.safetensors", None, 1.0, base, "f32")
    down, up = peft("h.proj").values()
    product = (up @ down).numpy()
    assert np.allclose(stored(tmp_path / "x.shd", "h.proj.weight"), product.T if swapped else product, atol=1e-5)
    assert any("h.proj is square" in warning for warning in report.warnings) == warned


# ----------------------------------------------------------------------------- full fine-tunes and diffs


@pytest.mark.parametrize("name", ["memory.values", "memory.positions", "head.diff"])
def test_a_model_with_a_tensor_named_like_a_diff_is_a_model(tmp_path: Path, name: str):
    base, tuned = (random_tensors(torch.float32, seed) | {name: torch.full((4,), float(seed))} for seed in (0, 1))
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "tuned", tuned)
    assert set(converted(tmp_path / "tuned", tmp_path / "base")) == set(base)
    with pytest.raises(SourceError, match="--base"):
        shiradelta.convert(tmp_path / "tuned")


@pytest.mark.parametrize("key", ["w.diff", "w.values"])
def test_diffs_that_are_no_floats_are_named(tmp_path: Path, key: str):
    tensors = {key: torch.zeros(4, dtype=torch.uint8), "w.positions": torch.arange(4)}
    save_file({k: v for k, v in tensors.items() if k == key or key == "w.values"}, tmp_path / "d.safetensors")
    base = write_model(tmp_path / "base", {"w": torch.zeros(4), "w.weight": torch.zeros(4)})
    with pytest.raises(SourceError, match=f"d.safetensors: '{key}' is uint8"):
        shiradelta.convert(tmp_path / "d.safetensors", base=base)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_energy_kept_of_what_is_set_is_that_of_the_selection(tmp_path: Path, dtype: torch.dtype):
    base, tuned = (random_tensors(torch.float32, seed) for seed in (0, 1))
    write_model(tmp_path / "base", {name: tensor.to(dtype) for name, tensor in base.items()})
    write_model(tmp_path / "tuned", {name: tensor.to(dtype) for name, tensor in tuned.items()})
    report = shiradelta.convert(tmp_path / "tuned", tmp_path / "d.shd", 0.1, tmp_path / "base")
    for tensor in report.tensors:
        squares = np.square((tuned[tensor.name].to(dtype).double() - base[tensor.name].to(dtype).double()).numpy())
        largest = np.sort(squares.reshape(-1))[-tensor.nnz :]
        assert tensor.energy_kept == pytest.approx(largest.sum() / squares.sum(), rel=1e-4)
    assert 0.2 < report.energy_kept < 0.6


def test_a_tensor_without_a_selected_change_is_lost_energy(tmp_path: Path):
    large, small = torch.ones(40, 40), torch.full((60, 40), 0.5)
    write_model(tmp_path / "base", {"large": torch.zeros(40, 40), "small": torch.zeros(60, 40)})
    write_model(tmp_path / "tuned", {"large": large, "small": small})
    report = shiradelta.convert(tmp_path / "tuned", None, 0.4, tmp_path / "base", "f32", scope="model")
    assert report.skipped == {"small": "none of its changes is among the largest"}
    assert report.energy_kept == pytest.approx(1600 / (1600 + 600))


@pytest.mark.parametrize("renamed", [3, 0])
def test_layers_of_another_name_are_not_new(tmp_path: Path, made: Path, renamed: int):
    tuned = random_tensors(torch.bfloat16, 1) | {"score.weight": torch.zeros(2, 32, dtype=torch.bfloat16)}
    for name in list(tuned)[:renamed]:
        tuned[name.replace("_proj", "_linear")] = tuned.pop(name)
    write_model(tmp_path / "tuned", tuned)
    if renamed:
        with pytest.raises(SourceError, match=r"it has '[\w.]+_linear[\w.]+' and lacks '[\w.]+_proj[\w.]+'"):
            shiradelta.convert(tmp_path / "tuned", base=made / "bf16")
    else:
        report = shiradelta.convert(tmp_path / "tuned", base=made / "bf16")
        assert "1 tensor that the base lacks is added whole: score.weight" in report.warnings


def test_an_exchanged_head_is_new(tmp_path: Path, bert):
    base = {name.replace("classifier", "cls.relationship"): t.clone() for name, t in bert.state_dict().items()}
    write_model(tmp_path / "base", base)
    tuned = {name: tensor + 1 for name, tensor in bert.state_dict().items()}
    write_model(tmp_path / "tuned", tuned)
    report = shiradelta.convert(tmp_path / "tuned", base=tmp_path / "base")
    assert {t.name for t in report.tensors if t.op == "new"} == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("same", [True, False])
def test_both_of_two_tied_names(tmp_path: Path, made: Path, same: bool):
    tuned = random_tensors(torch.bfloat16, 1)
    tuned["lm_head.weight"] = tuned["model.embed_tokens.weight"].clone() if same else torch.ones(64, 32).bfloat16()
    write_model(tmp_path / "tuned", tuned)
    if same:
        report = shiradelta.convert(tmp_path / "tuned", base=made / "bf16")
        assert len(report.tensors) == 6
        assert len(report.skipped) == 1
        assert "the same as" in next(iter(report.skipped.values()))
    else:
        with pytest.raises(SourceError, match="untied its embeddings"):
            shiradelta.convert(tmp_path / "tuned", base=made / "bf16")


# ----------------------------------------------------------------------------------- names and places


def test_only_a_shd_file_is_replaced(tmp_path: Path, made: Path):
    lora = write_lora(tmp_path / "lora", MODULES, {"lora_alpha": 4}) / "adapter_model.safetensors"
    base = made / "bf16" / "model.safetensors"
    (tmp_path / "link").symlink_to(lora)
    (tmp_path / "empty").touch()
    for target in (lora, base, tmp_path / "link", tmp_path):
        before = lora.read_bytes(), base.read_bytes()
        with pytest.raises(TargetError, match=r"is not a \.shd file"):
            shiradelta.convert(lora, target, base=base)
        assert before == (lora.read_bytes(), base.read_bytes())
    for _ in range(2):
        shiradelta.convert(lora, tmp_path / "empty", base=base)


def test_the_folder_one_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lora = write_lora(tmp_path / "lora", MODULES, {"lora_alpha": 4})
    monkeypatch.chdir(lora)
    assert shiradelta.convert(".").out == str(tmp_path / "lora.shd")
    monkeypatch.chdir(tmp_path)
    assert default_output("lora") == Path("lora.shd")


# --------------------------------------------------------------------------------------- blocks of rows


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((), (1, 1)),
        ((7,), (7, 1)),
        ((5, 3), (5, 3)),
        ((2, 1 << 20), (2, 1 << 20)),
        ((64, 32, 3, 3), (64, 288)),
        ((8, 2816, 2048), (8 * 2816, 2048)),
        ((3, 0), (0, 0)),
    ],
)
def test_a_row_is_that_of_a_matrix(shape: tuple[int, ...], rows: tuple[int, int]):
    assert row_shape(shape) == rows


@pytest.mark.parametrize("shape", [(1_500_000,), (3, 600, 700), (700_000, 3)])
def test_top_k_reads_few_rows_at_a_time(shape: tuple[int, ...]):
    dense = np.random.default_rng(0).standard_normal(shape).astype(np.float32).reshape(-1)
    count, columns = row_shape(shape)
    most, calls = 0, 0

    def rows(start: int, stop: int) -> np.ndarray:
        nonlocal most, calls
        most, calls = max(most, (stop - start) * columns), calls + 1
        return dense[start * columns : stop * columns]

    found = top_k(rows, (count, columns), 1000)
    assert most <= 1 << 18
    assert calls < 5000
    magnitude = np.abs(dense)
    reached = np.flatnonzero(magnitude >= np.partition(magnitude, -1000)[-1000])
    assert np.array_equal(found.positions, np.sort(reached[np.argsort(-magnitude[reached], kind="stable")[:1000]]))


def test_a_convolution_whose_rows_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shiradelta.select.topk._BLOCK_ELEMENTS", 20)
    tensors = {"a.b.lora_A.weight": torch.randn(2, 4, 3, 3), "a.b.lora_B.weight": torch.randn(6, 2, 1, 1)}
    save_file(tensors, tmp_path / "x.safetensors")
    converted(tmp_path / "x.safetensors")
    a, b = tensors.values()
    product = torch.einsum("or,rikl->oikl", b[:, :, 0, 0], a).numpy()
    assert row_shape(product.shape) == (24, 9)
    assert np.allclose(stored(tmp_path / "out.shd", "a.b.weight"), product, atol=1e-5)
