"""LoRA: delta = scale * B A, from PEFT's folders and from lone safetensors files.

Keys read: `MODULE.lora_A.weight` and `lora_B` (PEFT, diffusers), `lora_down` / `lora_up` and `lora.down` / `lora.up`
with `MODULE.alpha` (kohya, older diffusers), `lora_embedding_A` / `_B` (PEFT).  kohya's names, in which dots became
underscores, are found through the base.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from shiradelta.arithmetic import Float32, to_float32
from shiradelta.checkpoint import Checkpoint, match_names, read_json
from shiradelta.errors import SourceError
from shiradelta.select import Rows

from .item import Item, Source, whole_tensor

_KEY = re.compile(
    r"^(?P<module>.+?)\.(?:lora_(?P<embedding>embedding_)?(?P<ab>[AB])|lora[._](?P<updown>up|down))"
    r"(?:\.default)?(?:\.weight)?$"
)
_PEFT_PREFIX = "base_model.model."
#: Parts of other methods that would be lost without a word if only A and B were taken.
_UNSUPPORTED = {
    "lora_magnitude_vector": "DoRA's magnitudes need the base's norms; merge it first",
    "dora_scale": "DoRA's magnitudes need the base's norms; merge it first",
    "lora_mid": "a Tucker-decomposed LoRA; merge it first",
    "hada_w1_a": "a LoHa; merge it first",
    "lokr_w1": "a LoKr; merge it first",
    "lora_B.bias": "a LoRA with biases; merge it first",
}


@dataclass
class _Module:
    """What the file holds of one module."""

    keys: dict[str, str] = field(default_factory=dict)  # "A", "B" -> key
    embedding: bool = False


def parse_key(key: str) -> tuple[str, str, bool] | None:
    """(module, "A" or "B", whether of an embedding), or None for a key that is no LoRA factor."""
    match = _KEY.match(key)
    if match is None:
        return None
    side = match["ab"] or {"down": "A", "up": "B"}[match["updown"]]
    return match["module"], side, match["embedding"] is not None


def adapter_weights(path: Path) -> Path | None:
    """The weights of PEFT's adapter folder, if `path` is one."""
    weights = path / "adapter_model.safetensors"
    if weights.exists():
        return weights
    if (path / "adapter_config.json").exists():
        raise SourceError(f"{path}: has no adapter_model.safetensors; save the adapter as safetensors first")
    return None


@dataclass(frozen=True)
class Scale:
    """How alpha and rank are told: by a config, by alpha tensors, or by nobody."""

    config: dict[str, Any]
    alpha: float | None  # the user's

    @classmethod
    def of(cls, checkpoint: Checkpoint, alpha: float | None) -> Scale:
        """From adapter_config.json beside the file, or from its metadata."""
        file = checkpoint.shards[0].file
        beside = file.parent / "adapter_config.json"
        config = read_json(beside) if beside.exists() else _config_in_metadata(checkpoint.shards[0].metadata)
        if not isinstance(config, dict):
            raise SourceError(f"{beside}: is not a PEFT configuration; get it again")
        if config.get("use_dora"):
            raise SourceError(f"{beside}: a DoRA; {_UNSUPPORTED['dora_scale']}")
        return cls(config, alpha)

    @property
    def known(self) -> bool:
        """Whether anything tells alpha for the whole adapter."""
        return self.alpha is not None or "lora_alpha" in self.config

    def __call__(self, module: str, rank: int, alpha_tensor: float | None) -> float:
        """The factor on B A of one module."""
        configured = _pattern(self.config.get("alpha_pattern") or {}, module, self.config.get("lora_alpha"))
        alpha = next(a for a in (self.alpha, alpha_tensor, configured, rank) if a is not None)
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    @property
    def transposed(self) -> bool:
        """Whether the base stores weights as [in, out] (GPT-2's Conv1D)."""
        return bool(self.config.get("fan_in_fan_out"))


