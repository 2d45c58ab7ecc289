"""Sources of every kind that `convert` and `apply` read, as small trees of files that can be changed and written."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Random = random.Random


@dataclass
class Weights:
    """A safetensors file: name -> (dtype, shape, bytes)."""

    tensors: dict[str, tuple[str, list[Any], bytes]]
    metadata: dict[str, Any] | None = None
    #: Changes the header that would be right.
    damage: list[Callable[[dict[str, Any]], None]] = field(default_factory=list)

    def bytes(self) -> bytes:
        header: dict[str, Any] = {} if self.metadata is None else {"__metadata__": self.metadata}
        data = b""
        for name, (dtype, shape, raw) in self.tensors.items():
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
            data += raw
        for change in self.damage:
            change(header)
        text = as_json(header)
        return len(text).to_bytes(8, "little") + text + data


@dataclass
class Json:
    """A JSON file."""

    value: Any

    def bytes(self) -> bytes:
        return as_json(self.value)


@dataclass
class Raw:
    """Any other file."""

    data: bytes

    def bytes(self) -> bytes:
        return self.data


@dataclass(frozen=True)
class Special:
    """What is no regular file: "pipe", "folder", or a link to something."""

    what: str


Tree = dict[str, Weights | Json | Raw | Special]


@dataclass
class Strange:
    """A source to convert, or a folder to apply a delta to.

    Attributes:
        kind: of source; "target" is a folder for a delta.
        files: what is to be read, under "source/" and "base/".
        source, base: what `convert` is given; no base without a base.
        options: of `convert`.
    """

    kind: str
    files: Tree
    source: str
    base: str | None
    options: dict[str, Any] = field(default_factory=dict)


#: Stands for a value that is nested deeper than Python can copy.
DEEP = "deeper and deeper"


def as_json(value: Any) -> bytes:
    try:
        return json.dumps(value).encode().replace(json.dumps(DEEP).encode(), b"[" * 9999 + b"]" * 9999)
    except ValueError:  # a number that Python does not write
        return b'{"a":' + b"9" * 5000 + b"}"


def write(tree: Tree, root: Path) -> None:
    """Writes all files that the system can have."""
    for name, content in tree.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, Special):
            path.write_bytes(content.bytes())
        elif content.what == "folder":
            path.mkdir()
        elif content.what == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to(content.what)


# ------------------------------------------------------------------------------------------ sources as they should be

#: Few and small tensors, one of each sort: embeddings, a tall and a square matrix, a vector, a convolution.
SHAPES = {
    "model.embed_tokens.weight": [12, 8],
    "model.layers.0.mlp.up_proj.weight": [16, 8],
    "model.layers.0.self_attn.q_proj.weight": [8, 8],
    "model.layers.0.norm.weight": [8],
    "model.layers.1.mlp.up_proj.weight": [16, 8],
    "model.layers.1.self_attn.q_proj.weight": [8, 8],
    "model.conv.weight": [6, 4, 3, 3],
}
UP = [f"model.layers.{i}.mlp.up_proj" for i in (0, 1)]
Made = tuple[str, list[Any], bytes]


def f32(rng: Random, *shape: int) -> Made:
    numbers = np.random.default_rng(rng.randrange(1 << 30)).standard_normal(shape)
    return "F32", list(shape), numbers.astype("<f4").tobytes()


def bf16(rng: Random, *shape: int) -> Made:
    _, _, raw = f32(rng, *shape)
    return "BF16", list(shape), (np.frombuffer(raw, "<u4") >> 16).astype("<u2").tobytes()


def i64(*numbers: int, shape: list[Any] | None = None) -> Made:
    return "I64", shape or [len(numbers)], np.array(numbers, "<i8").tobytes()


def model(rng: Random, make: Callable[..., Made] = bf16) -> dict[str, Made]:
    return {name: make(rng, *shape) for name, shape in SHAPES.items()}


def folder(at: str, tensors: dict[str, Made], shards: int = 1, config: Any = None) -> Tree:
    """A model's folder, in one file or with an index."""
    tree: Tree = {f"{at}/config.json": Json(config or {"model_type": "test", "tie_word_embeddings": True})}
    if shards == 1:
        return tree | {f"{at}/model.safetensors": Weights(tensors, {"format": "pt"})}
    names, weight_map = list(tensors), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        tree[f"{at}/{file}"] = Weights({name: tensors[name] for name in names[shard::shards]}, {"format": "pt"})
        weight_map |= dict.fromkeys(names[shard::shards], file)
    return tree | {f"{at}/model.safetensors.index.json": Json({"metadata": {}, "weight_map": weight_map})}


