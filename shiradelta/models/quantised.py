"""Quantised checkpoints: scale tensors beside float8 weights, and weights whose stored bits are packed.

A float8 element is the model's weight divided by a scale, so it can be set, and compared where the scales are equal.
Elements of packed formats stand for no single weight, or for one that depends on other tensors as well.
"""

from __future__ import annotations

from collections.abc import Mapping

from shiradelta.models.safetensors import Slot

#: What follows a weight's name, or its module's, in the name of its scale: compressed-tensors, ModelOpt, DeepSeek and
#: transformers; ComfyUI.
_OF_WEIGHT, _OF_MODULE = ("_scale", "_scale_inv"), (".scale_weight",)
_INTEGERS = ("int8", "uint8", "int32")
#: Ends of names that only packed formats have -> the format.
_ENDS = {
    "SCB": "bitsandbytes, 8 bits",
    "qweight": "GPTQ or AWQ",
    "weight_packed": "compressed-tensors",
    "W_q": "HQQ",
    "_data": "quanto",
}
_BNB = ".quant_state.bitsandbytes__"
#: gpt-oss' names of MXFP4 weights, and of their scales.
_BLOCKS, _SCALES = "_blocks", "_scales"


def scale_of(name: str, slots: Mapping[str, Slot]) -> str | None:
    """The name of the scale of float8 or integer weights in their checkpoint; None if they have none, or are others."""
    if not slots[name].dtype.name.startswith(("float8", *_INTEGERS)):
        return None
    names = [name + end for end in _OF_WEIGHT] + [name.rpartition(".")[0] + end for end in _OF_MODULE]
    return next((scale for scale in names if scale in slots), None)


def weight_of(name: str, slots: Mapping[str, Slot]) -> str | None:
    """The name of the weights whose scale a tensor is; None if it is none."""
    names = [name.removesuffix(end) for end in _OF_WEIGHT if name.endswith(end)]
    names += [f"{name.removesuffix(end)}.weight" for end in _OF_MODULE if name.endswith(end)]
    return next((weight for weight in names if weight in slots and scale_of(weight, slots) == name), None)


def packing(slots: Mapping[str, Slot]) -> tuple[str, str] | None:
    """(a tensor, its format) of a checkpoint that stores packed weights; None for any other."""
    for name, slot in slots.items():
        end = name.rpartition(".")[2]
        if _BNB in name:
            return name, "bitsandbytes, 4 bits"
        if end in _ENDS:
            return name, _ENDS[end]
        if slot.dtype.name not in _INTEGERS:
            continue
        if name.endswith(_BLOCKS) and name.removesuffix(_BLOCKS) + _SCALES in slots:
            return name, "MXFP4"
        if scale_of(name, slots) is not None:
            return name, f"{slot.dtype.name} with scales, such as NVFP4, MXFP4 or int8"
    return None
