"""LoRA of llama.cpp: GGUF files of type adapter, with `blk.0.attn_q.weight.lora_a` [rank, in] and `.lora_b`."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from shiradelta.errors import SourceError
from shiradelta.format import registry
from shiradelta.format.arithmetic import Array
from shiradelta.io.recognise import starts_with
from shiradelta.models.checkpoint import Checkpoint
from shiradelta.models.safetensors import Shard, Slot
from shiradelta.util.regular_file import open_regular
from shiradelta.util.text import brief

from .item import Source
from .lora import read_lora
from .lora_scale import Scale, number
from .rotary import halves_below_each_other, heads
from .sources import SourceFiles, source
from .translated import Translated, constant, layers_of, transposed

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
#: GGUF's types of values -> their format; 8 is a string, 9 an array.
_VALUES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
#: GGUF's types of tensors -> our dtypes.
_DTYPES = {0: "float32", 1: "float16", 30: "bfloat16"}
#: Blocks of 32 bytes with a scale in float16 before them.
_Q8_0, _BLOCK = 8, 32
_ALIGNMENT = 32
#: The longest header; adapters have some hundred tensors.
_MOST_HEADER = 64 << 20

_KEY = re.compile(r"(?P<name>(?:blk\.(?P<layer>\d+)\.)?(?P<rest>\w+)\.weight)\.lora_(?P<part>[ab])")
#: llama.cpp's names of layers -> transformers'.
_MODULES = {
    "token_embd": "model.embed_tokens",
    "output": "lm_head",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_EMBEDDING = "token_embd"
_WHOLE = (_EMBEDDING, "output")
#: Ends of PEFT's names of first factors.
_FIRST = (".lora_A.weight", ".lora_embedding_A")
#: Architectures whose queries and keys llama.cpp has in Meta's order, and those that it leaves as they are.
_META = ("llama", "granite", "minicpm")
_AS_THEY_ARE = ("qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "olmo2", "command-r")


class GgufCheckpoint(Checkpoint):
    """The tensors of a GGUF file.

    Attributes:
        about: its values by key; arrays are left out.

    Raises:
        SourceError: it cannot be read, or has tensors of a type that is not known.
    """

    def __init__(self, path: Path) -> None:
        self.root, self.folders = path, {"": path.parent}
        self.about: dict[str, Any] = {}
        try:
            with open_regular(path) as stream:
                head = stream.read(_MOST_HEADER)
                size = stream.seek(0, 2)
            slots = tuple(_parse(path, _Header(head), size, self.about))
        except OSError as error:
            raise SourceError(f"{path}: cannot be read ({error.strerror}); check the path") from None
        except (struct.error, ValueError, OverflowError, RecursionError) as error:
            raise SourceError(f"{path}: its GGUF header is damaged ({brief(str(error), 120)}); get it again") from None
        self.shards = (Shard(path, 0, None, slots),)
        self._slots = {slot.name: slot for slot in slots}
        if len(self._slots) < len(slots):
            raise SourceError(f"{path}: has a tensor twice; get it again")


class _Header:
    """Reads numbers and strings one after the other."""

    def __init__(self, data: bytes) -> None:
        self._data, self.at = data, 0

    def take(self, form: str) -> Any:
        """The next number."""
        (found,) = struct.unpack_from(f"<{form}", self._data, self.at)
        self.at += struct.calcsize(f"<{form}")
        return found

    def text(self) -> str:
        """The next string."""
        length = self.take("Q")
        if length > len(self._data) - self.at:
            raise ValueError("a string is longer than the header")
        self.at += length
        return self._data[self.at - length : self.at].decode()

    def value(self, kind: int) -> Any:
        """The next value of a type; None for an array, which is skipped."""
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.take(_VALUES[kind]) if kind in _VALUES else self._unknown(kind)
        inner, count = self.take("I"), self.take("Q")
        if inner in _VALUES:
            self.at += count * struct.calcsize(f"<{_VALUES[inner]}")
            return None
        if inner != _STRING or count > len(self._data) - self.at:
            self._unknown(inner)
        for _ in range(count):
            self.text()
        return None

    def _unknown(self, kind: int) -> None:
        raise ValueError(f"a value of type {kind}")


def _parse(path: Path, head: _Header, size: int, about: dict[str, Any]) -> Iterator[Slot]:
    head.at = len(_MAGIC)
    version, tensors, values = head.take("I"), head.take("Q"), head.take("Q")
    if version not in _VERSIONS:
        raise ValueError(f"version {version}")
    for _ in range(values):
        key = head.text()
        value = head.value(head.take("I"))
        if value is not None:
            about[key] = value
    found = []
    for _ in range(tensors):
        name, dims = head.text(), head.take("I")
        if dims > 4 or not 0 < len(name.encode()) <= registry.MAX_NAME_SIZE:
            raise ValueError(f"{brief(name, 80)!r} has {dims} dimensions")
        shape = tuple(head.take("Q") for _ in range(dims))[::-1]
        found.append((name, shape, head.take("I"), head.take("Q")))
    unit = about.get("general.alignment", _ALIGNMENT)
    if type(unit) is not int or unit < 1:
        raise ValueError(f"alignment {unit}")
    start = registry.align(head.at, unit)
    for name, shape, kind, offset in found:
        yield _slot(path, name, shape, kind, start + offset, size)


def _slot(path: Path, name: str, shape: tuple[int, ...], kind: int, offset: int, size: int) -> Slot:
    if kind not in (*_DTYPES, _Q8_0):
        raise SourceError(f"{path}: {brief(repr(name), 120)} is quantised (GGUF's type {kind}); make an adapter in f16")
    dtype = registry.DTYPE_OF_NAME[_DTYPES.get(kind, "float32")]
    slot = Slot(name, path, offset, shape, dtype)
    blocks = slot.numel // _BLOCK
    stored = slot.nbytes if kind in _DTYPES else blocks * (_BLOCK + 2)
    if offset + stored > size or (kind == _Q8_0 and (not shape or shape[-1] % _BLOCK)):
        raise ValueError(f"{brief(name, 80)!r} of shape {list(shape)} reaches beyond the file")
    if kind in _DTYPES:
        return slot
    return Slot(name, path, offset, shape, dtype, partial(_unpacked, path, offset, blocks))


def _unpacked(path: Path, offset: int, blocks: int) -> Array:
    """Q8_0: a scale times 32 bytes, in float32."""
    kind = np.dtype([("scale", "<f2"), ("values", "i1", (_BLOCK,))])
    with open_regular(path) as stream:
        stream.seek(offset)
        held = np.frombuffer(stream.read(blocks * kind.itemsize), kind)
    values = held["scale"].astype(np.float32)[:, None] * held["values"].astype(np.float32)
    return values.reshape(-1).view(np.uint32)


def _recognises(files: SourceFiles) -> bool:
    return starts_with(files.path, _MAGIC) and GgufCheckpoint(files.path).about.get("general.type") == "adapter"


@source(
    "gguf",
    "A LoRA of llama.cpp: a GGUF file of type adapter; it needs the base.",
    _recognises,
    options=["alpha"],
    order=12,
)
def open_gguf(files: SourceFiles, alpha: float | None = None) -> Source:
    """All layers of an adapter."""
    source = GgufCheckpoint(files.path)
    kind, architecture = source.about.get("adapter.type"), source.about.get("general.architecture")
    if kind != "lora":
        raise SourceError(f"{files.path}: is an adapter of type {brief(repr(kind), 80)}; only lora can be converted")
    if architecture not in (*_META, *_AS_THEY_ARE):
        raise SourceError(
            f"{files.path}: is of architecture {brief(repr(architecture), 80)}, whose names in llama.cpp are not known"
            " here; convert the adapter that it was made from"
        )
    queries, keys, _ = heads(files.base, files.path)
    slots: dict[str, Slot] = {}
    for key in source:
        match = _KEY.fullmatch(key)
        if match is None or match["rest"].removesuffix("_exps") not in _MODULES:
            raise SourceError(f"{files.path}: {brief(repr(key), 120)} is no factor of a layer that is known here")
        for module, slot in _modules(source[key], match, architecture, files):
            if architecture in _META and match["part"] == "b" and match["rest"] in ("attn_q", "attn_k"):
                slot = halves_below_each_other(slot, queries if match["rest"] == "attn_q" else keys, files.path)
            embedding = "embedding_" if match["rest"] == _EMBEDDING else ""
            slots[f"{module}.lora_{embedding}{match['part'].upper()}{'' if embedding else '.weight'}"] = slot
    if alpha is None:
        value = number(source.about.get("adapter.lora.alpha", 0.0), f"{files.path}: adapter.lora.alpha")
        for name, slot in [item for item in slots.items() if item[0].endswith(_FIRST)]:
            module = name.removesuffix(_FIRST[0]).removesuffix(_FIRST[1])
            slots[f"{module}.alpha"] = constant(slot, value or float(slot.shape[0]))  # llama.cpp takes the rank for 0
    return read_lora(Translated(source, slots), files, Scale({}, alpha, files.path))


def _modules(slot: Slot, match: re.Match[str], architecture: str, files: SourceFiles) -> Iterator[tuple[str, Slot]]:
    """transformers' names of the layers that a factor is of, and their parts of it: one an expert in a stack."""
    rest, layer = match["rest"], match["layer"]
    if (layer is None) != (rest in _WHOLE):
        raise SourceError(f"{files.path}: {slot.name!r} is no factor of a layer; get it again")
    if rest == _EMBEDDING and len(slot.shape) == 2:  # llama.cpp looks up rows of the first factor there
        yield _MODULES[rest], transposed(slot) if match["part"] == "a" else slot
        return
    path = "" if layer is None else f"model.layers.{layer}."
    if architecture == "phi3" and rest == "ffn_up":
        yield f"{path}mlp.gate_up_proj", slot
    elif not rest.endswith("_exps"):
        yield path + _MODULES[rest], slot
    elif len(slot.shape) == 3:
        module, _, leaf = _MODULES[rest.removesuffix("_exps")].rpartition(".")
        mixtral = any(".block_sparse_moe." in name for name in files.base or ())
        module = "block_sparse_moe" if mixtral else module
        leaf = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}[leaf] if mixtral else leaf
        for expert, layer_of_expert in enumerate(layers_of(slot)):
            yield f"{path}{module}.experts.{expert}.{leaf}", layer_of_expert
    else:
        raise SourceError(
            f"{files.path}: {slot.name!r} of shape {list(slot.shape)} is no stack of experts; get it again"
        )
