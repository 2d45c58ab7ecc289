"""LoRA of torchtune, NeMo and llama.cpp, and QLoRA, on a small Llama of transformers."""

from __future__ import annotations

import importlib.util
import json
import tarfile
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from .case import Case, Made

HEADS, KEYS, HIDDEN = 4, 2, 32
RANK, ALPHA = 2, 5.0
SCALE = ALPHA / RANK
Weights = dict[str, Tensor]


def base_of(folder: Path, kind: str = "llama", **options: Any) -> Weights:
    """Saves a small model; its weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    config = transformers.AutoConfig.for_model(
        kind, **{**sizes, "num_key_value_heads": KEYS, "vocab_size": 40, "tie_word_embeddings": False, **options}
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder / "base")
    return dict(model.state_dict())


def low_rank(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    return torch.randn(RANK, columns), torch.randn(rows, RANK) * 0.1


# ------------------------------------------------------------------------------------------ torchtune


def torchtunes() -> Any:
    """torchtune's conversions of weights; the package itself needs an older torchao."""
    package = importlib.util.find_spec("torchtune")
    assert package is not None
    assert package.submodule_search_locations
    file = Path(package.submodule_search_locations[0]) / "models" / "convert_weights.py"
    spec = importlib.util.spec_from_file_location("torchtune_convert_weights", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def torchtune(folder: Path, dora: bool = False, peft: bool = False) -> Made:
    """An adapter in torchtune's names, or as it saves it for PEFT, and what torchtune makes of it."""
    tune, before = torchtunes(), base_of(folder)
    sizes = {"num_heads": HEADS, "num_kv_heads": KEYS, "dim": HIDDEN}
    weights = tune.hf_to_tune(before, **sizes)
    file, after = Weights(), dict(weights)
    for name in ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.output_proj", "mlp.w1", "mlp.w2", "mlp.w3"):
        for layer in range(2):
            module = f"layers.{layer}.{name}"
            weight = weights[f"{module}.weight"]
            a, b = low_rank(*weight.shape)
            file |= {f"{module}.lora_a.weight": a, f"{module}.lora_b.weight": b}
            tuned = weight + SCALE * b @ a
            if dora:
                file[f"{module}.magnitude"] = lengths = torch.rand(len(weight)) + 0.5
                tuned = tuned * (lengths / tuned.norm(dim=1))[:, None]
            after[f"{module}.weight"] = tuned
    adapter = folder / "adapter"
    adapter.mkdir()
    about = {"r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj"], "peft_type": "LORA"}
    (adapter / "adapter_config.json").write_text(json.dumps(about))
    wanted = {name: tensor for name, tensor in tune.tune_to_hf(after, **sizes).items() if name in before}
    if peft:
        saved = tune.tune_to_peft_adapter_weights(file, **sizes)
        save_file({key: part.contiguous() for key, part in saved.items()}, adapter / "adapter_model.safetensors")
        return Made(adapter, folder / "base", wanted)
    torch.save(file, adapter / "adapter_model.pt")
    return Made(adapter / "adapter_model.pt", folder / "base", wanted)


# ------------------------------------------------------------------------------------------ NeMo


def nemo(folder: Path, old: bool = False, apart: bool = False, packed: bool = False) -> Made:
    """Megatron's fused layers, as NeMo 1 or later names them."""
    before = base_of(folder)
    file, wanted = Weights(), Weights()
    head, group = HIDDEN // HEADS, HEADS // KEYS
    for layer in range(2):
        path = f"model.layers.{layer}"
        names = {one: f"{path}.self_attn.{one}_proj.weight" for one in "qkvo"}
        names |= {one: f"{path}.mlp.{one}_proj.weight" for one in ("gate", "up", "down")}
        there = f"model.decoder.layers.{layer}" if old else f"module.decoder.layers.{layer}"

        def put(module: str, a: Tensor, b: Tensor, there: str = there) -> None:
            file.update({f"{there}.{module}.linear_in.weight": a, f"{there}.{module}.linear_out.weight": b})

        rows = {one: len(before[name]) for one, name in names.items()}
        a, b = low_rank(rows["q"] + rows["k"] + rows["v"], HIDDEN)
        if apart:
            for one in "qkv":
                a, b = low_rank(rows[one], HIDDEN)
                put(f"self_attention.linear_qkv.adapter_{one}", a, b)
                wanted[names[one]] = before[names[one]] + SCALE * b @ a
        else:
            put(f"self_attention.{'adapter_layer.lora_kqv_adapter' if old else 'linear_qkv.adapter'}", a, b)
            heads = (SCALE * b @ a).reshape(KEYS, group + 2, head, HIDDEN)
            for one, part in (("q", heads[:, :group]), ("k", heads[:, group]), ("v", heads[:, group + 1])):
                wanted[names[one]] = before[names[one]] + part.reshape(-1, HIDDEN)
        a, b = low_rank(rows["o"], HIDDEN)
        put(f"self_attention.{'adapter_layer.lora_dense_attention_adapter' if old else 'linear_proj.adapter'}", a, b)
        wanted[names["o"]] = before[names["o"]] + SCALE * b @ a
        a, b = low_rank(rows["gate"] + rows["up"], HIDDEN)
        put(f"mlp.{'adapter_layer.lora_hto4h_adapter' if old else 'linear_fc1.adapter'}", a, b)
        gate, up = (SCALE * b @ a).chunk(2)
        wanted |= {names["gate"]: before[names["gate"]] + gate, names["up"]: before[names["up"]] + up}
        a, b = low_rank(rows["down"], 64)
        put(f"mlp.{'adapter_layer.lora_4htoh_adapter' if old else 'linear_fc2.adapter'}", a, b)
        wanted[names["down"]] = before[names["down"]] + SCALE * b @ a
    torch.save(file, folder / "model_weights.ckpt")
    if packed:
        (folder / "model_config.yaml").write_text(f"peft:\n  lora_tuning:\n    alpha: {ALPHA}\n")
        with tarfile.open(folder / "x.nemo", "w:") as archive:
            for name in ("model_config.yaml", "model_weights.ckpt"):
                archive.add(folder / name, f"./{name}")
        return Made(folder / "x.nemo", folder / "base", wanted)
    return Made(folder / "model_weights.ckpt", folder / "base", wanted, {"alpha": ALPHA})


