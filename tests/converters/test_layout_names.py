"""Adapters of diffusion transformers on checkpoints of the other layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import shiradelta
from converters.diffusion_layouts import LAYOUTS
from converters.layout_names import other_names
from shiradelta.errors import SourceError

#: A FLUX of 4 hidden units in either layout, in part.
QKV, LINEAR1, OUT = "double_blocks.0.img_attn.qkv", "single_blocks.3.linear1", "final_layer.adaLN_modulation.1"
ORIGINAL = {QKV: 12, LINEAR1: 20, OUT: 8, "img_in": 4}
ATTN, SINGLE = "transformer_blocks.0.attn", "single_transformer_blocks.3"
LIBRARY = {
    **{f"{ATTN}.to_{one}": 4 for one in "qkv"},
    **{f"{SINGLE}.attn.to_{one}": 4 for one in "qkv"},
    f"{SINGLE}.proj_mlp": 8,
    "norm_out.linear": 8,
    "x_embedder": 4,
}


def weights(sizes: dict[str, int], bias: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {f"{name}.weight": torch.randn(rows, 4, generator=generator) for name, rows in sizes.items()}
    return found | (
        {f"{name}.bias": torch.randn(rows, generator=generator) for name, rows in sizes.items()} if bias else {}
    )


def write_base(folder: Path, form: str) -> Path:
    if form == "pipeline":
        (folder / "base/transformer").mkdir(parents=True)
        (folder / "base/model_index.json").write_text(json.dumps({"transformer": ["diffusers", "Flux"]}))
        save_file(weights(LIBRARY), folder / "base/transformer/model.safetensors")
        return folder / "base"
    prefix = "model.diffusion_model." if form == "single" else ""
    save_file({prefix + name: tensor for name, tensor in weights(ORIGINAL).items()}, folder / "base.safetensors")
    return folder / "base.safetensors"


def changes(tensors: dict[str, Tensor], base: Path) -> dict[str, Tensor]:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, base.parent / "x.safetensors")
    shiradelta.convert(base.parent / "x.safetensors", base.parent / "x.shd", 1.0, base, "f32")
    with shiradelta.open_delta(base.parent / "x.shd") as delta:
        return {name: torch.from_numpy(delta[name].to_dense()) for name in delta}


def low_rank(rows: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 4, generator=generator), torch.randn(rows, 2, generator=generator)


def kohya(module: str, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    module = f"lora_unet_{module.replace('.', '_')}"
    return {f"{module}.lora_down.weight": a, f"{module}.lora_up.weight": b, f"{module}.alpha": torch.tensor(2.0)}


@pytest.mark.parametrize("style", ["kohya", "comfy", "original"])
def test_original_names_on_a_pipeline(tmp_path: Path, style: str):
    file: dict[str, Tensor] = {}
    for module, rows in ORIGINAL.items():
        a, b = low_rank(rows)
        prefix = "diffusion_model." if style == "comfy" else ""
        dotted = {f"{prefix}{module}.lora_A.weight": a, f"{prefix}{module}.lora_B.weight": b}
        file |= kohya(module, a, b) if style == "kohya" else dotted
    found = changes(file, write_base(tmp_path, "pipeline"))
    whole = {module: b @ a for module, rows in ORIGINAL.items() for a, b in [low_rank(rows)]}
    wanted = dict(zip([f"{ATTN}.to_{one}" for one in "qkv"], whole[QKV].chunk(3), strict=True))
    names = [*(f"{SINGLE}.attn.to_{one}" for one in "qkv"), f"{SINGLE}.proj_mlp"]
    wanted |= dict(zip(names, whole[LINEAR1].split([4, 4, 4, 8]), strict=True))
    wanted |= {"norm_out.linear": torch.cat(whole[OUT].chunk(2)[::-1]), "x_embedder": whole["img_in"]}
    assert found.keys() == {f"transformer/{name}.weight" for name in wanted}
    for name, change in wanted.items():
        torch.testing.assert_close(found[f"transformer/{name}.weight"], change)


@pytest.mark.parametrize("form", ["single", "bare"])
def test_names_of_diffusers_on_an_original_checkpoint(tmp_path: Path, form: str):
    file: dict[str, Tensor] = {}
    whole: dict[str, Tensor] = {}
    for seed, (module, rows) in enumerate(LIBRARY.items()):
        a, b = low_rank(rows, seed)
        file |= {f"transformer.{module}.lora_A.weight": a, f"transformer.{module}.lora_B.weight": b}
        whole[module] = b @ a
    found = changes(file, write_base(tmp_path, form))
    wanted = {
        QKV: torch.cat([whole[f"{ATTN}.to_{one}"] for one in "qkv"]),
        LINEAR1: torch.cat([*(whole[f"{SINGLE}.attn.to_{one}"] for one in "qkv"), whole[f"{SINGLE}.proj_mlp"]]),
        OUT: torch.cat(whole["norm_out.linear"].chunk(2)[::-1]),
        "img_in": whole["x_embedder"],
    }
    prefix = "model.diffusion_model." if form == "single" else ""
    assert found.keys() == {f"{prefix}{name}.weight" for name in wanted}
    for name, change in wanted.items():
        torch.testing.assert_close(found[f"{prefix}{name}.weight"], change)


def test_processors_of_x_flux(tmp_path: Path):
    """Their layers change a part of a tensor."""
    double, single = low_rank(12, 1), low_rank(12, 2)
    parts = {"double_blocks.0.processor.qkv_lora1": double, "single_blocks.3.processor.qkv_lora": single}
    file = {
        f"{module}.{end}.weight": t
        for module, pair in parts.items()
        for end, t in zip(("down", "up"), pair, strict=True)
    }
    found = changes(file, write_base(tmp_path, "bare"))
    torch.testing.assert_close(found[f"{QKV}.weight"], double[1] @ double[0])
    torch.testing.assert_close(found[f"{LINEAR1}.weight"], torch.cat([single[1] @ single[0], torch.zeros(8, 4)]))
    found = changes(file, write_base(tmp_path, "pipeline"))
    assert len(found) == 6
    torch.testing.assert_close(found[f"transformer/{SINGLE}.attn.to_k.weight"], (single[1] @ single[0])[4:8])


def test_biases_and_differences_are_split_alike(tmp_path: Path):
    a, b = low_rank(12)
    bias, whole = torch.randn(12), torch.randn(20, 4)
    file = {f"{QKV}.lora_A.weight": a, f"{QKV}.lora_B.weight": b, f"{QKV}.lora_B.bias": bias, f"{LINEAR1}.diff": whole}
    found = changes(file, write_base(tmp_path, "pipeline"))
    torch.testing.assert_close(found[f"transformer/{ATTN}.to_v.bias"], bias[8:])
    torch.testing.assert_close(found[f"transformer/{SINGLE}.proj_mlp.weight"], whole[12:])
    found = changes({f"diffusion_model.{LINEAR1}.diff": whole}, write_base(tmp_path / "alone", "pipeline"))
    torch.testing.assert_close(found[f"transformer/{SINGLE}.attn.to_k.weight"], whole[4:8])


def test_what_fits_two_models_is_refused(tmp_path: Path):
    """Wan 2.2 has two denoising models."""
    base = write_base(tmp_path, "pipeline")
    (base / "transformer_2").mkdir()
    save_file(weights(LIBRARY), base / "transformer_2/model.safetensors")
    for file in (
        kohya("img_in", *low_rank(4)),
        {f"diffusion_model.{key}": t for key, t in weights({"img_in": 4}).items()},
    ):
        held = {
            key.replace("img_in.weight", "img_in.diff").replace("img_in.bias", "img_in.diff_b"): t
            for key, t in file.items()
        }
        with pytest.raises(SourceError, match=r"may be 'transformer/img_in.*' or 'transformer_2/img_in"):
            changes(held, base)
    a, b = low_rank(4)
    found = changes({"transformer_2.x_embedder.lora_A.weight": a, "transformer_2.x_embedder.lora_B.weight": b}, base)
    assert list(found) == ["transformer_2/x_embedder.weight"]


def test_factors_of_another_size_are_refused(tmp_path: Path):
    with pytest.raises(SourceError, match=r"it changes a tensor of shape \[9, 4\], the model's has \[12, 4\]"):
        changes(kohya(QKV, *low_rank(9)), write_base(tmp_path, "pipeline"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_other_name_of_the_other_name_is_the_name(layout: str):
    """Both directions of each row: original shapes -> diffusers' -> original."""
    row = LAYOUTS[layout]
    names = {name.replace("{}", "0"): len(new) if isinstance(new, tuple) else 1 for name, new in row.modules.items()}
    shapes = {f"{name}.weight": (4 * count + (4 if count == 4 else 0), 4) for name, count in names.items()}
    shapes |= {name.replace("{}", "0"): (1, 4) for name in row.tensors}
    if layout == "Z-Image":
        shapes["x_pad_token"] = (1, 4)
    there = {name: where for name, where in other_names(shapes).items() if ".processor." not in name}
    library = {name: shapes[where] if isinstance(where, str) else where.shape for name, where in there.items()}
    back = other_names(library)
    assert {name for name in back if ".processor." not in name} == shapes.keys() - {"x_pad_token"} - library.keys()
    for name, where in back.items():
        if name in shapes:
            assert (library[where] if isinstance(where, str) else where.shape) == shapes[name]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_names_are_those_of_diffusers_own_converters():
    pytest.importorskip("diffusers")
    from benchmarks.sources.diffusion import FAMILIES

    for family in FAMILIES:
        library = family.weights()
        assert len(family.original(library)) > 10  # it compares with what diffusers makes of the original


