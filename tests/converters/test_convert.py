"""Converters: the selected elements are the largest, the report tells the truth, bad sources are one plain line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, ShiraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import shiradelta
from shiradelta.errors import DeltaError, SourceError
from shiradelta.select.histogram import allocate
from shiradelta.select.shares import count_for
from shiradelta.select.spectrum import Spectrum
from shiradelta.select.topk import top_k
from tests.conftest import random_tensors, write_lora, write_model

MODULES = {"model.layers.0.mlp.up_proj": (96, 32), "model.layers.1.mlp.down_proj": (32, 96)}
UP = "model.layers.0.mlp.up_proj.weight"


def lora_delta(folder: Path, module: str, scale: float) -> np.ndarray:
    """scale * B @ A, dense."""
    tensors = load_file(folder / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "AB")
    return (scale * b @ a).float().numpy()


def stored(path: Path, name: str) -> np.ndarray:
    with shiradelta.open_delta(path) as delta:
        return delta[name].to_dense()


def top(dense: np.ndarray, k: int) -> set[int]:
    return set(np.argsort(-np.abs(dense).reshape(-1), kind="stable")[:k].tolist())


# ------------------------------------------------------------------------------------------------ top-k


@given(
    st.lists(st.sampled_from([0.0, 0.0, 1.0, -1.0, 2.0, -3.0, 0.5]), min_size=1, max_size=60),
    st.integers(1, 60),
)
def test_top_k_is_a_stable_sort_without_zeros(values: list[float], k: int):
    flat = np.array(values, np.float32)
    found = top_k(lambda a, b: flat.reshape(-1, 1)[a:b], (flat.size, 1), k)
    order = np.argsort(-np.abs(flat), kind="stable")[:k]
    assert found.positions.tolist() == sorted(i for i in order.tolist() if flat[i])
    assert found.values.tolist() == flat[found.positions].tolist()
    assert found.energy == pytest.approx(float(flat @ flat))


@pytest.mark.slow
@pytest.mark.parametrize("skew", [0.0, 3.0, 12.0])
def test_top_k_of_a_large_tensor_is_exact_whatever_the_sample_says(skew: float):
    generator = np.random.default_rng(0)
    dense = generator.standard_normal((1500, 900)).astype(np.float32)
    # Rows of very different size mislead the sampled threshold, most so where one row in 97 holds nearly all.
    dense *= np.exp(skew * (np.arange(1500) % 97 == 5))[:, None].astype(np.float32)
    for k in (1, 1000, 13500, 1_000_000):
        found = top_k(lambda a, b: dense[a:b], dense.shape, k)
        least = np.sort(np.abs(dense).reshape(-1))[-k]
        assert found.positions.size == k
        assert np.abs(found.values).min() == least
        assert np.all(np.diff(found.positions) > 0)


def test_allocation_over_the_model_keeps_the_largest_of_all():
    generator = np.random.default_rng(1)
    dense = {f"t{i}": (generator.standard_normal((64, 80)) * 2.0**i).astype(np.float32) for i in range(3)}
    spectra = {name: Spectrum.of(lambda a, b, d=d: d[a:b], d.shape) for name, d in dense.items()}
    for k in (1, 37, 5000, 64 * 80 * 3):
        counts = allocate(spectra, k)
        assert sum(counts.values()) == k
        everything = np.sort(np.concatenate([np.abs(d).reshape(-1) for d in dense.values()]))[-k]
        for name, d in dense.items():
            # Told apart to 0.8 % of magnitude.
            assert np.sum(np.abs(d) > everything * 1.01) <= counts[name] <= np.sum(np.abs(d) >= everything * 0.99)


@pytest.mark.parametrize("sparsity", [0, -1, 1.01, float("nan")])
def test_sparsity_out_of_range(sparsity: float):
    with pytest.raises(DeltaError, match="sparsity"):
        count_for(sparsity, 100)


# ------------------------------------------------------------------------------------------------- LoRA


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"lora_alpha": 8}, 2.0),
        ({"lora_alpha": 8, "use_rslora": True}, 4.0),
        ({"lora_alpha": 8, "alpha_pattern": {"layers.0.mlp.up_proj": 32}}, 8.0),
        ({"lora_alpha": 8, "alpha_pattern": {r".*\.1\..*": 32}}, 2.0),
        ({}, 1.0),
    ],
)
def test_lora_scale(tmp_path: Path, config: dict[str, object], scale: float):
    lora = write_lora(tmp_path / "lora", MODULES, config)
    report = shiradelta.convert(lora, sparsity=0.1, values="f32")
    assert report.out == str(tmp_path / "lora.shd")
    dense = lora_delta(lora, "model.layers.0.mlp.up_proj", scale)
    found = stored(tmp_path / "lora.shd", UP)
    kept = set(np.flatnonzero(found).tolist())
    assert len(kept) == round(0.1 * dense.size)
    assert kept == top(dense, len(kept))
    assert np.allclose(found[found != 0], dense[found != 0], rtol=1e-5)
    assert any("alpha" in warning for warning in report.warnings) == (config == {})


def test_users_alpha_wins(tmp_path: Path):
    lora = write_lora(tmp_path / "lora", MODULES, {"lora_alpha": 8})
    shiradelta.convert(lora, tmp_path / "x.shd", values="f32", sparsity=1.0, alpha=2.0)
    assert np.allclose(stored(tmp_path / "x.shd", UP), lora_delta(lora, UP.removesuffix(".weight"), 0.5), rtol=1e-4)


def test_peft_itself_agrees_on_every_variant(tmp_path: Path):
    """A model of torch modules, PEFT's own merge, and the delta that the converter makes of the saved adapter."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Linear(24, 40)
            self.second = torch.nn.Linear(40, 24)
            self.embed = torch.nn.Embedding(50, 24)
            self.conv = torch.nn.Conv2d(4, 6, 3)
            self.head = torch.nn.Linear(24, 3)

        def forward(self, x):
            return self.head(self.second(self.first(self.embed(x))))

    torch.manual_seed(0)
    model = Model()
    write_model(tmp_path / "base", {k: v.clone() for k, v in model.state_dict().items()})
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        rank_pattern={"second": 2},
        alpha_pattern={"first": 3},
        target_modules=["first", "second", "embed", "conv"],
        modules_to_save=["head"],
        init_lora_weights=False,
    )
    tuned = get_peft_model(model, config)
    tuned.base_model.model.head.modules_to_save["default"].weight.data += 1
    tuned.save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    report = shiradelta.convert(tmp_path / "lora", base=tmp_path / "base", sparsity=1.0, values="f32")
    assert not report.skipped or set(report.skipped) <= {"head.bias"}
    shiradelta.apply(tmp_path / "base", tmp_path / "lora.shd")
    merged = dict(tuned.merge_and_unload().state_dict())
    patched = load_file(tmp_path / "base" / "model.safetensors")
    for name, tensor in patched.items():
        assert torch.allclose(tensor, merged[name], atol=1e-5), name


