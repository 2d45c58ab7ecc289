"""Names in LoRA files: which module a key belongs to, and which tensor of the base that is.

Keys read: `MODULE.lora_A.weight` and `lora_B` (PEFT, diffusers), `lora_embedding_A` / `_B` (PEFT), `lora_down` /
`lora_up` and `lora.down` / `lora.up` with `MODULE.alpha` (kohya, older diffusers), `lora_linear_layer.up` and
`processor.to_q_lora.up` (diffusers before PEFT); AdaLoRA's `lora_E`; `hada_w1_a` and `lokr_w1` and their like.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from shiradelta.errors import SourceError
from shiradelta.models.checkpoint import Checkpoint
from shiradelta.models.library import Converted, match_names
from shiradelta.models.names import Named
from shiradelta.models.peft import ADAPTER, BASE_LAYER, PREFIX, unwrap

from .item import NO_TARGET, Skipped, SkipReason

_ADAPTER = rf"(?:{re.escape(ADAPTER)})?"
_KEY = re.compile(
    r"^(?P<module>.+?)\.(?:lora_(?P<embedding>embedding_)?(?P<ab>[ABE])|lora(?:_linear_layer)?[._](?P<updown>up|down))"
    rf"{_ADAPTER}(?:\.weight)?$"
)
_LYCORIS = re.compile(rf"^(?P<module>.+?)\.(?P<part>hada_w[12]_[ab]|lokr_w[12](?:_[ab])?){_ADAPTER}$")
_PROCESSOR = re.compile(r"^(?P<layer>.+)\.processor\.(?P<projection>to_\w+)_lora(?P<rest>\.(?:up|down)(?:\.weight)?)$")
#: A factor of an adapter that has a name.
_NAMED = re.compile(
    r"\.(?:lora_(?:embedding_)?[ABE]|hada_\w+|lokr_\w+)\.(?P<adapter>(?!(?:weight|bias)$)[^.]+)(?:\.weight)?$"
)
#: Parts of other methods that would be silently dropped if only A and B were read.
_UNSUPPORTED = {
    "lora_magnitude_vector": "DoRA's magnitudes need the base's norms; merge it first",
    "dora_scale": "DoRA's magnitudes need the base's norms; merge it first",
    "lora_diag": "a KaSA, which cuts what is small out of the base; merge it first",
    "lora_mid": "a Tucker-decomposed LoRA; merge it first",
    "hada_t": "a Tucker-decomposed LoHa; merge it first",
    "lokr_t": "a Tucker-decomposed LoKr; merge it first",
    "lora_B.bias": "a LoRA with biases; merge it first",
}
#: A module, and the wrappers around it that are within others: PEFT wraps a module once for each of its parameters that
#: it adapts by name.
NESTED = re.compile(rf"(.+?)((?:{re.escape(BASE_LAYER.rstrip('.'))})*)")
#: Rows of an embedding that PEFT trains (trainable_token_indices).
TOKENS = re.compile(rf"^(?P<module>.+?)\.(?:token_adapter\.)?trainable_tokens_delta{_ADAPTER}$")


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


def parse_key(key: str) -> tuple[str, str, bool] | None:
    """(module, part, whether the module is an embedding), or None for a key that is not a factor.

    A module keeps the wrappers at its end (`experts.base_layer`): see `NESTED`.
    """
    lycoris = _LYCORIS.match(key)
    if lycoris is not None:
        return unwrap(lycoris["module"]), lycoris["part"], False
    old = _PROCESSOR.match(key)
    if old is not None:
        projection = "to_out.0" if old["projection"] == "to_out" else old["projection"]
        key = f"{old['layer']}.{projection}.lora{old['rest']}"
    match = _KEY.match(key)
    if match is None:
        return None
    side = match["ab"] or {"down": "A", "up": "B"}[match["updown"]]
    module, nested = NESTED.fullmatch(match["module"]).groups()  # type: ignore[union-attr]  # it matches any string
    return unwrap(module) + nested, side, match["embedding"] is not None


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
    for key in source:
        parsed = parse_key(key)
        if parsed is not None:
            module, side, embedding = parsed
            parts = modules.setdefault(module, Module())
            if side in parts.keys:
                raise SourceError(f"{source.root}: {parts.keys[side]!r} and {key!r} are the same factor; remove one")
            parts.keys[side], parts.embedding = key, embedding
        elif key.endswith(".alpha"):
            alphas[key.removesuffix(".alpha").removeprefix(PREFIX)] = key
        else:
            name = unwrap(key)
            tokens = TOKENS.match(name)
            others[key] = name if tokens is None else f"{tokens['module']}.weight"
            for part, why in _UNSUPPORTED.items():
                if part in key:
                    raise SourceError(f"{source.root}: {key!r} is {why}")
    return modules, alphas, others


def find_attention(modules: Mapping[str, Module]) -> dict[str, str]:
    """`nn.MultiheadAttention` -> its `out_proj`, which PEFT 0.21 adapts along with it and adds to the base twice."""
    inner = f"{BASE_LAYER}out_proj.lora_A"
    return {
        module.removesuffix(".out_proj"): module
        for module, parts in modules.items()
        if inner in parts.keys.get("A", "") and module.removesuffix(".out_proj") in modules
    }


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


# ---------------------------------------------------------------------------- the base's names

#: LyCORIS' names in a module that it wraps: no component, dots became underscores.
_LYCORIS_PREFIX = "lycoris_"
#: Where an original checkpoint in one file (Stable Diffusion's) has its components.
_SINGLE_FILE = {
    "unet": ("model.diffusion_model.",),
    "te": ("cond_stage_model.transformer.",),
    "te1": ("conditioner.embedders.0.transformer.",),
}
_KOHYA = re.compile(r"lora_(?P<component>unet|transformer|te\d?)_(?P<rest>.+)")
_DIFFUSERS = re.compile(r"(?P<component>unet|transformer|text_encoder(?:_\d)?)\.(?P<rest>.+)")
#: kohya's names of components -> a pipeline's.
_COMPONENTS = {
    "unet": ("unet", "transformer"),
    "te": ("text_encoder",),
    "te1": ("text_encoder",),
    "te2": ("text_encoder_2",),
    "te3": ("text_encoder_3",),
}
_ORIGINAL = re.compile(r"(?:^|[._])(?:(?:input|output|double|single|joint)_blocks|middle_block)[._]")

_DIFFUSERS_BLOCKS = re.compile(r"(?:^|[._])(?:(?:down|up|mid|transformer|single_transformer)_blocks?)[._]")


def _mangle(name: str) -> str:
    return name.removesuffix(".weight").replace(".", "_")


@dataclass(frozen=True)
class _InPipeline:
    """A tensor's possible names in a pipeline, read from its key: `rest` in one of `components`."""

    component: str  # as the file spells it
    components: tuple[str, ...]
    rest: str
    mangled: bool  # dots became underscores

    @classmethod
    def of(cls, name: str) -> _InPipeline | None:
        match = _KOHYA.match(name) or _DIFFUSERS.match(name)
        if match is None:
            return None
        component, mangled = match["component"], match.re is _KOHYA
        components = _COMPONENTS.get(component, (component,)) if mangled else (component,)
        return cls(component, components, match["rest"], mangled)


