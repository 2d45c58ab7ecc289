"""Damages sources: mostly what files say (names, numbers, configurations), so that most get past the first check."""

from __future__ import annotations

import copy
import json
import math
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from shiradelta.converters.sources import kinds

from shiradelta.format.registry import DTYPE_OF_SAFETENSORS
from tests.source_containers import Gguf, Npz, Pickle, Tar
from tests.source_files import DEEP, Json, Made, Raw, Special, Strange, Weights, as_json
from tests.strange_containers import damaged_container
from tests.whole_sources import KINDS, whole

NAMES = [
    *(
        "",
        ".",
        "..",
        "/",
        "\0",
        "a\nb",
        "\x1b[31mred\x1b[0m",
        "\ud800",
        "\udc80",
        "ä",
        "é" * 300,
        "a" * 2000,
        "%s",
        "'",
    ),
    *(
        "a." * 40 + "weight",
        "x/y",
        "../x",
        "/dev/zero",
        "__metadata__",
        "weight",
        "alpha",
        ".alpha",
        ".diff",
        "\u0661.weight",
    ),
    *(
        "lora_A.weight",
        "model.lora_A.weight",
        "a.lora_A.b.weight",
        "a.hada_w1_a",
        "a.lokr_w1",
        "a.lora_magnitude_vector",
    ),
    *("1" * 400 + ".weight", "model.layers.0.norm.weight", "model.layers.1.mlp.up_proj.weight", "model.safetensors"),
]
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 0.5, 1e308, -0.0, math.inf, math.nan, 1 << 31, 1 << 53, 1 << 63, 1 << 64),
    *(
        10**30,
        10**4000,
        "",
        "0",
        "4",
        "nan",
        "LORA",
        "SHIRA",
        [],
        {},
        [0],
        ["a"],
        {"a": 1},
        [[]],
        {"": {}},
        [None] * 50,
    ),
]
PATTERNS = [
    "(a+)+$",
    "(",
    ".*",
    "(.*)*x",
    "[",
    r"(.)\1",
    "a{99999}",
    "(?i)x",
    r"\d+",
    "up_proj",
    "",
    "^.*up.proj",
    "a|b",
]
DTYPES = [*DTYPE_OF_SAFETENSORS, "F31", "f32", ""]


def strange(rng: Random) -> Any:
    pick = rng.random()
    if pick < 0.25:
        return rng.choice(NAMES)
    if pick < 0.35:
        return rng.choice(PATTERNS)
    if pick < 0.37:
        return DEEP
    return copy.deepcopy(rng.choice(VALUES))


def damaged_value(rng: Random, value: Any) -> Any:
    """JSON with a change somewhere inside."""
    if isinstance(value, str) and value[:1] == "{" and rng.random() < 0.8:
        with suppress(ValueError):  # a configuration within the metadata, if it is whole still
            return as_json(damaged_value(rng, json.loads(value))).decode()
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.15:
        return strange(rng)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key, action = rng.choice(keys), rng.random()
    if action < 0.15:
        del value[key]
    elif action < 0.25 and isinstance(value, dict):
        value[rng.choice((rng.choice(NAMES), rng.choice(PATTERNS), str(key).upper()))] = value.pop(key)
    elif action < 0.3 and isinstance(value, dict):
        value |= {f"{key}{i}": copy.deepcopy(value[key]) for i in range(rng.choice((1, 20)))}
    elif action < 0.35:
        other = rng.choice(keys)
        value[key], value[other] = value[other], value[key]
    else:
        value[key] = damaged_value(rng, value[key])
    return value


