"""LoRA and DoRA of torchtune in its own names (adapter_model.pt, adapter_0.pt): `layers.0.attn.q_proj.lora_a.weight`.

What torchtune saves for PEFT is read as PEFT's.
"""

from __future__ import annotations

import re
from pathlib import Path

from shiradelta.errors import SourceError
from shiradelta.models.checkpoint import Checkpoint
from shiradelta.models.peft import CONFIG
from shiradelta.models.safetensors import Slot
from shiradelta.util.json_files import read_json
from shiradelta.util.text import brief

from .item import Source
from .lora import read_lora
from .lora_scale import Scale, number
from .rotary import halves_below_each_other, heads
from .sources import SourceFiles, source
from .translated import Translated

_KEY = re.compile(r"(?P<module>(?:layers\.(?P<layer>\d+)\.)?(?P<rest>[\w.]+?))\.(?P<part>lora_[ab]\.weight|magnitude)")
#: torchtune's names of layers -> transformers'.
_MODULES = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
    "output": "lm_head",
}
_PARTS = {"lora_a.weight": "lora_A.weight", "lora_b.weight": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
#: Types of models whose queries and keys torchtune has in Meta's order, and those that it leaves as they are.
_META, _AS_THEY_ARE = ("llama", "mistral", "gemma", "gemma2"), ("qwen2",)


def _recognises(files: SourceFiles) -> bool:
    return any(re.fullmatch(r"layers\.\d+\.[\w.]+\.lora_[ab]\.weight", key) for key in files.checkpoint)


@source(
    "torchtune",
    "A LoRA or DoRA of torchtune in its own names: adapter_model.pt; it needs the base.",
    _recognises,
    options=["alpha"],
    order=15,
)
def open_torchtune(files: SourceFiles, alpha: float | None = None) -> Source:
    """All layers of an adapter."""
    source = files.checkpoint
    queries, keys, about = heads(files.base, files.path)
    kind = about.get("model_type")
    if kind not in (*_META, *_AS_THEY_ARE):
        known = ", ".join((*_META, *_AS_THEY_ARE))
        raise SourceError(
            f"{files.path}: torchtune's order of queries and keys is known of {known}, not of {brief(repr(kind), 80)};"
            " save the adapter for PEFT, or merge it first"
        )
    slots: dict[str, Slot] = {}
    for key in source:
        match = _KEY.fullmatch(key)
        if match is None or match["rest"] not in _MODULES or (match["layer"] is None) != (match["rest"] == "output"):
            raise SourceError(
                f"{files.path}: {brief(repr(key), 120)} is no layer of torchtune's; merge the adapter first"
            )
        layer = "" if match["layer"] is None else f"model.layers.{match['layer']}."
        slot = source[key]
        if kind in _META and match["rest"] in ("attn.q_proj", "attn.k_proj") and match["part"] != "lora_a.weight":
            slot = halves_below_each_other(slot, queries if match["rest"] == "attn.q_proj" else keys, files.path)
        slots[f"{layer}{_MODULES[match['rest']]}.{_PARTS[match['part']]}"] = slot
    return read_lora(Translated(source, slots), files, _scale(source, alpha))


def _scale(source: Checkpoint, alpha: float | None) -> Scale:
    """The user's alpha, or that of the configuration that torchtune puts beside an adapter for PEFT.

    Raises:
        SourceError: there is neither.
    """
    where: Path = source.shards[0].file.parent / CONFIG
    about = read_json(where) if alpha is None and where.is_file() else {}
    if isinstance(about, dict) and "lora_alpha" in about:
        return Scale({"": {"lora_alpha": number(about["lora_alpha"], f"{where}: lora_alpha")}}, None, where)
    if alpha is None:
        raise SourceError(f"{source.root}: does not say alpha, and no {CONFIG} is beside it; give --alpha")
    return Scale({}, alpha, where)