def factors(rng: Random, module: str, a: str = "lora_A.weight", b: str = "lora_B.weight") -> dict[str, Made]:
    rows, columns = SHAPES[f"{module.removeprefix('base_model.model.')}.weight"]
    return {f"{module}.{a}": f32(rng, 2, columns), f"{module}.{b}": f32(rng, rows, 2)}


def adapter(tensors: dict[str, Made], **config: Any) -> Tree:
    """PEFT's folder."""
    return {
        "source/adapter_config.json": Json({"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}),
        "source/adapter_model.safetensors": Weights(
            {f"base_model.model.{name}": made for name, made in tensors.items()}, {"format": "pt"}
        ),
    }


def peft(rng: Random) -> Tree:
    config = {
        "alpha_pattern": {r"layers\.(0|2)\.mlp\.up_proj": 8, "v_proj": 2},
        "rank_pattern": {"model.layers.9.q_proj": 4, "k_proj": 8},
        "target_modules": ["up_proj"],
        "modules_to_save": ["score"],
        "use_rslora": True,
        "fan_in_fan_out": False,
        "trainable_token_indices": {"embed_tokens": [0, 3]},
    }
    tensors = {name: made for module in UP for name, made in factors(rng, module).items()}
    tensors |= {"model.embed_tokens.token_adapter.trainable_tokens_delta": f32(rng, 2, 8), "score.weight": f32(rng, 3)}
    return adapter(tensors | {"model.layers.0.norm.weight": f32(rng, 8)}, **config)


def adalora(rng: Random) -> Tree:
    tensors = factors(rng, UP[0], "lora_A", "lora_B") | {f"{UP[0]}.lora_E": f32(rng, 2, 1)}
    return adapter(tensors, peft_type="ADALORA", init_r=2, target_r=1, rank_pattern={f"{UP[0]}.lora_E": [True, False]})


def lycoris(rng: Random) -> Tree:
    tensors = {f"{UP[0]}.{part}": f32(rng, *shape) for part, shape in _LOHA.items()}
    tensors |= {f"{UP[1]}.lokr_w1": f32(rng, 4, 2), f"{UP[1]}.lokr_w2_a": f32(rng, 4, 2)}
    tensors |= {f"{UP[1]}.lokr_w2_b": f32(rng, 2, 4), f"{UP[1]}.alpha": f32(rng), f"{UP[0]}.alpha": f32(rng)}
    return {"source/x.safetensors": Weights(tensors | {"model.layers.0.norm.w_norm": f32(rng, 8)})}


_LOHA = {"hada_w1_a": (16, 2), "hada_w1_b": (2, 8), "hada_w2_a": (16, 2), "hada_w2_b": (2, 8)}


def kohya(rng: Random) -> Tree:
    tensors: dict[str, Made] = {}
    for module in UP:
        name = "lora_te_" + module.replace(".", "_")
        rows, columns = SHAPES[f"{module}.weight"]
        tensors |= {f"{name}.lora_down.weight": f32(rng, 2, columns), f"{name}.lora_up.weight": f32(rng, rows, 2)}
        tensors[f"{name}.alpha"] = f32(rng)
    return {"source/x.safetensors": Weights(tensors, {"ss_network_alpha": "4.0", "ss_network_dim": "2"})}


def diffusers(rng: Random) -> Tree:
    config = {"text_encoder.lora_alpha": 4, "text_encoder.r": 2, "text_encoder.alpha_pattern": {"q_proj": 1}}
    tensors = {f"text_encoder.{name}": made for name, made in factors(rng, UP[0]).items()}
    return {"source/x.safetensors": Weights(tensors, {"lora_adapter_metadata": json.dumps(config)})}


def shira(rng: Random) -> Tree:
    tensors = {f"{UP[0]}.shira_weight": f32(rng, 3), f"{UP[0]}.shira_indices": i64(0, 1, 15, 7, 0, 3, shape=[2, 3])}
    return adapter(tensors, peft_type="SHIRA")


def sparse(rng: Random) -> Tree:
    tensors = {f"{UP[0]}.weight.values": f32(rng, 3), f"{UP[0]}.weight.positions": i64(1, 5, 127)}
    tensors |= {"model.conv.weight.values": f32(rng, 2), "model.conv.weight.positions": i64(7, 3)}
    return {"source/x.safetensors": Weights(tensors)}


def dense(rng: Random) -> Tree:
    tensors = {f"{UP[0]}.diff": f32(rng, 16, 8), "model.conv.diff": f32(rng, 6, 4, 3, 3)}
    return {"source/x.safetensors": Weights(tensors | {"model.layers.0.norm.w_norm": f32(rng, 8)})}


def full(rng: Random) -> Tree:
    return folder("source", model(rng), 3)


def pipeline(rng: Random) -> Tree:
    tree = {"base/model_index.json": Json({"_class_name": "Pipeline", "text_encoder": ["transformers", "Model"]})}
    return tree | folder("base/text_encoder", model(rng)) | folder("base/unet", {"a.weight": bf16(rng, 4, 4)})


BERT = {
    "model_type": "bert",
    "architectures": ["BertModel"],
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 12,
}


def bert(rng: Random) -> Tree:
    """A LoRA whose module needs transformers' own names to be found."""
    module = "bert.encoder.layer.0.attention.self.query"
    return adapter({f"{module}.lora_A.weight": f32(rng, 2, 8), f"{module}.lora_B.weight": f32(rng, 8, 2)})


def bert_base(rng: Random) -> Tree:
    shapes = {"embeddings.word_embeddings.weight": [12, 8], "encoder.layer.0.attention.self.query.weight": [8, 8]}
    return folder("base", {name: f32(rng, *shape) for name, shape in shapes.items()}, config=BERT)


def sentence(at: str) -> Tree:
    """What sentence-transformers lays beside a model."""
    modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    modules.append({"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"})
    return {
        f"{at}/modules.json": Json(modules),
        f"{at}/1_Pooling/config.json": Json({"word_embedding_dimension": 8, "pooling_mode_mean_tokens": True}),
    }


_BASES = {kohya: pipeline, diffusers: pipeline, bert: bert_base}
#: Kind -> (its files, whether it needs the base, what makes the base).
KINDS: dict[str, tuple[Callable[[Random], Tree], bool, Callable[[Random], Tree]]] = {
    made.__name__: (made, needs, _BASES.get(made, lambda rng: folder("base", model(rng))))
    for made, needs in (
        *((peft, True), (adalora, False), (lycoris, True), (kohya, True), (diffusers, True), (shira, True)),
        *((sparse, True), (dense, False), (full, True), (bert, True)),
    )
}


def whole(kind: str, rng: Random) -> Strange:
    """A source that can be converted, or a target that fits."""
    if kind == "target":
        return Strange(kind, folder("source", model(rng), rng.choice((1, 3))) | sentence("source"), "source", None)
    make, needs_base, make_base = KINDS[kind]
    files, with_base = make(rng), needs_base or rng.random() < 0.7
    files |= make_base(rng) if with_base else {}
    file = "source/x.safetensors" if "source/x.safetensors" in files else "source"
    options = {"sparsity": rng.choice((0.01, 0.5, 1.0)), "values": rng.choice(("f32", "int4", "sign", "int8"))}
    options |= rng.choice(({}, {}, {"scope": "model"}, {"skip": "*"}, {"skip": "*"}, {"zstd": True}))
    return Strange(kind, files, file, "base" if with_base else None, options)
