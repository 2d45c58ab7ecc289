"""Adapters of FLUX in forms of their own: x-flux, control LoRA with biases, kohya's with text encoders, LyCORIS."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path

import diffusers
import torch
from safetensors.torch import save_file

from .case import Case, Made
from .diffusion import ALPHA, FAMILIES, RANK, Weights, dotted, factors, kohya, merged, modules_of, written

FLUX = next(family for family in FAMILIES if family.name == "FLUX")
#: The processors of x-flux -> the original module, of whose outputs they change the first ones.
PROCESSORS = {
    "double_blocks.{}.processor.qkv_lora1": "double_blocks.{}.img_attn.qkv",
    "double_blocks.{}.processor.qkv_lora2": "double_blocks.{}.txt_attn.qkv",
    "double_blocks.{}.processor.proj_lora1": "double_blocks.{}.img_attn.proj",
    "double_blocks.{}.processor.proj_lora2": "double_blocks.{}.txt_attn.proj",
    "single_blocks.{}.processor.qkv_lora": "single_blocks.{}.linear1",
    "single_blocks.{}.processor.proj_lora": "single_blocks.{}.linear2",
}


def xflux(folder: Path, base: str) -> Made:
    """The layers of attention processors, one of which changes a part of a tensor."""
    library = FLUX.weights()
    original = FLUX.original(library)
    after, file = dict(original), Weights()
    for number in range(2):
        for processor, module in PROCESSORS.items():
            name = f"{module.format(number)}.weight"
            rows = 96 if processor.endswith("qkv_lora") else original[name].shape[0]
            a, b = torch.randn(RANK, original[name].shape[1]), torch.randn(rows, RANK) * 0.1
            file |= {f"{processor.format(number)}.{end}.weight": part for end, part in (("down", a), ("up", b))}
            after[name] = original[name].clone()
            after[name][:rows] += b @ a
    save_file(file, folder / "x.safetensors")
    return Made(folder / "x.safetensors", *written(folder, base, library, original, FLUX.library(after), after))


def control(folder: Path, base: str) -> Made:
    """Black Forest Labs' control LoRA: original names without a prefix, with biases and whole norms."""
    library = FLUX.weights()
    original = FLUX.original(library)
    low = factors(modules_of(original))
    file, after = dotted("", low), merged(original, low, 1.0)
    for name in low:
        bias = torch.randn(original[f"{name}.bias"].shape) * 0.1
        file[f"{name}.lora_B.bias"] = bias
        after[f"{name}.bias"] = original[f"{name}.bias"] + bias
    for name in [name for name in original if name.endswith("_norm.scale")]:
        file[name] = after[name] = original[name] + 0.25
    save_file(file, folder / "x.safetensors")
    return Made(folder / "x.safetensors", *written(folder, base, library, original, FLUX.library(after), after))


def text_encoders(folder: Path) -> Made:
    """kohya's names of CLIP (te1) and T5 (te3), which is the second text encoder of the pipeline."""
    names = {"text_encoder": ("lora_te1", "text_model.encoder.layers.0.mlp.fc1")}
    names["text_encoder_2"] = ("lora_te3", "encoder.block.0.layer.0.SelfAttention.q")
    file, wanted = Weights(), Weights()
    index = {}
    for component, (prefix, module) in names.items():
        weight = torch.randn(12, 8)
        low = factors({module: (12, 8)})
        file |= kohya(prefix, low)
        wanted[f"{component}/{module}.weight"] = merged({f"{module}.weight": weight}, low, ALPHA / RANK)[
            f"{module}.weight"
        ]
        (folder / "base" / component).mkdir(parents=True)
        save_file({f"{module}.weight": weight}, folder / "base" / component / "model.safetensors")
        index[component] = ["transformers", "Model"]
    (folder / "base" / "model_index.json").write_text(json.dumps(index))
    save_file(file, folder / "x.safetensors")
    return Made(folder / "x.safetensors", folder / "base", wanted)