def lengthened(weight: Tensor, a: Tensor, b: Tensor, lengths: Tensor) -> Tensor:
    """The change that a DoRA makes to a weight; lengths are [out, 1] or [1, in]."""
    summed = weight + b @ a
    return lengths * summed / summed.square().sum(dim=int(lengths.shape[0] > 1), keepdim=True).sqrt() - weight


@pytest.mark.parametrize("of", ["outputs", "inputs"])
def test_a_dora_on_a_split_weight(tmp_path: Path, of: str):
    """Lengths of outputs are split with the rows; those of inputs are of all rows together."""
    (a, b), base = low_rank(12), weights(LIBRARY)
    whole = torch.cat([base[f"{ATTN}.to_{one}.weight"] for one in "qkv"])
    lengths = torch.rand((12, 1) if of == "outputs" else (1, 4), generator=torch.Generator().manual_seed(2)) + 0.5
    file = {**kohya(QKV, a, b), f"lora_unet_{QKV.replace('.', '_')}.dora_scale": lengths}
    found = changes(file, write_base(tmp_path, "pipeline"))
    for one, wanted in zip("qkv", lengthened(whole, a, b, lengths).chunk(3), strict=True):
        torch.testing.assert_close(found[f"transformer/{ATTN}.to_{one}.weight"], wanted, rtol=1e-5, atol=1e-6)