def test_fan_in_fan_out_and_detection_by_shape(tmp_path: Path):
    lora = write_lora(tmp_path / "lora", {"h.0.c_attn": (96, 32)}, {"lora_alpha": 4, "fan_in_fan_out": True})
    dense = lora_delta(lora, "h.0.c_attn", 1.0).T
    shiradelta.convert(lora, values="f32", sparsity=1.0)
    assert np.allclose(stored(tmp_path / "lora.shd", "h.0.c_attn.weight"), dense, rtol=1e-4)
    write_model(tmp_path / "base", {"h.0.c_attn.weight": torch.zeros(32, 96)})
    (lora / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 4}))
    shiradelta.convert(lora, values="f32", sparsity=1.0, base=tmp_path / "base")
    assert np.allclose(stored(tmp_path / "lora.shd", "h.0.c_attn.weight"), dense, rtol=1e-4)


def test_lone_file_with_alpha_tensors_and_kohya_names(tmp_path: Path):
    base = write_model(tmp_path / "base", random_tensors(torch.bfloat16))
    tensors = {
        "lora_unet_model_layers_0_mlp_up_proj.lora_down.weight": torch.randn(4, 32),
        "lora_unet_model_layers_0_mlp_up_proj.lora_up.weight": torch.randn(96, 4),
        "lora_unet_model_layers_0_mlp_up_proj.alpha": torch.tensor(2.0),
    }
    save_file(tensors, tmp_path / "k.safetensors")
    with pytest.raises(SourceError, match="--base"):
        shiradelta.convert(tmp_path / "k.safetensors")
    report = shiradelta.convert(tmp_path / "k.safetensors", base=base, sparsity=1.0, values="f32")
    assert not report.warnings
    down, up, alpha = tensors.values()
    assert np.allclose(stored(tmp_path / "k.shd", UP), (up @ down * (alpha / 4)).numpy(), rtol=1e-4, atol=1e-5)


