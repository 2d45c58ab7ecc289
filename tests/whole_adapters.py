"""Whole adapters of other programs than PEFT and kohya's, and matrices: what `whole_sources` lists besides its own."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import shiradelta as sd
from tests.source_containers import Gguf, Npz, Pickle, Tar
from tests.source_files import (
    SHAPES,
    UP,
    Json,
    Made,
    Random,
    Raw,
    Tree,
    Weights,
    adapter,
    bf16,
    f32,
    factors,
    folder,
    i64,
    model,
)

LAYER = "model.layers.0"
#: Two heads of queries and one of keys, of four units each, and two experts.
LLAMA = {
    "model.embed_tokens.weight": [9, 6],
    f"{LAYER}.self_attn.q_proj.weight": [8, 6],
    f"{LAYER}.self_attn.k_proj.weight": [4, 6],
    f"{LAYER}.self_attn.v_proj.weight": [4, 6],
    f"{LAYER}.mlp.gate_proj.weight": [32, 6],
    f"{LAYER}.mlp.up_proj.weight": [32, 6],
    **{f"model.layers.1.mlp.experts.{expert}.up_proj.weight": [5, 6] for expert in (0, 1)},
}
#: The dtype of text in a `.npz` file.
_TEXT = "|S3"


#: No model has so many words, so that transformers is not asked to build one, which would take a while.
_ABOUT = {"model_type": "llama", "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 1 << 40}


def llama(rng: Random) -> Tree:
    return folder("base", {name: bf16(rng, *shape) for name, shape in LLAMA.items()}, config=dict(_ABOUT))


def _shaped(rng: Random, shapes: dict[str, tuple[int, ...]]) -> dict[str, Made]:
    return {name: f32(rng, *shape) for name, shape in shapes.items()}


def torchtune(rng: Random) -> Tree:
    shapes = {"attn.q_proj.lora_a.weight": (2, 6), "attn.q_proj.lora_b.weight": (8, 2), "mlp.w1.lora_a.weight": (2, 6)}
    shapes |= {"mlp.w1.lora_b.weight": (32, 2), "attn.q_proj.magnitude": (8,)}
    tensors = _shaped(rng, {f"layers.0.{name}": shape for name, shape in shapes.items()})
    about = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    return {"source/x.safetensors": Weights(tensors), "source/adapter_config.json": Json(about)}


def nemo(rng: Random) -> Tree:
    modules = {"self_attention.linear_qkv": 16, "mlp.linear_fc1": 64}
    shapes: dict[str, tuple[int, ...]] = {}
    for module, rows in modules.items():
        name = f"decoder.layers.0.{module}.adapter"
        shapes |= {f"{name}.linear_in.weight": (2, 6), f"{name}.linear_out.weight": (rows, 2)}
    return {"source/x.safetensors": Weights(_shaped(rng, shapes))}


def nemo_archive(rng: Random) -> Tree:
    weights = nemo(rng)["source/x.safetensors"]
    assert isinstance(weights, Weights)
    config = b"peft:\n  lora_tuning:\n    adapter_dim: 2\n    alpha: " + rng.choice((b"4", b"${.adapter_dim}"))
    return {"source/x.nemo": Tar(weights.tensors, {"./model_config.yaml": config}, rng.random() < 0.3)}


def gguf(rng: Random) -> Tree:
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight.lora_a": (9, 2), "token_embd.weight.lora_b": (6, 2)}
    for layer, rows in {"attn_q": 8, "ffn_gate": 32}.items():
        shapes |= {f"blk.0.{layer}.weight.lora_a": (2, 6), f"blk.0.{layer}.weight.lora_b": (rows, 2)}
    shapes |= {"blk.1.ffn_up_exps.weight.lora_a": (2, 2, 6), "blk.1.ffn_up_exps.weight.lora_b": (2, 5, 2)}
    values = {
        "general.type": "adapter",
        "adapter.type": "lora",
        "general.architecture": rng.choice(("llama", "qwen2")),
        "adapter.lora.alpha": 4.0,
        "general.tags": ["a", "b"],
        "general.alignment": 32,
    }
    return {"source/x.gguf": Gguf(_shaped(rng, shapes), values)}


def gguf_q8(rng: Random) -> Tree:
    """Factors in blocks of 32 bytes and a scale."""
    blocks = np.zeros(2, [("scale", "<f2"), ("values", "i1", (32,))])
    blocks["scale"], blocks["values"] = 0.5, np.frombuffer(rng.randbytes(64), "i1").reshape(2, 32)
    names = [f"blk.0.ffn_down.weight.lora_{part}" for part in "ab"]
    tensors: dict[str, Made] = {names[0]: ("F32", [2, 32], blocks.tobytes()), names[1]: f32(rng, 6, 2)}
    values = {"general.type": "adapter", "adapter.type": "lora", "general.architecture": "qwen2"}
    return {"source/x.gguf": Gguf(tensors, values, {names[0]: 8})}


def gguf_q8_base(rng: Random) -> Tree:
    about = {"model_type": "test", "num_attention_heads": 2}
    return folder("base", {f"{LAYER}.mlp.down_proj.weight": bf16(rng, 6, 32)}, config=about)


def mlx(rng: Random) -> Tree:
    up, stack = f"{LAYER}.mlp.up_proj", "model.layers.1.mlp.switch_mlp.up_proj"
    shapes: dict[str, tuple[int, ...]] = {f"{up}.lora_a": (6, 2), f"{up}.lora_b": (2, 32)}
    shapes |= {"model.embed_tokens.lora_a": (9, 2), "model.embed_tokens.lora_b": (2, 6)}
    kind = rng.choice(("lora", "dora"))
    if kind == "dora":
        shapes |= {f"{up}.m": (32,), "model.embed_tokens.m": (9,)}
    else:
        shapes |= {f"{stack}.lora_a": (2, 2, 6), f"{stack}.lora_b": (2, 5, 2)}
    tensors = _shaped(rng, shapes)
    about = {"fine_tune_type": kind, "lora_parameters": {"rank": 2, "scale": 3.0}}
    config: Tree = {"source/adapter_config.json": Json(about)}
    if rng.random() < 0.6:
        return {"source/adapters.npz": Npz(tensors, rng.random() < 0.5), **config}
    return {"source/adapters.safetensors": Weights(tensors), **config}


def scipy(rng: Random) -> Tree:
    """Files of scipy.sparse.save_npz; their parts are written by hand."""
    tree: Tree = {}
    for name in UP[: rng.choice((1, 2))]:
        layout = rng.choice(("csr", "csc", "coo", "bsr", "dia"))
        parts: dict[str, Made] = {
            "csr": {"indices": i64(0, 5), "indptr": i64(0, *[2] * 16), "data": f32(rng, 2)},
            "csc": {"indices": i64(0, 15), "indptr": i64(0, *[2] * 8), "data": f32(rng, 2)},
            "bsr": {"indices": i64(0, 3), "indptr": i64(0, *[2] * 8), "data": f32(rng, 2, 2, 2)},
            "coo": {"row": i64(0, 15), "col": i64(7, 7), "data": f32(rng, 2)},
            "dia": {"offsets": i64(0, -3), "data": f32(rng, 2, 8)},
        }[layout]
        parts |= {"format": (_TEXT, [], layout.encode()), "shape": i64(16, 8)}
        tree[f"source/{name}.weight.npz"] = Npz(parts, rng.random() < 0.5)
    return tree


def torch_sparse(rng: Random) -> Tree:
    tensors = {f"{module}.weight": f32(rng, 16, 8) for module in UP}
    return {"source/x.pt": Pickle(tensors, rng.choice(("coo", "csr", "csc")), rng.random() < 0.2)}


def pickled(rng: Random) -> Tree:
    """PEFT's folder, from before it saved safetensors."""
    tree = adapter(factors(rng, UP[0]))
    weights = tree.pop("source/adapter_model.safetensors")
    assert isinstance(weights, Weights)
    return tree | {"source/adapter_model.bin": Pickle(weights.tensors, legacy=rng.random() < 0.3)}


