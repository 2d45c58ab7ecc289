"""LoRA of NeMo and Megatron Bridge in Megatron's names: `...self_attention.linear_qkv.adapter.linear_in.weight`.

Megatron has queries, keys and values in one layer, a group of heads at a time: the queries of the group, its key, its
value.  The first layer of the MLP holds the gate and what it gates.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial

from shiradelta.errors import SourceError
from shiradelta.format.arithmetic import Array
from shiradelta.models.safetensors import Slot
from shiradelta.util.text import brief

from .item import Source
from .lora import read_lora
from .lora_scale import Scale
from .nemo_archive import alpha_in, is_archive
from .rotary import heads
from .sources import SourceFiles, source
from .translated import Arrange, Translated, arranged

_KEY = re.compile(
    r".*\blayers\.(?P<layer>\d+)\.(?:self_attention|mlp)\.(?P<rest>[\w.]+)\.linear_(?P<side>in|out)\.weight"
)
_QKV, _GATED = "qkv", "gated"
#: The names of layers in NeMo 1 and later -> transformers' name, or how the layers are put together.
_MODULES = {
    "adapter_layer.lora_kqv_adapter": _QKV,
    "linear_qkv.adapter": _QKV,
    "linear_qkv.adapter_q": "self_attn.q_proj",
    "linear_qkv.adapter_k": "self_attn.k_proj",
    "linear_qkv.adapter_v": "self_attn.v_proj",
    "adapter_layer.lora_dense_attention_adapter": "self_attn.o_proj",
    "linear_proj.adapter": "self_attn.o_proj",
    "adapter_layer.lora_hto4h_adapter": _GATED,
    "linear_fc1.adapter": _GATED,
    "linear_fc1.adapter_gate": "mlp.gate_proj",
    "linear_fc1.adapter_up": "mlp.up_proj",
    "adapter_layer.lora_4htoh_adapter": "mlp.down_proj",
    "linear_fc2.adapter": "mlp.down_proj",
}


def _recognises(files: SourceFiles) -> bool:
    return any((match := _KEY.fullmatch(key)) is not None and match["rest"] in _MODULES for key in files.checkpoint)


@source(
    "nemo",
    "A LoRA of NeMo or Megatron Bridge: a .nemo archive, or tensors with Megatron's names and --alpha; needs the base.",
    _recognises,
    options=["alpha"],
    order=16,
)
def open_nemo(files: SourceFiles, alpha: float | None = None) -> Source:
    """All layers of an adapter."""
    source = files.checkpoint
    if alpha is None and is_archive(files.path):
        alpha = alpha_in(files.path)
    if alpha is None:
        raise SourceError(f"{files.path}: does not say alpha; give --alpha (lora_tuning.alpha in its configuration)")
    queries, keys, _ = heads(files.base, files.path)
    if queries % keys:
        raise SourceError(f"{files.path}: {queries} heads of queries are no groups of {keys}; give the right base")
    slots: dict[str, Slot] = {}
    for key in source:
        match = _KEY.fullmatch(key)
        if match is None or match["rest"] not in _MODULES:
            raise SourceError(f"{files.path}: {brief(repr(key), 120)} is no factor of a layer that is known here")
        for module, arrange in _parts(_MODULES[match["rest"]], source[key], queries, keys, files):
            side = {"in": "A", "out": "B"}[match["side"]]
            slot = source[key] if arrange is None or side == "A" else arranged(source[key], arrange)
            name = f"model.layers.{match['layer']}.{module}.lora_{side}.weight"
            if name in slots:
                raise SourceError(f"{files.path}: {key!r} and another key are the same factor; remove one")
            slots[name] = slot
    return read_lora(Translated(source, slots), files, Scale({}, alpha, files.path))


def _parts(
    module: str, slot: Slot, queries: int, keys: int, files: SourceFiles
) -> Iterator[tuple[str, Arrange | None]]:
    """The layers of transformers that a layer of Megatron's holds, and how to take their rows."""
    out, group = "linear_out" in slot.name, queries // keys
    if len(slot.shape) != 2:
        raise SourceError(f"{files.path}: {slot.name!r} has shape {list(slot.shape)}, which is no factor; get it again")
    if module == _QKV:
        if out and slot.shape[0] % (keys * (group + 2)):
            raise SourceError(
                f"{files.path}: {slot.name!r} has shape {list(slot.shape)}, which is none of {queries} and {keys}"
                " heads; give the right base"
            )
        places = {"q_proj": slice(group), "k_proj": slice(group, group + 1), "v_proj": slice(group + 1, group + 2)}
        for name, place in places.items():
            yield f"self_attn.{name}", partial(_of_groups, keys, group + 2, place)
    elif module == _GATED:
        if out and slot.shape[0] % 2:
            raise SourceError(f"{files.path}: {slot.name!r} has an odd number of rows; get it again")
        half: dict[str, Callable[[Array], Array]] = {"gate_proj": _first_half, "up_proj": _second_half}
        for name, take in half.items():
            yield f"mlp.{name}", take
    else:
        yield module, None


def _of_groups(groups: int, heads_in_group: int, place: slice, matrix: Array) -> Array:
    apart = matrix.reshape(groups, heads_in_group, matrix.shape[0] // groups // heads_in_group, matrix.shape[1])
    found: Array = apart[:, place].reshape(-1, matrix.shape[1])
    return found


def _first_half(matrix: Array) -> Array:
    return matrix[: len(matrix) // 2]


def _second_half(matrix: Array) -> Array:
    return matrix[len(matrix) // 2 :]