def test_unmatched_and_incomplete_modules_are_reported(tmp_path: Path, made: Path):
    lora = write_lora(tmp_path / "lora", {**MODULES, "elsewhere": (8, 8)}, {"lora_alpha": 4})
    tensors = load_file(lora / "adapter_model.safetensors")
    del tensors["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"]
    save_file(tensors, lora / "adapter_model.safetensors")
    with pytest.raises(SourceError, match=r"2 tensors cannot be converted: .*only B of A.*no such tensor.*--skip"):
        shiradelta.convert(lora, base=made / "bf16")
    assert not (tmp_path / "lora.shd").exists()
    report = shiradelta.convert(lora, base=made / "bf16", skip=["elsewhere", "*.down_proj"])
    assert [tensor.name for tensor in report.tensors] == [UP]
    assert set(report.skipped.values()) == {"only B of A and B is there", "the base has no such tensor"}


@pytest.mark.parametrize("extra", ["lora_diag", "lokr_t1"])
def test_other_methods_are_not_taken_for_lora(tmp_path: Path, extra: str):
    lora = write_lora(tmp_path / "lora", MODULES, {})
    tensors = load_file(lora / "adapter_model.safetensors")
    tensors[f"base_model.model.model.layers.0.mlp.up_proj.{extra}"] = torch.ones(4)
    save_file(tensors, lora / "adapter_model.safetensors")
    with pytest.raises(SourceError, match="merge it first"):
        shiradelta.convert(lora)


# ------------------------------------------------------------------------------------ fine-tunes, diffs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_whole_fine_tune_is_reproduced_at_sparsity_one(tmp_path: Path, dtype: torch.dtype):
    base, tuned = random_tensors(dtype, 0), random_tensors(dtype, 1)
    tuned["model.layers.0.norm.weight"] = base["model.layers.0.norm.weight"].clone()
    tuned["position_ids"] = torch.arange(6)
    base["position_ids"] = torch.zeros(6, dtype=torch.int64)
    tuned["score.weight"] = torch.ones(2, 32, dtype=dtype)
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "tuned", tuned)
    report = shiradelta.convert(tmp_path / "tuned", tmp_path / "d.shd", 1.0, tmp_path / "base", "f32")
    assert report.skipped == {"model.layers.0.norm.weight": "nothing changes"}
    assert report.energy_kept == pytest.approx(1.0)
    shiradelta.apply(tmp_path / "base", tmp_path / "d.shd")
    patched = load_file(tmp_path / "base" / "model.safetensors")
    for name, tensor in tuned.items():
        if dtype in (torch.float32, torch.float16, torch.bfloat16) and name in base:
            # W + fl32(T - W) is T up to the roundings of two additions.
            assert torch.allclose(patched[name].float(), tensor.float(), rtol=1e-2, atol=1e-6), name
        else:
            assert torch.equal(patched[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_energy_kept_is_that_of_the_stored_values(tmp_path: Path, made: Path):
    report = shiradelta.convert(made / "tuned_a", tmp_path / "d.shd", 0.02, made / "bf16", "int4")
    base, tuned = (load_file(made / m / "model.safetensors") for m in ("bf16", "tuned_a"))
    energy = lost = 0.0
    for tensor in report.tensors:
        delta = (tuned[tensor.name].float() - base[tensor.name].float()).double().numpy()
        difference = delta - stored(tmp_path / "d.shd", tensor.name)
        assert tensor.energy_kept == pytest.approx(1 - (difference**2).sum() / (delta**2).sum(), abs=1e-6)
        energy, lost = energy + (delta**2).sum(), lost + (difference**2).sum()
    assert report.energy_kept == pytest.approx(1 - lost / energy, abs=1e-6)
    assert any("energy" in warning for warning in report.warnings)


def test_scope_model_changes_the_same_number_in_all(tmp_path: Path, made: Path):
    report = shiradelta.convert(made / "tuned_a", tmp_path / "d.shd", 0.02, made / "bf16", scope="model")
    assert report.nnz == round(0.02 * sum(t.numel() for t in random_tensors(torch.bfloat16).values()))


def test_resized_tensors_are_refused_or_skipped_aloud(tmp_path: Path, made: Path):
    tuned = random_tensors(torch.bfloat16, 1)
    tuned["model.embed_tokens.weight"] = torch.zeros(65, 32, dtype=torch.bfloat16)
    write_model(tmp_path / "tuned", tuned)
    with pytest.raises(SourceError, match=r"embed_tokens.weight: its shape is \[65, 32\], .*resize the base's"):
        shiradelta.convert(tmp_path / "tuned", tmp_path / "d.shd", base=made / "bf16")
    report = shiradelta.convert(tmp_path / "tuned", tmp_path / "d.shd", base=made / "bf16", skip="*embed_tokens*")
    assert "model.embed_tokens.weight" in report.skipped
    assert any("shape" in warning for warning in report.warnings)


def test_dense_diffs(tmp_path: Path, made: Path):
    diff = torch.randn(96, 32)
    save_file({UP.removesuffix(".weight") + ".diff": diff}, tmp_path / "d.safetensors")
    shiradelta.convert(tmp_path / "d.safetensors", sparsity=0.5, values="f32")
    assert set(np.flatnonzero(stored(tmp_path / "d.shd", UP)).tolist()) == top(diff.numpy(), 96 * 16)
    save_file({UP: diff}, tmp_path / "plain.safetensors")
    shiradelta.convert(tmp_path / "plain.safetensors", kind="diff", base=made / "bf16", sparsity=1.0, values="f32")
    assert np.array_equal(stored(tmp_path / "plain.shd", UP), diff.numpy())


def test_pefts_own_shira_adapter(tmp_path: Path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(24, 40, bias=False), torch.nn.Linear(40, 24, bias=False))
    write_model(tmp_path / "base", {k: v.clone() for k, v in model.state_dict().items()})
    tuned = get_peft_model(model, ShiraConfig(r=2, target_modules=["0", "1"], init_weights=False))
    tuned.save_pretrained(tmp_path / "shira")
    report = shiradelta.convert(tmp_path / "shira", base=tmp_path / "base", values="f32")
    assert {tensor.nnz for tensor in report.tensors} == {2 * 64}
    shiradelta.apply(tmp_path / "base", tmp_path / "shira.shd")
    patched = load_file(tmp_path / "base" / "model.safetensors")
    with torch.sparse.check_sparse_tensor_invariants(True):
        merged = tuned.merge_and_unload().state_dict()
    assert all(torch.equal(patched[name], tensor) for name, tensor in merged.items())


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"w.positions": torch.tensor([0, 4]), "w.values": torch.ones(1)}, "2 indices for 1 value"),
        ({"w.positions": torch.tensor([0, 16]), "w.values": torch.ones(2)}, "outside of shape"),
        ({"w.positions": torch.tensor([0, -1]), "w.values": torch.ones(2)}, "outside of shape"),
        ({"w.positions": torch.tensor([3, 3]), "w.values": torch.ones(2)}, "twice"),
        ({"w.positions": torch.tensor([3, 4]), "w.values": torch.tensor([1, torch.nan])}, "NaN"),
    ],
)
def test_bad_sparse_diffs(tmp_path: Path, tensors: dict[str, torch.Tensor], message: str):
    base = write_model(tmp_path / "base", {"w": torch.zeros(4, 4)})
    save_file(tensors, tmp_path / "d.safetensors")
    with pytest.raises(SourceError, match=f"tensor 'w' .*{message}"):
        shiradelta.convert(tmp_path / "d.safetensors", base=base)