def shd(rng: Random) -> Tree:
    tensors = {
        f"{UP[0]}.weight": sd.TensorDelta(
            (16, 8), [0, 5, 127], [1.0, -2.0, 3.0], rng.choice(("bfloat16", "unspecified"))
        ),
        "model.conv.weight": sd.TensorDelta((6, 4, 3, 3), [0, 5], np.array([1, 2], np.uint16), "bfloat16", "set"),
        "score.weight": sd.TensorDelta((2, 3), None, np.zeros(6, np.uint16), "bfloat16", "new"),
        "model.layers.0.norm.weight": sd.TensorDelta((8,), None, None, "bfloat16", "drop"),
        "model.embed_tokens.weight": sd.TensorDelta((13, 8), None, np.ones(104, np.uint16), "bfloat16", "replace"),
    }
    with tempfile.TemporaryDirectory() as into:
        sd.save_delta(Path(into) / "x.shd", tensors)
        return {"source/x.shd": Raw((Path(into) / "x.shd").read_bytes())}


def sparse_values(rng: Random) -> Tree:
    """As `shiradelta export` writes it."""
    tensors = {f"{UP[0]}.weight.indices": i64(1, 5, 127), f"{UP[0]}.weight.values": bf16(rng, 3)}
    tensors |= {"model.conv.weight.indices": i64(3), "model.conv.weight.values": bf16(rng, 1)}
    shapes = {name: SHAPES[name] for name in (f"{UP[0]}.weight", "model.conv.weight")}
    metadata = {"format": "pt", "layout": "sparse-values", "shapes": json.dumps(shapes)}
    return {"source/x.safetensors": Weights(tensors, metadata)}