def peft_dora(parts: str) -> tuple[dict[str, Tensor], list[Tensor]]:
    """A DoRA of some of three layers, and the changes of all."""
    file: dict[str, Tensor] = {}
    weight, wanted = weights(ORIGINAL)[f"{QKV}.weight"], []
    for number, one in enumerate("qkv"):
        (a, b), module = low_rank(4, number), f"transformer.{ATTN}.to_{one}"
        lengths = torch.rand(4, generator=torch.Generator().manual_seed(number)) + 0.5
        change = lengthened(weight[4 * number : 4 * number + 4], a, b, lengths[:, None])
        wanted.append(change if one in parts else torch.zeros(4, 4))
        if one in parts:
            file |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
            file[f"{module}.lora_magnitude_vector"] = lengths
    return file, wanted


@pytest.mark.parametrize("parts", ["qkv", "qv"])
@pytest.mark.parametrize("form", ["bare", "single"])
def test_a_dora_on_a_joined_weight(tmp_path: Path, parts: str, form: str):
    """Each of the layers has its rows; those without a DoRA keep theirs."""
    file, wanted = peft_dora(parts)
    found = changes(file, write_base(tmp_path, form))
    prefix = "model.diffusion_model." if form == "single" else ""
    torch.testing.assert_close(found[f"{prefix}{QKV}.weight"], torch.cat(wanted), rtol=1e-5, atol=1e-6)


def test_a_dora_does_not_add_up_with_another_change_of_its_rows(tmp_path: Path):
    file, _ = peft_dora("q")
    a, b = low_rank(12)
    file |= {f"{QKV}.lora_A.weight": a, f"{QKV}.lora_B.weight": b}
    with pytest.raises(SourceError, match="another module changes"):
        changes(file, write_base(tmp_path, "bare"))


@pytest.mark.parametrize(
    ("lengths", "dtype", "message"),
    [
        (torch.ones(11, 1), torch.float32, "do not fit a tensor of shape"),
        (torch.ones(12, 1), torch.bfloat16, "has in part only, or in several dtypes"),
    ],
)
def test_a_dora_that_does_not_fit_a_split_weight(tmp_path: Path, lengths: Tensor, dtype: torch.dtype, message: str):
    base = write_base(tmp_path, "pipeline")
    held = weights(LIBRARY)
    held[f"{ATTN}.to_k.weight"] = held[f"{ATTN}.to_k.weight"].to(dtype)
    save_file(held, base / "transformer/model.safetensors")
    file = {**kohya(QKV, *low_rank(12)), f"lora_unet_{QKV.replace('.', '_')}.dora_scale": lengths}
    with pytest.raises(SourceError, match=message):
        changes(file, base)


def test_a_dora_with_modules_of_a_plain_lora(tmp_path: Path):
    """A file without a configuration does not say whether lengths are missing."""
    file, _ = peft_dora("qv")
    del file[f"transformer.{ATTN}.to_v.lora_magnitude_vector"]
    base = write_base(tmp_path, "bare")
    save_file(file, tmp_path / "x.safetensors")
    report = shiradelta.convert(tmp_path / "x.safetensors", tmp_path / "x.shd", 1.0, base, "f32")
    assert any("1 of 2 modules" in warning and "plain LoRA" in warning for warning in report.warnings)