class _Base:
    """Finds tensors in a base by their names in a pipeline."""

    def __init__(self, base: Checkpoint) -> None:
        self.base = base
        self.components = {name.partition("/")[0] for name in base if "/" in name}
        self.single_file = any(name.startswith(_SINGLE_FILE["unet"]) for name in base)
        self.original = any(_ORIGINAL.search(name) for name in base)
        self._mangled: dict[str, list[str]] = {}
        for name in base:
            self._mangled.setdefault(_mangle(name), []).append(name)

    def by_mangled(self, name: str) -> str | None:
        """The tensor of a name whose dots became underscores.

        Raises:
            SourceError: several tensors have that name.
        """
        names = self._mangled.get(_mangle(name), [])
        if not names and name.startswith(_LYCORIS_PREFIX):
            bare = name.removeprefix(_LYCORIS_PREFIX)
            folders = [f"{component}/" for component in sorted(self.components)] or [""]
            names = [found for folder in folders for found in self._mangled.get(_mangle(folder + bare), [])]
        if len(names) > 1:
            raise SourceError(
                f"{self.base.root}: {name!r} may be {' or '.join(map(repr, names))}; rename it in the source"
            )
        return names[0] if names else None

    def _places(self, place: _InPipeline) -> list[str]:
        """What may stand before a place's name."""
        if self.components:
            return [f"{component}/" for component in place.components]
        return [*_SINGLE_FILE.get(place.component, ()), ""] if self.single_file else [""]

    def find(self, place: _InPipeline) -> str | None:
        for prefix in self._places(place):
            name: str | None = prefix + place.rest
            if place.mangled:
                name = self.by_mangled(prefix + place.rest)
            if name is not None and name in self.base:
                return name
        return None

    def one_component(self, places: Mapping[str, _InPipeline], shapes: Named) -> set[str]:
        """The components of a file that the base may be: by its folder's name, else by what fits."""
        spelt = {place.component: place.components for place in places.values()}
        root = self.base.root if self.base.root.is_dir() else self.base.root.parent
        named = {component for component, folders in spelt.items() if root.name in folders}
        if len(named) == 1 or len(spelt) < 2:
            return named or set(spelt)
        fits = Counter(
            place.component
            for name, place in places.items()
            if (found := self.find(place)) and sorted(self.base[found].shape) == sorted(shapes[name] or ())
        )
        return {component for component in spelt if fits[component] == max(fits.values(), default=0)}