def on_base(rng: Random) -> Tree:
    """Algorithms of LyCORIS whose change depends on the base."""
    glora = {"a1.weight": (8, 2), "a2.weight": (2, 8), "b1.weight": (16, 2), "b2.weight": (2, 8), "alpha": ()}
    convolved = {"a1.weight": (4, 2, 1, 1), "a2.weight": (2, 4, 1, 1), "b1.weight": (6, 2, 1, 1)}
    tlora = {"p_layer.weight": (16, 2), "q_layer.weight": (2, 8), "lambda_layer": (1, 2), "alpha": ()}
    oft, boft = {"oft_blocks": (4, 4, 4), "alpha": (), "rescale": (16, 1)}, {"oft_blocks": (3, 4, 4, 4)}
    methods: list[dict[str, tuple[int, ...]]] = [glora, tlora, oft, boft, {"weight": (8,), "on_input": ()}]
    convolutions: list[dict[str, tuple[int, ...]]] = [{**convolved, "b2.weight": (2, 4, 3, 3)}]
    convolutions += [{"oft_blocks": (2, 3, 3), "rescale": (6, 1, 1, 1)}]
    convolutions += [{**convolved, "b2.weight": (2, 4), "bm.weight": (2, 2, 3, 3)}]
    tensors: dict[str, Made] = {}
    for module, held in {UP[0]: rng.choice(methods), "model.conv": rng.choice(convolutions)}.items():
        for part, shape in held.items():
            tensors[f"{module}.{part}"] = i64(1, shape=[1]) if part == "on_input" else f32(rng, *shape)
    return {"source/x.safetensors": Weights(tensors)}


def tucker(rng: Random) -> Tree:
    """Cores between the factors of a convolution, and lengths of a DoRA."""
    locon: dict[str, tuple[int, ...]] = {
        "lora_down.weight": (2, 4, 1, 1),
        "lora_up.weight": (6, 2, 1, 1),
        "lora_mid.weight": (2, 2, 3, 3),
    }
    loha: dict[str, tuple[int, ...]] = {
        f"hada_w{n}_{part}": (2, rows) for n in (1, 2) for part, rows in (("a", 6), ("b", 4))
    }
    loha |= {"hada_t1": (2, 2, 3, 3), "hada_t2": (2, 2, 3, 3)}
    lokr: dict[str, tuple[int, ...]] = {
        "lokr_w1": (2, 2),
        "lokr_w2_a": (2, 3),
        "lokr_w2_b": (2, 2),
        "lokr_t2": (2, 2, 3, 3),
    }
    held: dict[str, tuple[int, ...]] = dict(rng.choice((locon, loha, lokr)))
    held |= rng.choice(({}, {"dora_scale": (6, 1, 1, 1)}, {"dora_scale": (1, 4, 1, 1)}))
    return {"source/x.safetensors": Weights(_shaped(rng, {f"model.conv.{part}": held[part] for part in held}))}


def symlora(rng: Random) -> Tree:
    """The paper's letters, on square weights, in the spellings that are read."""
    tensors: dict[str, Made] = {}
    for layer in (0, 1):
        rank, module = rng.choice((1, 2, 8)), f"model.layers.{layer}.self_attn.q_proj"
        q, values = rng.choice((("Q", "Lambda"), ("lora_Q.weight", "lora_lambda"), ("symlora_q", "symlora_lambda")))
        tensors |= {f"{module}.{q}": f32(rng, 8, rank), f"{module}.{values}": f32(rng, rank)}
    return {"source/x.safetensors": Weights(tensors)}