def damaged_tensor(rng: Random, tensors: dict[str, Made], name: str) -> None:
    """Another name, dtype, shape or contents, which the file says rightly."""
    dtype, shape, raw = tensors[name]
    action = rng.randrange(9)
    if action == 0:
        del tensors[name]
    elif action == 1:
        head, _, tail = name.rpartition(".")
        other = rng.choice((rng.choice(NAMES), f"{rng.choice(NAMES)}.{tail}", f"{head}.{rng.choice(NAMES)}", name[1:]))
        tensors[other] = tensors.pop(name)
    elif action == 2:
        tensors[name + rng.choice((".default", "2", ".weight", ".alpha"))] = tensors[name]
    elif action == 3:  # the same elements in another shape
        numel = math.prod(shape)
        shapes = [[numel], [1, numel], [numel, 1], [1] * 5 + shape, shape[::-1], [1] * 9 + [numel], [1, *shape, 1]]
        tensors[name] = dtype, rng.choice(shapes), raw
    elif action == 4:  # no elements
        tensors[name] = dtype, rng.choice(([0], [0, 8], [8, 0], [1 << 40, 0], [0, 1 << 62])), b""
    elif action == 5 and raw:  # NaN, infinity, the largest and the smallest
        size = DTYPE_OF_SAFETENSORS[dtype].size if dtype in DTYPE_OF_SAFETENSORS else 1
        odd = rng.choice((0, -1, 0x7F80 << 8 * size >> 16, 0x7FC0 << 8 * size >> 16, 0x7F7F << 8 * size >> 16))
        part = (odd % (1 << 8 * size)).to_bytes(size, "little")
        raw = part + raw[size:] if rng.random() < 0.5 else part * (len(raw) // size)
        tensors[name] = dtype, shape, raw
    elif action == 6:  # other bytes under another dtype
        new = rng.choice([*DTYPE_OF_SAFETENSORS])
        size = DTYPE_OF_SAFETENSORS[new].size * math.prod(shape)
        tensors[name] = new, shape, rng.randbytes(size % (1 << 20))
    elif action == 7:
        other = rng.choice([*tensors])
        tensors[name], tensors[other] = tensors[other], tensors[name]
    else:  # more or fewer rows
        rows = rng.choice((1, 2, 3, 5, 16))
        row = raw[: len(raw) // shape[0]] if shape and shape[0] else raw
        tensors[name] = dtype, [rows, *shape[1:]], row * rows


def damaged_weights(rng: Random, weights: Weights) -> Weights:
    weights = replace(weights, tensors=dict(weights.tensors), metadata=copy.deepcopy(weights.metadata))
    action = rng.random()
    if action < 0.7 and weights.tensors:
        for _ in range(rng.choice((1, 1, 2))):
            if weights.tensors:
                damaged_tensor(rng, weights.tensors, rng.choice([*weights.tensors]))
    elif action < 0.8:
        weights.metadata = damaged_value(rng, weights.metadata)
    else:
        seed = rng.random()
        weights.damage = [lambda header: header.update(_damaged_object(Random(seed), header))]
    return weights


def _damaged_object(rng: Random, header: dict[str, Any]) -> dict[str, Any]:
    found = damaged_value(rng, copy.deepcopy(header))
    return found if isinstance(found, dict) else {"__metadata__": found}


def damaged_bytes(rng: Random, data: bytes) -> bytes:
    at, size = rng.randrange(len(data) + 1), rng.choice((0, 1, 8, 100))
    put = rng.choice((b"", b"\0", b"\xff" * 8, b"[" * 5000, rng.randbytes(8), b"}", b"\xef\xbb\xbf"))
    return rng.choice((data[:at] + put + data[at + size :], data[:at], put + data, data + put))


def damage(rng: Random, strange_: Strange) -> None:
    """Changes one file, in place."""
    tree = strange_.files
    name = rng.choice([*tree])
    content = tree[name]
    action = rng.random()
    if action < 0.75 and isinstance(content, Json):
        tree[name] = Json(damaged_value(rng, copy.deepcopy(content.value)))
    elif action < 0.75 and isinstance(content, Weights):
        tree[name] = damaged_weights(rng, content)
    elif action < 0.75 and isinstance(content, Gguf | Npz | Pickle | Tar):
        tree[name] = damaged_container(rng, content, damaged_tensor, damaged_value)
    elif action < 0.85 and not isinstance(content, Special):
        tree[name] = Raw(damaged_bytes(rng, content.bytes()))
    elif action < 0.88:
        del tree[name]
    elif action < 0.9:
        tree[name] = Special(rng.choice(("pipe", "folder", "/dev/zero", "nowhere", Path(name).name, ".", "..")))
    elif action < 0.94:
        head = name.rpartition("/")[0]
        other = rng.choice(
            ("model.safetensors", "a\x1b[31m.safetensors", "adapter_config.json", "y.bin", "sub/x.safetensors")
        )
        tree.setdefault(f"{head}/{other}", content)
    elif action < 0.97:
        other = rng.choice([*tree])
        tree[name], tree[other] = tree[other], tree[name]
    else:
        strange_.options |= rng.choice(
            (
                {"kind": "full"},
                {"kind": "diff"},
                {"kind": "lora"},
                {"kind": "lora", "alpha": 1e300},
                {"target_size": 500},
                {"kind": rng.choice(kinds())},
                {"whole": rng.choice(("*", "*embed*", ["*", "x"]))},
                {"alpha": rng.choice((0.0, -1.0, 1e-30, 1e300))},
            )
        )
    if not tree:
        tree["source/nothing"] = Raw(b"")


def damaged_source(rng: Random) -> Strange:
    """A source or a target with one to three changes."""
    made = whole(rng.choice([*KINDS, "target", "target"]), rng)
    for _ in range(rng.choice((1, 1, 2, 3))):
        damage(rng, made)
    return made
