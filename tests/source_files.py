"""Files of sources, as small trees that can be changed and written, and what the whole ones have in common."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

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


class Content(Protocol):
    """A file that `strange_containers` knows how to damage."""

    def bytes(self) -> bytes: ...


@dataclass(frozen=True)
class Special:
    """What is no regular file: "pipe", "folder", or a link to something."""

    what: str


Tree = dict[str, Content | Special]


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