def _pattern(patterns: dict[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the module's name."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _config_in_metadata(metadata: dict[str, str]) -> dict[str, Any]:
    """Of a file's own metadata: diffusers' JSON, or kohya's pair."""
    try:
        if "lora_adapter_metadata" in metadata:
            flat = json.loads(metadata["lora_adapter_metadata"])
            # diffusers prefixes every key with the component: "unet.lora_alpha".
            return {key.rpartition(".")[2]: value for key, value in flat.items()}
        if "ss_network_alpha" in metadata:
            return {"lora_alpha": float(metadata["ss_network_alpha"])}
    except (ValueError, AttributeError):
        pass
    return {}


def open_lora(source: Checkpoint, base: Checkpoint | None, alpha: float | None) -> Source:
    """All LoRA modules of a file, and the tensors that it saves whole."""
    result = Source()
    scale = Scale.of(source, alpha)
    modules, alphas, others = _sort_keys(source)
    for key in others:
        for part, why in _UNSUPPORTED.items():
            if part in key:
                raise SourceError(f"{source.root}: {key!r} is {why}")
    if not scale.known and not alphas:
        result.warnings.append(
            "nothing tells this LoRA's alpha: taken to be its rank, so the scale is 1; --alpha sets another"
        )
    names = _names(source, modules, base)
    for module, parts in modules.items():
        if set(parts.keys) != {"A", "B"}:
            result.skipped[module] = f"only {' '.join(parts.keys)} of A and B is there"
        elif names.get(module) is None:
            result.skipped[module] = "the base has no such tensor"
        else:
            factor = scale(module.removeprefix(_PEFT_PREFIX), _rank(source, parts), alphas.get(module))
            item = _item(source, parts, names[module], base, factor, scale.transposed)
            if isinstance(item, str):
                result.skipped[module] = item
            else:
                result.items.append(item)
    _add_whole(source, others, base, result)
    return result


def _sort_keys(source: Checkpoint) -> tuple[dict[str, _Module], dict[str, float], list[str]]:
    """(module -> its factors, module -> its alpha, all other keys)."""
    modules: dict[str, _Module] = {}
    alphas: dict[str, float] = {}
    others: list[str] = []
    for key in source:
        parsed = parse_key(key)
        if parsed is not None:
            module, side, embedding = parsed
            parts = modules.setdefault(module, _Module())
            parts.keys[side], parts.embedding = key, embedding
        elif key.endswith(".alpha"):
            alphas[key.removesuffix(".alpha")] = float(_float32(source, key).reshape(-1)[0])
        else:
            others.append(key)
    return modules, alphas, others


def _float32(source: Checkpoint, key: str) -> Float32:
    slot = source[key]
    if slot.dtype.name not in ("float32", "float16", "bfloat16"):
        raise SourceError(f"{source.root}: {key!r} is {slot.dtype.name}; LoRA factors are float32, float16 or bfloat16")
    return to_float32(source.bits(key), slot.dtype.name).reshape(slot.shape)


def _rank(source: Checkpoint, parts: _Module) -> int:
    return source[parts.keys["A"]].shape[0]


def _names(source: Checkpoint, modules: dict[str, _Module], base: Checkpoint | None) -> dict[str, str | None]:
    """module -> the name of the tensor that it changes; None where the base has none."""
    plain = {module: f"{module.removeprefix(_PEFT_PREFIX)}.weight" for module in modules}
    if base is None:
        mangled = [module for module in modules if "." not in module]
        if mangled:
            raise SourceError(
                f"{source.root}: {mangled[0]!r} has underscores for dots, so its tensor is unknown; give --base MODEL"
            )
        return {**plain}
    found = match_names(dict.fromkeys(plain.values(), ()), base)
    unmangled = {re.sub(r"[./]", "_", name.removesuffix(".weight")): name for name in base}
    by_slash = {module: name.replace(".", "/", 1) for module, name in plain.items()}
    return {
        module: found.get(name)
        or (by_slash[module] if by_slash[module] in base else None)
        or unmangled.get(re.sub(r"^lora_(unet|te\d?|transformer)_", "", module))
        for module, name in plain.items()
    }


def _item(
    source: Checkpoint, parts: _Module, name: str | None, base: Checkpoint | None, factor: float, transposed: bool
) -> Item | str:
    """The dense delta of one module, or why there is none."""
    assert name is not None
    a, b = source[parts.keys["A"]].shape, source[parts.keys["B"]].shape
    if len(a) != len(b) or not 2 <= len(a) <= 5 or a[0] != b[1]:
        return f"shapes {list(b)} and {list(a)} do not multiply"
    if math.prod(b[2:]) != 1:
        return f"B of shape {list(b)} is not a 1 x 1 convolution"
    shape = (b[0], *a[1:])
    swap = parts.embedding or transposed
    if swap:  # the base's rows are A's columns
        shape = (a[1], b[0])
    if base is None:
        return Item(name, shape, "unspecified", partial(_product, source, parts, factor, swap))
    slot = base[name]
    if slot.shape == shape[::-1] != shape and len(shape) == 2:
        swap, shape = not swap, slot.shape
    if slot.shape != shape:
        return f"it changes a tensor of shape {list(shape)}, the base's {name!r} has {list(slot.shape)}"
    if slot.dtype.name not in ("float32", "float16", "bfloat16"):
        return f"the base stores {name!r} as {slot.dtype.name}, to which nothing can be added exactly"
    dense = partial(_product, source, parts, factor, swap)
    return Item(name, shape, slot.dtype.name, dense, base_bits=partial(base.bits, name))


def _product(source: Checkpoint, parts: _Module, factor: float, swap: bool) -> Rows:
    """factor * B A (transposed if `swap`), a few rows at a time."""
    a, b = _float32(source, parts.keys["A"]), _float32(source, parts.keys["B"])
    left, right = b.reshape(b.shape[0], -1), a.reshape(a.shape[0], -1)
    if swap:
        left, right = right.T, left.T
    scaled: Float32 = np.ascontiguousarray(left) * np.float32(factor)
    right = np.ascontiguousarray(right)

    def rows(start: int, stop: int) -> Float32:
        product: Float32 = scaled[start:stop] @ right
        return product

    return rows


def _add_whole(source: Checkpoint, keys: list[str], base: Checkpoint | None, result: Source) -> None:
    """Tensors saved whole (PEFT's modules_to_save, biases): added where the base lacks them."""
    from .full import difference

    names = {
        key: key.removeprefix(_PEFT_PREFIX).replace(".modules_to_save", "").replace(".default", "") for key in keys
    }
    for key, name in names.items():
        if base is None:
            result.skipped[key] = "saved whole; give --base to tell whether it is new or changed"
        elif name not in base:
            result.items.append(whole_tensor(source, key, name))
        else:
            item = difference(source, key, base, name)
            if isinstance(item, str):
                result.skipped[key] = item
            else:
                result.items.append(item)