def lycoris(folder: Path, algorithm: str, base: str) -> Made:
    """LoHa, LoKr and full differences on fused queries, keys and values."""
    library = FLUX.weights()
    original = FLUX.original(library)
    file, after = Weights(), dict(original)
    for name, (rows, columns) in modules_of(original).items():
        if "qkv" not in name and "linear1" not in name:
            continue
        module = f"lora_unet_{name.replace('.', '_')}"
        if algorithm == "full":
            change = torch.randn(rows, columns) * 0.1
            file[f"{module}.diff"] = change
        elif algorithm == "LoHa":
            parts = [torch.randn(shape) * 0.3 for shape in ((rows, RANK), (RANK, columns)) * 2]
            ends = ("w1_a", "w1_b", "w2_a", "w2_b")
            file |= {f"{module}.hada_{end}": part for end, part in zip(ends, parts, strict=True)}
            file[f"{module}.alpha"] = torch.tensor(ALPHA)
            change = (parts[0] @ parts[1]) * (parts[2] @ parts[3]) * (ALPHA / RANK)
        else:
            one, two = torch.randn(4, 2) * 0.3, torch.randn(rows // 4, columns // 2) * 0.3
            file |= {f"{module}.lokr_w1": one, f"{module}.lokr_w2": two, f"{module}.alpha": torch.tensor(ALPHA)}
            change = torch.kron(one, two)
        after[f"{name}.weight"] = original[f"{name}.weight"] + change
    save_file(file, folder / "x.safetensors")
    return Made(folder / "x.safetensors", *written(folder, base, library, original, FLUX.library(after), after))


def lycoris_dora(folder: Path, on_output: bool, base: str) -> Made:
    """LyCORIS' DoRA of fused layers: its own merge of each."""
    from lycoris.modules.locon import LoConModule

    library = FLUX.weights()
    original = FLUX.original(library)
    file, after = Weights(), dict(original)
    for name, (rows, columns) in modules_of(original).items():
        layer = torch.nn.Linear(columns, rows, bias=False)
        layer.weight.data = original[f"{name}.weight"].clone()
        module = f"lora_unet_{name.replace('.', '_')}"
        lora = LoConModule(module, layer, lora_dim=RANK, alpha=ALPHA, weight_decompose=True, wd_on_out=on_output)
        with torch.no_grad():
            for parameter in lora.parameters():
                parameter += torch.randn_like(parameter) * 0.1
            held = {f"{module}.{key}": tensor.clone() for key, tensor in lora.state_dict().items()}
            file |= {key: tensor for key, tensor in held.items() if "org_" not in key}
            after[f"{name}.weight"] = lora.get_merged_weight()[0]
    save_file(file, folder / "x.safetensors")
    return Made(folder / "x.safetensors", *written(folder, base, library, original, FLUX.library(after), after))


def peft_dora(folder: Path, base: str) -> Made:
    """PEFT's DoRA of diffusers' layers, some of which the original layout joins: PEFT's merge of each."""
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    library = FLUX.weights()
    original = FLUX.original(library)
    model = getattr(diffusers, FLUX.model)(**FLUX.config)
    model.load_state_dict(library)
    modules = sorted(name for name in modules_of(library))
    config = LoraConfig(r=RANK, lora_alpha=RANK, use_dora=True, init_lora_weights=False, target_modules=modules)
    model = inject_adapter_in_model(config, model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter += torch.rand_like(parameter) * 0.1
    state = get_peft_model_state_dict(model)
    save_file({f"transformer.{key}": tensor.contiguous() for key, tensor in state.items()}, folder / "x.safetensors")
    tuned = dict(library)
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            layer.merge()
            tuned[f"{name}.weight"] = layer.get_base_layer().weight.detach().clone()
    return Made(folder / "x.safetensors", *written(folder, base, library, original, tuned, FLUX.original(tuned)))


def cases() -> Iterator[Case]:
    """A row a form and base."""
    by = f"diffusers {diffusers.__version__}, key tables"
    for base in ("pipeline", "bare file"):
        yield Case("x-flux", f"FLUX, {base}", by, partial(xflux, base=base))
        yield Case("Black Forest Labs", f"FLUX, control LoRA, {base}", by, partial(control, base=base))
        for algorithm in ("LoHa", "LoKr", "full"):
            yield Case("LyCORIS", f"FLUX, {algorithm}, {base}", by, partial(lycoris, algorithm=algorithm, base=base))
        for on_output in (True, False):
            kind = f"FLUX, DoRA on {'outputs' if on_output else 'inputs'}, {base}"
            made = f"lycoris-lora {version('lycoris-lora')}, {by}"
            yield Case("LyCORIS", kind, made, partial(lycoris_dora, on_output=on_output, base=base))
        made = f"peft {version('peft')}, {by}"
        yield Case("diffusers", f"FLUX, DoRA of PEFT, {base}", made, partial(peft_dora, base=base))
    yield Case("kohya", "FLUX, text encoders", by, text_encoders)
