"""AdaLoRA, LoHa, LoKr, trained tokens: what PEFT merges, and LyCORIS' own files, against their formulas."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

import shiradelta
from shiradelta.errors import SourceError
from tests.converters.test_layouts import write_bert


@pytest.fixture(scope="module")
def bert() -> BertModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return BertModel(BertConfig(vocab_size=40, max_position_embeddings=16, **sizes))


pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
TARGETS = ["query", "intermediate.dense"]


@pytest.mark.parametrize(
    "config",
    [
        AdaLoraConfig(target_modules=TARGETS, init_r=6, target_r=3, lora_alpha=20, total_step=10),
        LoHaConfig(target_modules=TARGETS, r=3, alpha=12, init_weights=False),
        LoHaConfig(target_modules=TARGETS, r=3, alpha=12, alpha_pattern={"query": 5}, init_weights=False),
        LoKrConfig(target_modules=TARGETS, r=2, alpha=10, init_weights=False),
        LoKrConfig(target_modules=TARGETS, r=2, alpha=10, decompose_both=True, init_weights=False),
        LoKrConfig(target_modules=TARGETS, r=64, alpha=10, init_weights=False),  # both factors whole
    ],
    ids=["adalora", "loha", "loha, pattern", "lokr", "lokr, both low-rank", "lokr, whole factors"],
)
def test_what_peft_merges(config: Any, bert: BertModel, tmp_path: Path):
    tuned = get_peft_model(deepcopy(bert), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    base = write_bert(tmp_path / "base", bert)
    report = shiradelta.convert(tmp_path / "adapter", tmp_path / "a.shd", 1.0, base, values="f32")
    assert len(report.tensors) == 4
    before = load_file(base / "model.safetensors")
    merged = {name: weight for name, weight in tuned.merge_and_unload().state_dict().items() if name in before}
    with shiradelta.open_delta(tmp_path / "a.shd") as delta:
        for name, weight in before.items():
            change = torch.from_numpy(delta[name].to_dense()) if name in delta else torch.zeros_like(weight)
            torch.testing.assert_close(change, merged[name] - weight, atol=2e-6, rtol=1e-4)


def test_trained_rows_of_an_embedding(bert: BertModel, tmp_path: Path):
    config = LoraConfig(
        target_modules=["query"], trainable_token_indices={"word_embeddings": [7, 2]}, init_lora_weights=False
    )
    tuned = get_peft_model(deepcopy(bert), config)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "trainable_tokens_delta" in name:
                weight += torch.randn(weight.shape)
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    base = write_bert(tmp_path / "base", bert)
    report = shiradelta.convert(tmp_path / "adapter", tmp_path / "a.shd", base=base, values="f32")
    name = "embeddings.word_embeddings.weight"
    assert name in [tensor.name for tensor in report.tensors]
    wanted = tuned.merge_and_unload().state_dict()[name] - load_file(base / "model.safetensors")[name]
    assert set(wanted.abs().sum(1).nonzero()[:, 0].tolist()) == {2, 7}
    with shiradelta.open_delta(tmp_path / "a.shd") as delta:
        torch.testing.assert_close(torch.from_numpy(delta[name].to_dense()), wanted)
    about = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    for rows, message in ((None, "does not say which rows"), ({"word_embeddings": [7]}, "does not have 1 row")):
        changed = json.dumps({**about, "trainable_token_indices": rows})
        (tmp_path / "adapter" / "adapter_config.json").write_text(changed)
        with pytest.raises(SourceError, match=message):
            shiradelta.convert(tmp_path / "adapter", tmp_path / "b.shd", base=base)
        report = shiradelta.convert(tmp_path / "adapter", tmp_path / "b.shd", base=base, skip=name)
        assert any(message in warning for warning in report.warnings)
        assert name not in [tensor.name for tensor in report.tensors]


def test_an_adalora_without_its_configuration_is_refused(bert: BertModel, tmp_path: Path):
    config = AdaLoraConfig(target_modules=TARGETS, total_step=10)
    get_peft_model(deepcopy(bert), config).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    lone = tmp_path / "lone.safetensors"
    save_file(load_file(tmp_path / "adapter" / "adapter_model.safetensors"), lone)
    with pytest.raises(SourceError, match=r"AdaLoRA, whose scale is in adapter_config\.json"):
        shiradelta.convert(lone, base=write_bert(tmp_path / "base", bert))


UP, CONV = "down_blocks.0.up.weight", "mid.conv.weight"


@pytest.fixture
def unet(tmp_path: Path) -> Path:
    """A component with a linear layer and a convolution."""
    tensors = {
        UP: torch.randn(12, 8),
        CONV: torch.randn(6, 4, 3, 3),
        "norm.weight": torch.randn(6),
        "norm.bias": torch.randn(6),
    }
    (tmp_path / "unet").mkdir()
    save_file(tensors, tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "unet" / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    return tmp_path / "unet"


def converted(tensors: dict[str, torch.Tensor], unet: Path, **options: Any) -> dict[str, torch.Tensor]:
    source = unet.parent / "lycoris.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, source)
    shiradelta.convert(source, unet.parent / "a.shd", 1.0, unet, values="f32", **options)
    with shiradelta.open_delta(unet.parent / "a.shd") as delta:
        return {name: torch.from_numpy(delta[name].to_dense()) for name in delta}


def loha(rows: int, columns: int, rank: int = 2) -> dict[str, torch.Tensor]:
    sides = {"a": (rows, rank), "b": (rank, columns)}
    return {f"hada_w{n}_{side}": torch.randn(shape) for n in (1, 2) for side, shape in sides.items()}


def test_loha_as_lycoris_saves_it(unet: Path):
    up, conv = loha(12, 8), loha(6, 4 * 9)
    parts = {"lora_unet_down_blocks_0_up": (up, 4.0), "lora_unet_mid_conv": (conv, 1.0)}
    file = {f"{module}.{part}": t for module, (held, _) in parts.items() for part, t in held.items()}
    file |= {f"{module}.alpha": torch.tensor(alpha) for module, (_, alpha) in parts.items()}
    found = converted(file, unet)
    for name, held, scale in ((UP, up, 2.0), (CONV, conv, 0.5)):
        product = (held["hada_w1_a"] @ held["hada_w1_b"]) * (held["hada_w2_a"] @ held["hada_w2_b"]) * scale
        torch.testing.assert_close(found[name], product.view(found[name].shape))


def test_lokr_as_lycoris_saves_it(unet: Path):
    linear = {"lokr_w1": torch.randn(3, 2), "lokr_w2_a": torch.randn(4, 2), "lokr_w2_b": torch.randn(2, 4)}
    conv = {"lokr_w1": torch.randn(2, 2), "lokr_w2": torch.randn(3, 2, 3, 3)}
    file = {f"lora_unet_down_blocks_0_up.{part}": t for part, t in linear.items()}
    file |= {f"lora_unet_mid_conv.{part}": t for part, t in conv.items()}
    file |= {"lora_unet_down_blocks_0_up.alpha": torch.tensor(6.0), "lora_unet_mid_conv.alpha": torch.tensor(7.0)}
    found = converted(file, unet)
    wanted = torch.kron(linear["lokr_w1"], linear["lokr_w2_a"] @ linear["lokr_w2_b"]) * 3
    torch.testing.assert_close(found[UP], wanted)
    # Both factors are whole: there is no rank, and alpha counts for nothing.
    torch.testing.assert_close(found[CONV], torch.kron(conv["lokr_w1"][:, :, None, None], conv["lokr_w2"]))


def test_tucker_cores(unet: Path):
    torch.manual_seed(0)
    core, left, right = torch.randn(2, 2, 3, 3), torch.randn(6, 2), torch.randn(2, 4)
    tucker = torch.einsum("ijkl,pi,jr->prkl", core, left, right)
    locon = {
        "lora_up.weight": left[:, :, None, None],
        "lora_mid.weight": core,
        "lora_down.weight": right[:, :, None, None],
    }
    one, other = torch.randn(2, 2, 3, 3), torch.randn(2, 2, 3, 3)
    sides = {f"hada_w{n}_{side}": torch.randn(2, size) for n in (1, 2) for side, size in (("a", 6), ("b", 4))}
    both = [
        torch.einsum("ijkl,ip,jr->prkl", t, sides[f"hada_w{n}_a"], sides[f"hada_w{n}_b"])
        for n, t in ((1, one), (2, other))
    ]
    small = {"lokr_w1": torch.randn(3, 2), "lokr_w2_a": torch.randn(2, 2), "lokr_w2_b": torch.randn(2, 2)}
    second = torch.einsum("ijkl,ip,jr->prkl", one, small["lokr_w2_a"], small["lokr_w2_b"]).contiguous()
    for held, wanted in (
        (locon, tucker * 0.75),
        ({**sides, "hada_t1": one, "hada_t2": other}, both[0] * both[1] * 0.75),
        ({**small, "lokr_t2": one}, torch.kron(small["lokr_w1"][:, :, None, None], second) * 0.75),
    ):
        found = converted(
            {f"lora_unet_mid_conv.{part}": t for part, t in {**held, "alpha": torch.tensor(1.5)}.items()}, unet
        )
        torch.testing.assert_close(found[CONV], wanted)
    locon["lora_mid.weight"] = torch.randn(2, 3, 3, 3)
    with pytest.raises(SourceError, match=r"shapes \[6, 2, 1, 1\], \[2, 3, 3, 3\] and \[2, 4, 1, 1\] do not multiply"):
        converted({f"lora_unet_mid_conv.{part}": t for part, t in locon.items()}, unet)


def test_differences_alone_and_beside_factors(unet: Path):
    """What LyCORIS calls full, and what it trains of norms."""
    whole = {
        "lora_unet_mid_conv.diff": torch.randn(6, 4, 3, 3),
        "lora_unet_norm.w_norm": torch.randn(6),
        "lora_unet_norm.b_norm": torch.randn(6),
    }
    wanted = dict(zip((CONV, "norm.weight", "norm.bias"), whole.values(), strict=True))
    for beside in ({}, {f"lora_unet_down_blocks_0_up.{part}": tensor for part, tensor in loha(12, 8).items()}):
        found = converted({**whole, **beside}, unet)
        assert set(found) == {*wanted, *([UP] if beside else [])}
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name], tensor)


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({k: v for k, v in loha(12, 8).items() if k != "hada_w2_a"}, "is there"),
        ({**loha(12, 8), "hada_w1_b": torch.randn(3, 8)}, "do not multiply"),
        ({"lokr_w1": torch.randn(3, 2)}, "are not two factors"),
        ({"lokr_w1": torch.randn(3, 2), "lokr_w2_a": torch.randn(4, 2)}, "are not two factors"),
        ({"lokr_w1": torch.randn(3, 2), "lokr_w2": torch.randn(4, 3)}, "changes a tensor of shape"),
        ({**loha(12, 8), "hada_t1": torch.randn(2, 2, 3, 3)}, "only hada_t1 .* of .* hada_t2 is there"),
        ({**loha(12, 8), **{f"hada_t{n}": torch.randn(2, 3, 3) for n in (1, 2)}}, "do not multiply"),
        (
            {"lokr_w1": torch.randn(3, 2), "lokr_w2": torch.randn(4, 4), "lokr_w2_a": torch.randn(4, 1)},
            "not two factors",
        ),
        (
            {"lokr_w1": torch.randn(3, 2), "lokr_w2": torch.randn(4, 4), "lokr_t2": torch.randn(2, 2, 3)},
            "not two factors",
        ),
        ({"lokr_w1": torch.randn(3, 2), "lokr_t1": torch.randn(2, 2, 3)}, "decomposed too, .*; merge it first"),
        ({**loha(12, 8), "dora_scale": torch.randn(8, 8)}, "do not fit a tensor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_together(held: dict[str, torch.Tensor], message: str, unet: Path):
    with pytest.raises(SourceError, match=message):
        converted({f"lora_unet_down_blocks_0_up.{part}": tensor for part, tensor in held.items()}, unet)


def test_shards_of_a_variant_are_read_by_their_index(unet: Path):
    """As diffusers writes them: NAME.safetensors.index.fp16.json beside NAME-00001-of-00002.fp16.safetensors."""
    weights = load_file(unet / "diffusion_pytorch_model.safetensors")
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    weight_map = {}
    for number, (name, tensor) in enumerate(weights.items(), 1):
        file = f"diffusion_pytorch_model-{number:05}-of-00003.fp16.safetensors"
        save_file({name: tensor.half()}, unet / file)
        weight_map[name] = file
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (unet / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text(json.dumps(index))
    found = converted({f"lora_unet_down_blocks_0_up.{part}": tensor for part, tensor in loha(12, 8).items()}, unet)
    assert set(found) == {UP}
    shiradelta.apply(unet, unet.parent / "a.shd")
    assert shiradelta.verify(unet).state == "patched"


@pytest.mark.parametrize("rank", [1, 4, 64])
@pytest.mark.parametrize("kind", [LoKrConfig, LoHaConfig])
def test_convolutions_of_peft(kind: Any, rank: int, tmp_path: Path):
    """Its LoKr of one-dimensional ones is a Kronecker product of other dimensions where a factor is whole."""
    torch.manual_seed(0)
    layers = {"flat": torch.nn.Conv1d(6, 10, 3), "square": torch.nn.Conv2d(6, 10, 3), "odd": torch.nn.Linear(7, 13)}
    plain = torch.nn.ModuleDict(layers)
    (tmp_path / "base").mkdir()
    save_file(plain.state_dict(), tmp_path / "base" / "model.safetensors")
    before = {name: weight.clone() for name, weight in plain.state_dict().items()}
    tuned = get_peft_model(plain, kind(target_modules=list(layers), r=rank, alpha=3, init_weights=False))
    tuned.save_pretrained(tmp_path / "adapter")
    lost = kind is LoKrConfig and rank > 1
    if lost:
        with pytest.raises(SourceError, match="flat: PEFT takes the dimensions"):
            shiradelta.convert(tmp_path / "adapter", tmp_path / "a.shd", 1.0, tmp_path / "base", values="f32")
    report = shiradelta.convert(
        tmp_path / "adapter", tmp_path / "a.shd", 1.0, tmp_path / "base", values="f32", skip=["flat"] if lost else ()
    )
    assert all("PEFT takes the dimensions" in why for why in report.skipped.values())
    assert list(report.skipped) == (["flat"] if lost else [])
    merged = tuned.merge_and_unload().state_dict()
    with shiradelta.open_delta(tmp_path / "a.shd") as delta:
        for name in delta:
            change = torch.from_numpy(delta[name].to_dense())
            torch.testing.assert_close(change, merged[name] - before[name], atol=2e-6, rtol=1e-4)
