"""Whether a LoRA's target is stored as [out, in] (`nn.Linear`) or as [in, out] (transformers' `Conv1D`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shiradelta.models.checkpoint import Checkpoint

from .item import Skipped, SkipReason, Source
from .lora_keys import Module
from .lora_scale import Scale

#: Model types with Conv1D layers.
_FAMILIES = ("gpt2", "gpt", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
#: Names of Conv1D layers.  Other models give them to plain linear layers (GPT-BigCode, and CLIP as it was published).
_CONV1D = ("c_attn", "q_attn", "c_proj", "c_fc")
_CLIP = ".resblocks."


@dataclass(frozen=True)
class Weight:
    """What is known of the weight that a module changes.

    Attributes:
        name: its name.
        shape: its shape; None without a base.
        config: the configuration beside it.
    """

    name: str
    shape: tuple[int, ...] | None
    config: Mapping[str, Any]


def find_transposed(
    modules: Mapping[str, Module],
    shapes: Mapping[str, tuple[int, ...]],
    scale: Scale,
    weights: Mapping[str, Weight],
    base: Checkpoint | None,
    result: Source,
) -> set[str]:
    """The modules whose tensors are (B A)^T: embeddings, and layers that are stored as [in, out].

    The base's shapes decide.  A square tensor goes with the architecture or the other layers.  PEFT takes
    `fan_in_fan_out` from the layer's kind too, whatever the configuration says.

    A square tensor that may be either is skipped.
    """
    if base is None:
        return {name for name, parts in modules.items() if _without_base(name, parts, shapes[name], scale, result)}
    transposed: set[str] = set()
    seen: set[bool] = set()
    square: list[str] = []
    for module, parts in modules.items():
        shape, stored = shapes[module], weights[module].shape
        if len(shape) == 2 and shape[0] == shape[1] and not parts.embedding:
            square.append(module)
        elif len(shape) == 2 and stored in (shape, shape[::-1]):
            swap = parts.embedding if shape[0] == shape[1] else stored != shape
            transposed |= {module} if swap else set()
            seen |= set() if parts.embedding else {swap}
    transposed |= {module for module in square if _square(module, scale, weights[module], base, seen, result)}
    return transposed


def _without_base(module: str, parts: Module, shape: tuple[int, ...], scale: Scale, result: Source) -> bool:
    if parts.embedding:
        return True
    configured = bool(scale.orientation(module))
    if len(shape) == 2 and shape[0] == shape[1] and (configured or _leaf(module) in _CONV1D):
        why = "is square, and its layer may be a Linear ([out, in]) or a Conv1D ([in, out]); give --base MODEL"
        result.skipped[module] = Skipped(SkipReason.NEEDS_BASE, why)
    return configured


def _square(module: str, scale: Scale, weight: Weight, base: Checkpoint, seen: set[bool], result: Source) -> bool:
    """Whether a square tensor is stored as [in, out]; `seen` says which orders the source's other layers have."""
    name, model_type = weight.name, weight.config.get("model_type")
    if model_type in _FAMILIES:
        return "h" in module.split(".") or _leaf(name.removesuffix(".weight")) in _CONV1D
    configured = scale.orientation(module)
    if len(seen) == 2:
        if configured is None:
            result.warnings.append(f"{module} is square: taken as [out, in], though other layers here are [in, out]")
        return bool(configured)
    if seen or model_type is not None or _CLIP in name:
        return seen == {True} and _CLIP not in name
    if _leaf(name.removesuffix(".weight")) in _CONV1D:
        stored = _by_biases(base)
        if stored is None and configured is None:
            why = f"is square, and {name!r} may be a Linear ([out, in]) or a Conv1D ([in, out])"
            result.skipped[module] = Skipped(
                SkipReason.UNSUPPORTED, f"{why}; put the base's config.json beside its weights"
            )
        return bool(configured if stored is None else stored)
    if configured:
        result.warnings.append(f"{module} is taken as [out, in] despite fan_in_fan_out: no Conv1D has its name")
    return False


def _by_biases(base: Checkpoint) -> bool | None:
    """Whether the base's layers with names of Conv1D are: a bias has as many elements as its layer has outputs."""
    for name, slot in base.items():
        module = name.removesuffix(".weight")
        if _leaf(module) in _CONV1D and len(slot.shape) == 2 and slot.shape[0] != slot.shape[1]:
            bias = base.get(f"{module}.bias")
            if bias is not None and bias.shape in (slot.shape[:1], slot.shape[1:]):
                return bias.shape == slot.shape[1:]
    return None


def _leaf(module: str) -> str:
    return module.rpartition(".")[2]
