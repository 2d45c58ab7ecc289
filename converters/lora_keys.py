"""Names in LoRA files: which module a key belongs to.

Keys read: `MODULE.lora_A.weight` and `lora_B` (PEFT, diffusers), `lora_embedding_A` / `_B` (PEFT), `lora_down` /
`lora_up` and `lora.down` / `lora.up` with `MODULE.alpha` (kohya, older diffusers), `lora_linear_layer.up` and
`processor.to_q_lora.up` (diffusers before PEFT); AdaLoRA's `lora_E`; `hada_w1_a` and `lokr_w1` and
their like; Tucker cores (`lora_mid`, `hada_t1`, `lokr_t2`); biases (`lora_B.bias`); the magnitudes of a DoRA beside any
of them; and those of `lora_on_base`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from shiradelta.errors import SourceError
from shiradelta.models.checkpoint import Checkpoint
from shiradelta.models.peft import ADAPTER, BASE_LAYER, PREFIX, unwrap

from . import dora, lora_on_base

_ADAPTER = rf"(?:{re.escape(ADAPTER)})?"
_KEY = re.compile(
    r"^(?P<module>.+?)\.(?:lora_(?P<embedding>embedding_)?(?P<ab>[ABE])|lora(?:_linear_layer)?[._](?P<updown>up|down|mid))"
    rf"{_ADAPTER}(?:\.weight)?$"
)
_LYCORIS = re.compile(
    rf"^(?P<module>.+?)\.(?P<part>hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2){_ADAPTER}$"
)
#: What a LoRA adds to a layer's bias, before it is scaled.
_BIAS = re.compile(rf"^(?P<module>.+?)\.lora_B{_ADAPTER}\.bias$")
#: x-flux: the layers of an attention processor.
_XFLUX = re.compile(r"^(?P<module>.+\.processor\.(?:qkv|proj)_lora[12]?)\.(?P<updown>up|down)\.weight$")
_PROCESSOR = re.compile(r"^(?P<layer>.+)\.processor\.(?P<projection>to_\w+)_lora(?P<rest>\.(?:up|down)(?:\.weight)?)$")
#: A factor of an adapter that has a name.
_NAMED = re.compile(
    r"\.(?:lora_(?:embedding_)?[ABE]|lora_magnitude_vector|hada_\w+|lokr_\w+)\.(?P<adapter>(?!(?:weight|bias)$)[^.]+)(?:\.weight)?$"
)
#: Parts of other methods that would be silently dropped if only A and B were read.
_UNSUPPORTED = {
    "lora_diag": "a KaSA, which cuts what is small out of the base; merge it first",
    "lokr_t1": "a LoKr whose first factor is decomposed too, which no trainer writes; merge it first",
}
#: A module, and the wrappers around it that are within others: PEFT wraps a module once for each of its parameters that
#: it adapts by name.
NESTED = re.compile(rf"(.+?)((?:{re.escape(BASE_LAYER.rstrip('.'))})*)")
#: Rows of an embedding that PEFT trains (trainable_token_indices).
TOKENS = re.compile(rf"^(?P<module>.+?)\.(?:token_adapter\.)?trainable_tokens_delta{_ADAPTER}$")

#: What PEFT saves of methods that differ from LoRA in training only (VeLoRA, MonteCLoRA).
TRAINING = re.compile(r"\.lora_(?:velora_embed|monteclora_sampler)(?:\.|$)")
_INNER = f"{BASE_LAYER}out_proj.lora_"


@dataclass(frozen=True)
class Stack:
    """A parameter that PEFT adapts by name: a matrix, or a stack of matrices of which each has factors of its own.

    Attributes:
        shape: the parameter's in memory.
        transposed: whether a matrix changes by (B A)^T instead of B A.
    """

    shape: tuple[int, ...]
    transposed: bool

    @property
    def experts(self) -> int:
        """Number of matrices."""
        return self.shape[0] if len(self.shape) == 3 else 1


@dataclass
class Module:
    """The keys of one module in a file, or of one parameter that has factors of its own."""

    keys: dict[str, str] = field(default_factory=dict)  # "A", "B", AdaLoRA's "E", or LyCORIS' name of a part -> key
    embedding: bool = False
    stack: Stack | None = None
    magnitudes: str | None = None  # the key of a DoRA's
    bias_of: str | None = None  # the module to whose bias this is added, scaled as that module's product

    @property
    def all_keys(self) -> list[str]:
        """The keys of all parts."""
        return [*self.keys.values(), *filter(None, [self.magnitudes])]


def parse_key(key: str) -> tuple[str, str, bool] | None:
    """(module, part, whether the module is an embedding), or None for a key that is not a factor.

    A module keeps the wrappers at its end (`experts.base_layer`): see `NESTED`.
    """
    lycoris = _LYCORIS.match(key)
    if lycoris is not None:
        return unwrap(lycoris["module"]), lycoris["part"], False
    if (xflux := _XFLUX.match(key)) is not None:
        return xflux["module"], {"down": "A", "up": "B"}[xflux["updown"]], False
    old = _PROCESSOR.match(key)
    if old is not None:
        projection = "to_out.0" if old["projection"] == "to_out" else old["projection"]
        key = f"{old['layer']}.{projection}.lora{old['rest']}"
    match = _KEY.match(key)
    if match is None:
        return None
    side = match["ab"] or {"down": "A", "up": "B", "mid": "mid"}[match["updown"]]
    module, nested = NESTED.fullmatch(match["module"]).groups()  # type: ignore[union-attr]  # it matches any string
    return unwrap(module) + nested, side, match["embedding"] is not None


def has_adapter_name(key: str) -> bool:
    """Whether a key is a factor's that names its adapter; `sort_keys` refuses all names but the default."""
    return _NAMED.search(key) is not None