# -------------------------------------------------------------------------------------------- bad input


def test_nan_in_a_source_is_named_and_leaves_nothing(tmp_path: Path, made: Path):
    tuned = random_tensors(torch.bfloat16, 1)
    tuned[UP][3, 3] = torch.nan
    write_model(tmp_path / "tuned", tuned)
    with pytest.raises(SourceError, match=f"{UP}.*NaN"):
        shiradelta.convert(tmp_path / "tuned", tmp_path / "d.shd", base=made / "bf16")
    assert [path.name for path in tmp_path.iterdir()] == ["tuned"]


def test_nothing_matches(tmp_path: Path, made: Path):
    lora = write_lora(tmp_path / "lora", {"elsewhere": (8, 8)}, {})
    with pytest.raises(SourceError, match="nothing in it can be converted"):
        shiradelta.convert(lora, base=made / "bf16")


def test_full_fine_tune_needs_its_base(made: Path):
    with pytest.raises(SourceError, match="--base"):
        shiradelta.convert(made / "tuned_a")


def test_missing_files(tmp_path: Path):
    with pytest.raises(SourceError, match="no such file"):
        shiradelta.convert(tmp_path / "nothing.safetensors")


def test_same_source_gives_the_same_bytes(tmp_path: Path, made: Path):
    for name in ("x", "y"):
        shiradelta.convert(made / "tuned_a", tmp_path / f"{name}.shd", base=made / "bf16")
    assert (tmp_path / "x.shd").read_bytes() == (tmp_path / "y.shd").read_bytes()