def rigsa(rng: Random) -> Tree:
    """A gate and a change for each weight."""
    tensors: dict[str, Made] = {}
    for name in UP:
        word = rng.choice(("gate", "alpha"))
        tensors |= {f"{name}.{rng.choice(('delta', 'weight'))}": f32(rng, 16, 8), f"{name}.{word}": f32(rng, 1)}
    return {"source/x.safetensors": Weights(tensors)}


def dora(rng: Random) -> Tree:
    """PEFT's lengths."""
    return adapter(factors(rng, UP[0]) | {f"{UP[0]}.lora_magnitude_vector": f32(rng, 16)}, use_dora=True)


def biased(rng: Random) -> Tree:
    """PEFT's lora_bias."""
    return adapter(factors(rng, UP[0]) | {f"{UP[0]}.lora_B.bias": f32(rng, 16)}, lora_bias=True)


def biased_base(rng: Random) -> Tree:
    return folder("base", {f"{UP[0]}.weight": bf16(rng, 16, 8), f"{UP[0]}.bias": bf16(rng, 16)})


#: A FLUX of 4 hidden units in its original names, in part.
_FLUX = {"double_blocks.0.img_attn.qkv": 12, "single_blocks.3.linear1": 20, "final_layer.adaLN_modulation.1": 8}


def flux(rng: Random) -> Tree:
    """diffusers' names, for an original checkpoint."""
    attention, shapes = "transformer.transformer_blocks.0.attn", dict[str, tuple[int, ...]]()
    for module, rows in {f"{attention}.to_q": 4, f"{attention}.to_v": 4, "transformer.norm_out.linear": 8}.items():
        shapes |= {f"{module}.lora_A.weight": (2, 4), f"{module}.lora_B.weight": (rows, 2)}
    return {"source/x.safetensors": Weights(_shaped(rng, shapes))}


def flux_dora(rng: Random) -> Tree:
    """Lengths of two of the layers that the original checkpoint has in one tensor."""
    (weights,) = flux(rng).values()
    assert isinstance(weights, Weights)
    attention = "transformer.transformer_blocks.0.attn"
    for module, rows in {f"{attention}.to_q": 4, f"{attention}.to_v": 4, "transformer.norm_out.linear": 8}.items():
        weights.tensors[f"{module}.lora_magnitude_vector"] = f32(rng, rows)
    return {"source/x.safetensors": weights}


def resized(rng: Random) -> Tree:
    """A fine-tune with other embeddings, which `OPTIONS` names."""
    tensors = {name: bf16(rng, *shape) for name, shape in SHAPES.items()}
    tensors["model.embed_tokens.weight"] = rng.choice((bf16, f32))(rng, rng.choice((11, 14)), 8)
    return folder("source", tensors)


def flux_base(rng: Random) -> Tree:
    rows = {**_FLUX, "img_in": 4}
    return folder("base", {f"{name}.weight": bf16(rng, size, 4) for name, size in rows.items()})


Make = Callable[[Random], Tree]


def base_of(rng: Random) -> Tree:
    """The base of most kinds."""
    return folder("base", model(rng))


_BASES: dict[Make, Make] = {
    **dict.fromkeys((torchtune, nemo, nemo_archive, gguf, mlx), llama),
    gguf_q8: gguf_q8_base,
    biased: biased_base,
    flux: flux_base,
    flux_dora: flux_base,
}
#: Kind -> (its files, whether it needs the base, what makes the base).
KINDS: dict[str, tuple[Make, bool, Make]] = {
    made.__name__: (made, needs, _BASES.get(made, base_of))
    for made, needs in (
        *((torchtune, True), (nemo, True), (gguf, True), (gguf_q8, True), (mlx, True), (scipy, False)),
        *((torch_sparse, False), (pickled, False), (shd, False), (sparse_values, False), (on_base, True)),
        *((tucker, True), (dora, True), (biased, True), (flux, True), (flux_dora, True), (resized, True)),
        *((nemo_archive, True), (symlora, False), (rigsa, False)),
    )
}
#: Options of `convert` that a kind needs.
OPTIONS: dict[str, dict[str, Any]] = {
    "nemo": {"alpha": 4.0},
    "rigsa": {"kind": "rigsa"},
    "resized": {"whole": "*embed*"},
}