# ------------------------------------------------------------------------------------------ llama.cpp


def gguf(folder: Path, architecture: str = "llama", dtype: str = "F32", embedding: bool = False) -> Made:
    """An adapter that the gguf package writes, under the names of its own table."""
    import gguf as library

    before = base_of(folder, architecture)
    kind = {value: key for key, value in library.MODEL_ARCH_NAMES.items()}[architecture]
    table = library.get_tensor_name_map(kind, 2)
    writer = library.GGUFWriter(folder / "x.gguf", architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", ALPHA)
    wanted = Weights()
    for name, weight in before.items():
        if weight.dim() != 2 or ("embed" in name and not embedding):
            continue
        a, b = torch.randn(32, weight.shape[1]), torch.randn(len(weight), 32) * 0.1
        if dtype == "F16":
            a, b = a.half().float(), b.half().float()
        if dtype == "Q8_0":
            packed = [library.quants.quantize(part.numpy(), library.GGMLQuantizationType.Q8_0) for part in (a, b)]
            read = [library.quants.dequantize(part, library.GGMLQuantizationType.Q8_0) for part in packed]
            a, b = (torch.from_numpy(part) for part in read)
        there = table.get_name(name, try_suffixes=(".weight",))
        if "embed" in name:  # llama.cpp looks up rows of the first factor
            first, second = torch.randn(len(weight), 32), torch.randn(weight.shape[1], 32) * 0.1
            wanted[name] = weight + ALPHA / 32 * first @ second.T
            pair = (first, second)
        else:
            wanted[name] = weight + ALPHA / 32 * b @ a
            heads = KEYS if "k_proj" in name else HEADS
            if architecture == "llama" and ("q_proj" in name or "k_proj" in name):  # Meta's order of rows
                b = b.reshape(heads, 2, len(b) // heads // 2, 32).swapaxes(1, 2).reshape(b.shape)
            pair = (a, b)
        for part, tensor in zip("ab", pair, strict=True):
            array = tensor.contiguous().numpy()
            if dtype == "F16":
                array = array.astype("float16")
            if dtype == "Q8_0":
                array = library.quants.quantize(array, library.GGMLQuantizationType.Q8_0)
                writer.add_tensor(f"{there}.lora_{part}", array, raw_dtype=library.GGMLQuantizationType.Q8_0)
            else:
                writer.add_tensor(f"{there}.lora_{part}", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Made(folder / "x.gguf", folder / "base", wanted)


def cases() -> Iterator[Case]:
    """A row a producer and form."""
    by = f"torchtune {version('torchtune')}"
    yield Case("torchtune", "LoRA, adapter_model.pt", by, torchtune)
    yield Case("torchtune", "DoRA, adapter_model.pt", by, partial(torchtune, dora=True))
    yield Case("torchtune", "LoRA, for PEFT", by, partial(torchtune, peft=True))
    yield Case("NeMo", "LoRA, linear_qkv.adapter", "key tables", nemo)
    yield Case("NeMo", "LoRA, adapter_layer (NeMo 1)", "key tables", partial(nemo, old=True))
    yield Case("NeMo", "LoRA, adapters apart", "key tables", partial(nemo, apart=True))
    yield Case("NeMo", "LoRA, .nemo archive", "key tables", partial(nemo, packed=True))
    by = f"gguf {version('gguf')}"
    yield Case("llama.cpp", "LoRA, GGUF, Llama", by, gguf)
    yield Case("llama.cpp", "LoRA, GGUF, Llama, F16", by, partial(gguf, dtype="F16"))
    yield Case("llama.cpp", "LoRA, GGUF, Llama, Q8_0", by, partial(gguf, dtype="Q8_0"))
    yield Case("llama.cpp", "LoRA, GGUF, Llama, embeddings", by, partial(gguf, embedding=True))
    yield Case("llama.cpp", "LoRA, GGUF, Qwen 2", by, partial(gguf, architecture="qwen2"))