@dataclass
class BaseTensors:
    """The tensors of a base that a source changes.

    Attributes:
        found: wanted name -> the base's name.
        tied: wanted name -> the base's name of the tensor that it is tied to; it is in `found`, too.
        converted: wanted name -> where the base has its elements, if it stores them in another form.
        lacking: wanted name -> why there is none.
    """

    found: dict[str, str] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    converted: dict[str, Converted] = field(default_factory=dict)
    lacking: dict[str, Skipped] = field(default_factory=dict)


def find_tensors(wanted: Named, base: Checkpoint) -> BaseTensors:
    """Finds tensors in a base.

    Args:
        wanted: names as a file has them -> shapes, in any order of the dimensions.
        base: the checkpoint to search.
    """
    result = BaseTensors()
    found, lacking = result.found, result.lacking
    there = _Base(base)
    places = {name: place for name in wanted if name not in base and (place := _InPipeline.of(name)) is not None}
    if not there.components and not there.single_file:
        chosen = there.one_component(places, wanted)
        for name, place in places.items():
            if len(chosen) > 1:
                either = " or of ".join(sorted(chosen))
                why = f"the base may be that of {either}; give the pipeline's folder, or name the base's so"
                lacking[name] = Skipped(SkipReason.NO_TARGET, why)
            elif place.component not in chosen:
                why = f"it is of {place.component}, the base of {', '.join(chosen)}"
                lacking[name] = Skipped(SkipReason.NO_TARGET, why)
    for name, place in places.items():
        if name not in lacking and (tensor := there.find(place)) is not None:
            found[name] = tensor
    rest = [name for name in wanted if name not in found and name not in lacking]
    matched = match_names({name: wanted[name] for name in rest}, base)
    result.tied, result.converted = matched.tied, matched.converted
    for name in rest:
        tensor = matched.names.get(name) or there.by_mangled(name)
        if tensor is not None:
            found[name] = tensor
        elif name in matched.converted:
            continue
        elif name in matched.unclear:
            lacking[name] = Skipped(SkipReason.NO_TARGET, f"{matched.unclear[name]} of {base.root}")
        elif _ORIGINAL.search(name) and not there.original:
            why = "it has the original checkpoint's name, the base has diffusers'; convert its keys first"
            lacking[name] = Skipped(SkipReason.NO_TARGET, why)
        elif there.original and _DIFFUSERS_BLOCKS.search(name):
            why = (
                "it has diffusers' name, the base has the original checkpoint's; give the pipeline in diffusers' layout"
            )
            lacking[name] = Skipped(SkipReason.NO_TARGET, why)
        else:
            lacking[name] = NO_TARGET
    return result