def sort_keys(source: Checkpoint) -> tuple[dict[str, Module], dict[str, str], dict[str, str]]:
    """(module -> its factors, module -> its alpha's key, other key -> name of the tensor that it may be).

    Raises:
        SourceError: some belong to a method that cannot be converted, or to another adapter.
    """
    adapters = sorted({match["adapter"] for key in source if (match := _NAMED.search(key)) is not None})
    if len(adapters) > 1 or (adapters and f".{adapters[0]}" != ADAPTER):
        named = " and ".join(map(repr, adapters))
        raise SourceError(
            f"{source.root}: holds factors named after the adapter {named}; save one adapter, without its name"
        )
    modules: dict[str, Module] = {}
    alphas: dict[str, str] = {}
    others: dict[str, str] = {}
    magnitudes: dict[str, str] = {}
    on_base = lora_on_base.parse_keys(source)
    for key in source:
        parsed = on_base.get(key) or parse_key(key)
        if (bias := _BIAS.match(key)) is not None:
            module = unwrap(bias["module"])
            modules[f"{module}.bias"] = Module({"bias": key}, bias_of=module)
        elif parsed is not None:
            module, side, embedding = parsed
            parts = modules.setdefault(module, Module())
            if side in parts.keys:
                raise SourceError(f"{source.root}: {parts.keys[side]!r} and {key!r} are the same factor; remove one")
            parts.keys[side], parts.embedding = key, embedding
        elif (module_of := dora.parse_key(key)) is not None:
            if module_of in magnitudes:
                raise SourceError(f"{source.root}: {magnitudes[module_of]!r} and {key!r} are the same; remove one")
            magnitudes[module_of] = key
        elif key.endswith(".alpha"):
            alphas[key.removesuffix(".alpha").removeprefix(PREFIX)] = key
        else:
            name = unwrap(key)
            tokens = TOKENS.match(name)
            others[key] = name if tokens is None else f"{tokens['module']}.weight"
            for part, why in _UNSUPPORTED.items():
                if part in key:
                    raise SourceError(f"{source.root}: {key!r} is {why}")
    for name, parts in modules.items():
        if parts.bias_of is not None and parts.bias_of not in modules:
            raise SourceError(f"{source.root}: {name!r} is changed by a LoRA whose factors are not here; get it again")
    for module, key in magnitudes.items():
        if module not in modules:
            raise SourceError(f"{source.root}: {key!r} is of a DoRA whose factors are not here; get the file again")
        modules[module].magnitudes = key
    return modules, alphas, others


def find_attention(modules: Mapping[str, Module]) -> dict[str, str]:
    """`nn.MultiheadAttention` -> its `out_proj`, which PEFT 0.21 adapts along with it and adds to the base twice."""
    return {
        attention: module
        for module, parts in modules.items()
        if _is_inner(parts) and (attention := module.removesuffix(".out_proj")) in modules
    }


def find_halves(modules: Mapping[str, Module], base: Collection[str]) -> set[str]:
    """Modules that are one half of an `nn.MultiheadAttention`, whose other half is not there."""
    pairs = find_attention(modules)
    halves = {module for module, parts in modules.items() if _is_inner(parts)} - set(pairs.values())
    stored = {name.removesuffix(".in_proj_weight") for name in base if name.endswith(".in_proj_weight")}
    return halves | ((modules.keys() & stored) - pairs.keys())


def _is_inner(parts: Module) -> bool:
    return any(_INNER in key for key in parts.keys.values())


def refuse_unmerged(source: Checkpoint) -> None:
    """Refuses a whole model with LoRA layers still in it.

    An adapter holds no weights of the layers that it changes, except those of embeddings.
    """
    adapted = {key.partition(".lora_A.")[0] for key in source if ".lora_A." in key}
    wrapped = [module for module in adapted if f"{module}{BASE_LAYER}weight" in source]
    if len(wrapped) > 1:
        raise SourceError(
            f"{source.root}: is a whole model with LoRA layers in it ({min(wrapped)!r}, ...); merge it first, or save"
            " the adapter alone"
        )
