"""No guesses: where a source or a name may be read in two ways, `convert` refuses and names both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import shiradelta
from shiradelta.errors import SourceError
from tests.conftest import write_lora, write_model

NAME = "model.layers.0.self_attn.q_proj"


def base_in(folder: Path) -> Path:
    return write_model(folder, {f"{NAME}.weight": torch.zeros(16, 16)})


def factors(module: str, suffix: str = "") -> dict[str, torch.Tensor]:
    return {
        f"base_model.model.{module}.lora_A{suffix}.weight": torch.ones(4, 16),
        f"base_model.model.{module}.lora_B{suffix}.weight": torch.ones(16, 4),
    }


@pytest.mark.parametrize("names", [("default", "two"), ("one", "two"), ("style",)], ids="-".join)
@pytest.mark.parametrize("base", [True, False])
def test_factors_of_adapters_with_names(tmp_path: Path, names: tuple[str, ...], base: bool):
    save_file({k: t for name in names for k, t in factors(NAME, f".{name}").items()}, tmp_path / "raw.safetensors")
    named = " and ".join(map(repr, names))
    with pytest.raises(SourceError, match=f"factors named after the adapter {named}"):
        shiradelta.convert(tmp_path / "raw.safetensors", base=base_in(tmp_path / "base") if base else None)


@pytest.mark.parametrize("part", ["tuned", "base"])
def test_one_of_several_shards_is_not_the_model(tmp_path: Path, part: str):
    folders = {name: base_in(tmp_path / name) for name in ("tuned", "base")}
    (folders[part] / "model.safetensors").rename(folders[part] / "model-00001-of-00002.safetensors")
    with pytest.raises(SourceError, match=r"model-00001-of-00002\.safetensors: is one of 2 shards"):
        shiradelta.convert(folders["tuned"], base=folders["base"])


@pytest.mark.parametrize("key", ["emb_params", "elsewhere.a1.weight", "score.weight", "score.bias"])
def test_unknown_parts_are_not_new_tensors(tmp_path: Path, key: str):
    save_file({**factors(NAME), key: torch.ones(4, 4)}, tmp_path / "x.safetensors")
    with pytest.raises(SourceError, match=f"1 tensor cannot be converted: {key}: .*modules_to_save"):
        shiradelta.convert(tmp_path / "x.safetensors", base=base_in(tmp_path / "base"), alpha=4)


@pytest.mark.parametrize("kind", ["lora", "model"])
@pytest.mark.parametrize("steps", [(256,), (256, 512, 1024)])
@pytest.mark.parametrize("base", [True, False])
def test_a_trainers_output_names_its_checkpoints(tmp_path: Path, kind: str, steps: tuple[int, ...], base: bool):
    for step in steps:
        folder = tmp_path / "results" / f"checkpoint-{step}"
        if kind == "lora":
            write_lora(folder, {NAME: (16, 16)}, {"lora_alpha": 4})
        else:
            base_in(folder)
    listed = ", ".join(f"checkpoint-{step}" for step in steps)
    with pytest.raises(SourceError, match=rf"results: holds .*\({listed}\); give the one .*checkpoint-{steps[-1]}$"):
        shiradelta.convert(tmp_path / "results", base=base_in(tmp_path / "base") if base else None)


def test_a_final_state_above_its_checkpoints_is_what_is_meant(tmp_path: Path):
    write_lora(tmp_path / "results", {NAME: (16, 16)}, {"lora_alpha": 4})
    write_lora(tmp_path / "results" / "checkpoint-1", {"other": (16, 16)}, {"lora_alpha": 4})
    report = shiradelta.convert(tmp_path / "results", base=base_in(tmp_path / "base"))
    assert [tensor.name for tensor in report.tensors] == [f"{NAME}.weight"]


def test_pefts_folder_of_several_adapters(tmp_path: Path):
    write_lora(tmp_path / "lora", {NAME: (16, 16)}, {"lora_alpha": 4})
    write_lora(tmp_path / "lora" / "two", {NAME: (16, 16)}, {"lora_alpha": 4})
    with pytest.raises(SourceError, match=r"2 adapters or checkpoints \(adapter_model\.safetensors, two\)"):
        shiradelta.convert(tmp_path / "lora", base=base_in(tmp_path / "base"))
    one = tmp_path / "lora" / "adapter_model.safetensors"
    assert shiradelta.convert(one, base=tmp_path / "base").nnz


@pytest.mark.parametrize("which", ["source", "base"])
def test_states_of_one_model_in_folders_of_any_name(tmp_path: Path, which: str):
    for epoch in ("epoch_1", "epoch_2"):
        base_in(tmp_path / "all" / epoch)
    one = base_in(tmp_path / "one")
    source, base = (tmp_path / "all", one) if which == "source" else (one, tmp_path / "all")
    with pytest.raises(SourceError, match=r"2 adapters or checkpoints \(epoch_1, epoch_2\)"):
        shiradelta.convert(source, base=base)


def kohya(name: str) -> dict[str, torch.Tensor]:
    parts = {"lora_down.weight": torch.ones(4, 16), "lora_up.weight": torch.ones(16, 4), "alpha": torch.tensor(4.0)}
    return {f"{name}.{part}": tensor for part, tensor in parts.items()}


UNET = "input_blocks.4.1.attn1.to_q"


@pytest.mark.parametrize(
    ("key", "found"),
    [
        (f"lora_unet_{UNET.replace('.', '_')}", f"model.diffusion_model.{UNET}"),
        ("lora_te1_text_fc1", "conditioner.embedders.0.transformer.text.fc1"),
        ("lora_te_text_fc2", "cond_stage_model.transformer.text.fc2"),
    ],
)
def test_kohyas_names_in_an_original_checkpoint(tmp_path: Path, key: str, found: str):
    names = (
        f"model.diffusion_model.{UNET}",
        "conditioner.embedders.0.transformer.text.fc1",
        "cond_stage_model.transformer.text.fc2",
    )
    base = write_model(tmp_path / "base", {f"{name}.weight": torch.zeros(16, 16) for name in names})
    save_file(kohya(key), tmp_path / "x.safetensors")
    report = shiradelta.convert(tmp_path / "x.safetensors", base=base)
    assert [tensor.name for tensor in report.tensors] == [f"{found}.weight"]


@pytest.mark.parametrize(
    ("key", "why"),
    [
        ("lora_unet_input_blocks_9_9_to_q", "the base has no such tensor"),
        ("lora_unet_down_blocks_1_attn_to_q", "it has diffusers' name, the base has the original checkpoint's"),
    ],
)
def test_the_reason_on_an_original_checkpoint_is_true(tmp_path: Path, key: str, why: str):
    base = write_model(tmp_path / "base", {f"model.diffusion_model.{UNET}.weight": torch.zeros(16, 16)})
    save_file(kohya(key), tmp_path / "x.safetensors")
    with pytest.raises(SourceError, match=f"{key}: {why}"):
        shiradelta.convert(tmp_path / "x.safetensors", base=base)


def test_lycoris_own_prefix(tmp_path: Path):
    base = write_model(tmp_path / "base", {"blocks.0.attn.to_q.weight": torch.zeros(16, 16)})
    save_file(kohya("lycoris_blocks_0_attn_to_q"), tmp_path / "x.safetensors")
    report = shiradelta.convert(tmp_path / "x.safetensors", base=base)
    assert [tensor.name for tensor in report.tensors] == ["blocks.0.attn.to_q.weight"]


def test_a_lycoris_name_in_two_components(tmp_path: Path):
    for component in ("unet", "text_encoder"):
        write_model(tmp_path / "base" / component, {"mid.to_q.weight": torch.zeros(16, 16)})
    (tmp_path / "base" / "model_index.json").write_text("{}")
    save_file(kohya("lycoris_mid_to_q"), tmp_path / "x.safetensors")
    with pytest.raises(SourceError, match=r"may be 'text_encoder/mid\.to_q\.weight' or 'unet/mid\.to_q\.weight'"):
        shiradelta.convert(tmp_path / "x.safetensors", base=tmp_path / "base")


def test_two_names_with_the_same_underscores(tmp_path: Path):
    base = write_model(tmp_path / "base", {f"{name}.weight": torch.zeros(16, 16) for name in ("a.b_c", "a_b.c")})
    save_file(kohya("lora_unet_a_b_c"), tmp_path / "x.safetensors")
    with pytest.raises(SourceError, match=r"may be 'a\.b_c\.weight' or 'a_b\.c\.weight'"):
        shiradelta.convert(tmp_path / "x.safetensors", base=base)


@pytest.mark.parametrize("alpha", [None, 2.0])
def test_a_configuration_of_another_rank_is_another_adapters(tmp_path: Path, alpha: float | None):
    lora = write_lora(tmp_path / "lora", {NAME: (16, 16)}, {"r": 8, "lora_alpha": 16})
    if alpha is None:
        with pytest.raises(SourceError, match=r"q_proj: has rank 4, and adapter_config\.json says 8"):
            shiradelta.convert(lora, base=base_in(tmp_path / "base"))
    else:
        assert shiradelta.convert(lora, base=base_in(tmp_path / "base"), alpha=alpha).nnz


@pytest.mark.parametrize(("name", "scale"), [("style.safetensors", 8 / 4), ("adapter_model.safetensors", 4 / 4)])
def test_a_files_own_metadata_win_over_another_adapters_configuration(tmp_path: Path, name: str, scale: float):
    lora = write_lora(tmp_path / "lora", {NAME: (16, 16)}, {"lora_alpha": 4})
    save_file(factors(NAME), lora / name, {"ss_network_alpha": "8"})
    shiradelta.convert(lora / name, tmp_path / "x.shd", 1.0, base_in(tmp_path / "base"), "f32")
    with shiradelta.open_delta(tmp_path / "x.shd") as delta:
        assert delta[f"{NAME}.weight"].to_dense() == pytest.approx(scale * 4)  # factors of ones, rank 4


LOKR = {"lokr_w1": torch.ones(4, 4), "lokr_w2": torch.ones(4, 4)}
PLAIN = {"lora_down.weight": torch.ones(4, 16), "lora_up.weight": torch.ones(16, 4)}
DIFFUSERS = {"lora_adapter_metadata": '{"unet.r": 4, "unet.lora_alpha": 8}'}


@pytest.mark.parametrize(
    ("parts", "metadata", "options", "warns"),
    [
        (PLAIN, {}, {}, True),
        (PLAIN, {"ss_network_alpha": "nothing"}, {}, True),
        (PLAIN, {"ss_network_alpha": "8"}, {}, False),
        (PLAIN, DIFFUSERS, {}, False),
        (PLAIN, {}, {"alpha": 8.0}, False),
        ({**PLAIN, "alpha": torch.tensor(8.0)}, {}, {}, False),
        (LOKR, {}, {}, False),
        ({**LOKR, "alpha": torch.tensor(8.0)}, {}, {}, False),
    ],
)
def test_a_missing_alpha_is_said_where_there_is_a_scale(
    tmp_path: Path, parts: dict[str, torch.Tensor], metadata: dict[str, str], options: dict[str, float], warns: bool
):
    """A LoKr of whole factors has no scale."""
    save_file({f"{NAME}.{part}": tensor for part, tensor in parts.items()}, tmp_path / "x.safetensors", metadata)
    base = base_in(tmp_path / "base")
    report = shiradelta.convert(tmp_path / "x.safetensors", None, 1.0, base, "f32", **options)
    assert any("alpha" in warning for warning in report.warnings) == warns
    with shiradelta.open_delta(tmp_path / "x.shd") as delta:
        wanted = 1 if parts.keys() >= LOKR.keys() else 4 * (1 if warns else 2)  # factors of ones, rank 4
        assert delta[f"{NAME}.weight"].to_dense() == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("kind", "rank", "fits"), [("LOHA", 2, True), ("LOHA", 3, False), ("LOKR", 2, True), ("LOKR", 3, False)]
)
def test_the_rank_of_lora_s_kin_is_checked_too(tmp_path: Path, kind: str, rank: int, fits: bool):
    loha = {f"hada_w{n}_{side}": torch.ones((16, 2) if side == "a" else (2, 16)) for n in "12" for side in "ab"}
    lokr = {"lokr_w1": torch.ones(4, 4), "lokr_w2_a": torch.ones(4, 2), "lokr_w2_b": torch.ones(2, 4)}
    lora = write_lora(tmp_path / "lora", {NAME: (16, 16)}, {"peft_type": kind, "r": rank, "alpha": 4})
    tensors = {f"base_model.model.{NAME}.{part}": t for part, t in (loha if kind == "LOHA" else lokr).items()}
    save_file(tensors, lora / "adapter_model.safetensors")
    base = base_in(tmp_path / "base")
    if fits:
        assert shiradelta.convert(lora, base=base).nnz
    else:
        with pytest.raises(SourceError, match=r"q_proj: has rank 2, and adapter_config\.json says 3"):
            shiradelta.convert(lora, base=base)


@pytest.mark.parametrize("base", [True, False])
def test_a_configuration_beside_another_file_is_checked(tmp_path: Path, base: bool):
    """A file of any name, without metadata of its own, beside the configuration of another adapter."""
    lora = write_lora(tmp_path / "lora", {NAME: (16, 16)}, {"r": 8, "lora_alpha": 16})
    save_file(factors(NAME), lora / "style.safetensors")
    with pytest.raises(SourceError, match=r"q_proj: has rank 4, and adapter_config\.json says 8"):
        shiradelta.convert(lora / "style.safetensors", base=base_in(tmp_path / "base") if base else None)


#: Files of one folder that are several readings of it, and whether a base may have them.
READINGS: dict[tuple[str, ...], bool] = {
    ("adapter_model.safetensors", "pytorch_lora_weights.safetensors"): True,
    ("adapter_model.safetensors", "pytorch_lora_weights.bin"): True,
    ("model.safetensors", "adapter_model.safetensors"): False,
    ("model.safetensors", "adapter_model.bin"): False,
    ("pytorch_model.bin", "adapter_model.safetensors"): True,
    ("model.safetensors", "pytorch_lora_weights.safetensors"): True,
    ("model.safetensors.index.json", "adapter_model.safetensors"): False,
    ("model.safetensors", "model.safetensors.index.json"): False,
    ("model.safetensors", "diffusion_pytorch_model.safetensors"): False,
    ("model_index.json", "pytorch_lora_weights.safetensors"): True,
}


def fill(folder: Path, *files: str) -> Path:
    """A folder with such files: whole models, adapters, an index, pickles."""
    folder.mkdir()
    for name in files:
        if name.endswith(".json"):
            shard = "model-00001-of-00001.safetensors"
            save_file({f"{NAME}.weight": torch.ones(16, 16)}, folder / shard)
            (folder / name).write_text(json.dumps({"weight_map": {f"{NAME}.weight": shard}}))
        elif name.endswith(".bin"):
            torch.save({}, folder / name)
        else:
            whole = {f"{NAME}.weight": torch.ones(16, 16)}
            save_file(factors(NAME) if "adapter" in name or "lora" in name else whole, folder / name)
    return folder


@pytest.mark.parametrize("files", READINGS)
def test_files_of_one_folder_that_are_several_models_or_adapters(tmp_path: Path, files: tuple[str, ...]):
    folder, one = fill(tmp_path / "folder", *files), base_in(tmp_path / "one")
    with pytest.raises(SourceError, match=r"folder: holds 2 models or adapters .*\((\S+), (\S+)\); give .*: \S+$") as e:
        shiradelta.convert(folder, base=one)
    assert all(name in str(e.value) for name in files)
    for name in files:
        if name.endswith(".safetensors"):
            assert shiradelta.convert(folder / name, tmp_path / "x.shd", base=one, alpha=None).nnz
    if not READINGS[files]:
        with pytest.raises(SourceError, match="folder: holds 2 models or adapters"):
            shiradelta.convert(one, base=folder)


@pytest.mark.parametrize(
    ("read", "unread"),
    [
        ("adapter_model.safetensors", "adapter_model.bin"),
        ("model.safetensors", "pytorch_model.bin"),
        ("model.safetensors", "model.fp16.safetensors"),
        ("adapter_model.safetensors", "style.safetensors"),
    ],
)
def test_files_that_loaders_pass_over_are_said_not_to_be_read(tmp_path: Path, read: str, unread: str):
    report = shiradelta.convert(fill(tmp_path / "folder", read, unread), base=base_in(tmp_path / "base"))
    assert f"{unread} is not read: {read} is" in report.warnings


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({}, False),
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": False}, False),
        ({"text_config": {"tie_word_embeddings": True}}, True),
        ({"text_config": {"tie_word_embeddings": False}}, False),
        ({"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}}, False),
        ({"vision_config": {"tie_word_embeddings": True}}, False),
        (None, False),
    ],
)
def test_an_output_layer_is_not_taken_for_tied_without_evidence(
    tmp_path: Path, config: dict[str, object] | None, tied: bool
):
    base = write_model(tmp_path / "base", {"model.embed_tokens.weight": torch.zeros(24, 16)})
    (base / "config.json").unlink()
    if config is not None:
        (base / "config.json").write_text(json.dumps(config))
    lora = write_lora(tmp_path / "lora", {"lm_head": (24, 16)}, {"lora_alpha": 8})
    if tied:
        report = shiradelta.convert(lora, base=base)
        assert [tensor.name for tensor in report.tensors] == ["model.embed_tokens.weight"]
    else:
        with pytest.raises(SourceError, match="lm_head: the base has no such tensor"):
            shiradelta.convert(lora, base=base)


def test_experts_that_another_release_saves_transposed(tmp_path: Path):
    """As the hub's Qwen3-VL-MoE: the remedy is to save the base anew, not to resize it."""
    base = write_model(tmp_path / "base", {"experts.down_proj": torch.zeros(2, 4, 6), "w": torch.zeros(4, 4)})
    tuned = write_model(tmp_path / "tuned", {"experts.down_proj": torch.ones(2, 6, 4), "w": torch.ones(4, 4)})
    with pytest.raises(SourceError, match=r"\[2, 6, 4\], the base's \[2, 4, 6\]; the base has it transposed"):
        shiradelta.convert(tuned, base=base)
