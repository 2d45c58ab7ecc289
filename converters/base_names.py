"""Finds the tensors of a base that a file means: by their names in the model, in a pipeline, or in one file of it.

kohya's names have underscores for dots, and say the component (`lora_unet_`, `lora_te1_`); diffusers' begin with it
(`unet.`, `text_encoder.`).  An original checkpoint in one file has names of its own: see `original_names`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from shiradelta.models.checkpoint import Checkpoint
from shiradelta.models.library import Converted, match_names
from shiradelta.models.names import Named, search_the_rest
from shiradelta.models.sentence import folder_of

from .item import NO_TARGET, Skipped, SkipReason
from .layout_names import other_names, with_prefix, without_prefix
from .original_names import (
    SINGLE_FILE,
    UNET,
    is_numbered,
    is_original,
    is_single_file,
    layers_per_block,
    library_names,
    library_unet,
)

#: LyCORIS' names in a module that it wraps: no component, dots became underscores.
_LYCORIS_PREFIX = "lycoris_"
_KOHYA = re.compile(r"lora_(?P<component>unet|transformer|te\d?)_(?P<rest>.+)")
_DIFFUSERS = re.compile(
    r"(?P<component>unet|transformer(?:_2)?|text_encoder(?:_\d)?|diffusion_model|model\.diffusion_model)\.(?P<rest>.+)"
)
#: kohya's names of components -> a pipeline's.
_COMPONENTS = {
    "unet": ("unet", "transformer"),
    "te": ("text_encoder",),
    "te1": ("text_encoder",),
    "te2": ("text_encoder_2",),
    "te3": ("text_encoder_3", "text_encoder_2"),  # T5, of Stable Diffusion 3 and of FLUX
    "diffusion_model": ("unet", "transformer"),
    "model.diffusion_model": ("unet", "transformer"),
}
#: The denoising models of a pipeline; a file that does not say which may be for either of two.
_DENOISERS = ("unet", "transformer", "transformer_2")
#: Components that are text encoders of CLIP.
_TEXT_ENCODERS = ("te", "te1", "te2", "text_encoder", "text_encoder_2")
_DIFFUSERS_BLOCKS = re.compile(r"(?:^|[._])(?:(?:down|up|mid|transformer|single_transformer)_blocks?)[._]")


def _mangle(name: str) -> str:
    return name.removesuffix(".weight").replace(".", "_")


def _by_mangled(names: Iterable[str]) -> dict[str, list[str]]:
    """Names by what they are with underscores for dots."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(_mangle(name), []).append(name)
    return found


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
        known = mangled or "diffusion_model" in component
        components = _COMPONENTS.get(component, (component,)) if known else (component,)
        return cls(component, components, match["rest"], mangled)


class _Base:
    """Finds tensors in a base by their names in a pipeline."""

    def __init__(self, base: Checkpoint) -> None:
        self.base = base
        self.components = {name.partition("/")[0] for name in base if "/" in name}
        self.single_file = is_single_file(base)
        self.original = any(map(is_original, base))
        self._mangled = _by_mangled(base)
        self._others: dict[str, tuple[dict[str, str | Converted], dict[str, list[str]]]] = {}
        self._libraries: dict[str, tuple[dict[str, str | Converted], dict[str, list[str]]]] = {}

    def by_mangled(self, name: str) -> str | Skipped | None:
        """The tensor of a name whose dots became underscores, or why it is unclear which."""
        names = self._mangled.get(_mangle(name), [])
        if not names and name.startswith(_LYCORIS_PREFIX):
            bare = name.removeprefix(_LYCORIS_PREFIX)
            folders = [f"{component}/" for component in sorted(self.components)] or [""]
            names = [found for folder in folders for found in self._mangled.get(_mangle(folder + bare), [])]
        if len(names) > 1:
            return self._unclear(name, names)
        return names[0] if names else None

    def _unclear(self, name: str, names: Iterable[str]) -> Skipped:
        either = " or ".join(map(repr, names))
        return Skipped(SkipReason.NO_TARGET, f"{name!r} may be {either} of {self.base.root}; rename it in the source")

    def _places(self, place: _InPipeline) -> list[str]:
        """What may stand before a place's name."""
        if self.components:
            return [f"{component}/" for component in place.components]
        return [*SINGLE_FILE.get(place.component, ()), ""] if self.single_file else [""]

    def find(self, place: _InPipeline) -> str | Converted | Skipped | None:
        """The tensor of a place: under its name, or under that of the original checkpoint or of the library."""
        if self.single_file and (found := self._in_single_file(place)) is not None:
            return found
        places = self._places(place)
        two = [prefix for prefix in places if prefix.rstrip("/") in self.components]
        if place.component not in self.components and {"transformer/", "transformer_2/"} <= {*two, *self._second(two)}:
            return self._unclear(place.rest, [f"transformer/{place.rest}", f"transformer_2/{place.rest}"])
        for prefix in places:
            for rest in self._spellings(place, prefix):
                name = self.by_mangled(prefix + rest) if place.mangled else prefix + rest
                if isinstance(name, Skipped) or (name is not None and name in self.base):
                    return name
        for prefix in places:
            if (where := self._in_other_layout(prefix, place.rest, place.mangled)) is not None:
                return where
        return None

    def _second(self, places: list[str]) -> set[str]:
        """The second denoising model of a pipeline, if the first is meant."""
        return {"transformer_2/"} & set(self._folders) if "transformer/" in places else set()

    def find_plain(self, name: str) -> str | Converted | Skipped | None:
        """The tensor of a name that says no component, in the other layout of the base's denoising model."""
        prefixes = [f"{component}/" for component in _DENOISERS if component in self.components]
        prefixes += [""] if not self.components else []
        prefixes += [UNET] if self.single_file else []
        found = {prefix: where for prefix in prefixes if (where := self._in_other_layout(prefix, name, False))}
        if len(found) > 1:
            return self._unclear(name, [prefix + name for prefix in found])
        return next(iter(found.values()), None)

    def _in_other_layout(self, prefix: str, rest: str, mangled: bool) -> str | Converted | Skipped | None:
        """The tensor of a name in the other layout of a diffusion transformer, whose names begin with a prefix."""
        if prefix not in self._others:
            names = with_prefix(other_names(without_prefix(self.base.shapes, prefix)), prefix)
            self._others[prefix] = names, _by_mangled(names)
        names, by_mangled = self._others[prefix]
        several = by_mangled.get(_mangle(rest), []) if mangled else [rest]
        if len(several) > 1:
            return self._unclear(rest, several)
        return names.get(several[0]) if several else None

    def _spellings(self, place: _InPipeline, prefix: str) -> list[str]:
        """The names that a tensor of a component may have there."""
        rest = place.rest
        if place.component in _TEXT_ENCODERS:  # transformers 5 has this part in the name only of some classes
            dot = "_" if place.mangled else "."
            head = f"text_model{dot}"
            return [rest, rest.removeprefix(head) if rest.startswith(head) else head + rest]
        if not self.original and (layers := self._layers.get(prefix)) is not None:
            return [rest, *filter(None, [library_unet(rest, layers)])]
        return [rest]

    @cached_property
    def _layers(self) -> dict[str, int | None]:
        """What stands before the names of a model -> residual blocks in each block, if it is a U-Net."""
        return {prefix: layers_per_block(self.base, prefix) for prefix in (*self._folders, "")}

    @property
    def _folders(self) -> list[str]:
        return [f"{component}/" for component in self.components]

    def _in_single_file(self, place: _InPipeline) -> str | Converted | Skipped | None:
        """The tensor of a name of diffusers or transformers in an original checkpoint."""
        if place.component not in self._libraries:
            names = library_names(self.base, place.component)
            self._libraries[place.component] = names, _by_mangled(names)
        names, mangled = self._libraries[place.component]
        for rest in self._spellings(place, ""):
            several = mangled.get(_mangle(rest), []) if place.mangled else [rest]
            if len(several) > 1:
                return self._unclear(place.rest, several)
            if several and several[0] in names:
                return names[several[0]]
        return None

    def one_component(self, places: Mapping[str, _InPipeline], shapes: Named) -> set[str]:
        """The components of a file that the base may be: by its folder's name, else by what fits."""
        spelt = {place.component: place.components for place in places.values()}
        folder = folder_of(self.base.root).name
        named = {component for component, folders in spelt.items() if folder in folders}
        if len(named) == 1 or len(spelt) < 2:
            return named or set(spelt)
        fits = Counter(
            place.component
            for name, place in places.items()
            if isinstance(found := self.find(place), str)
            and sorted(self.base[found].shape) == sorted(shapes[name] or ())
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


def find_tensors(wanted: Named, base: Checkpoint, may_lack: Callable[[str], bool] = lambda name: False) -> BaseTensors:
    """Finds tensors in a base.

    Args:
        wanted: names as a file has them -> shapes, in any order of the dimensions.
        base: the checkpoint to search.
        may_lack: whether the user allows that a name is lacking; it does not make others unclear then.
    """
    lacking: dict[str, Skipped] = {}

    def search(some: Named) -> tuple[BaseTensors, dict[str, Skipped]]:
        found = _find_tensors(some, base)
        lacking.update(found.lacking)
        return found, found.lacking

    result = search_the_rest(wanted, search, may_lack)
    there = {*result.found, *result.converted}
    result.lacking = {name: why for name, why in lacking.items() if name not in there}
    return result


def _find_tensors(wanted: Named, base: Checkpoint) -> BaseTensors:
    """As `find_tensors`, for names of which none may be lacking."""
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
        where = there.find(place) if name not in lacking else None
        if isinstance(where, Converted):
            result.converted[name] = where
        elif isinstance(where, Skipped):
            lacking[name] = where
        elif where is not None:
            found[name] = where
    rest = [name for name in wanted if name not in found and name not in lacking and name not in result.converted]
    matched = match_names({name: wanted[name] for name in rest}, base)
    result.tied = matched.tied
    result.converted |= matched.converted
    for name in rest:
        tensor = matched.names.get(name) or there.by_mangled(name)
        if isinstance(tensor, Skipped):
            lacking[name] = tensor
        elif tensor is not None:
            found[name] = tensor
        elif name in matched.converted:
            continue
        elif (other := there.find_plain(name)) is not None:
            if isinstance(other, Converted):
                result.converted[name] = other
            elif isinstance(other, Skipped):
                lacking[name] = other
            else:
                found[name] = other
        elif name in matched.unclear:
            lacking[name] = Skipped(SkipReason.NO_TARGET, f"{matched.unclear[name]} of {base.root}")
        elif is_original(name) and not there.original:
            remedy = "put the config.json of its U-Net beside the weights, or " if is_numbered(name) else ""
            why = f"it has the original checkpoint's name, the base has diffusers'; {remedy}convert its keys first"
            lacking[name] = Skipped(SkipReason.NO_TARGET, why)
        elif there.original and _DIFFUSERS_BLOCKS.search(name):
            why = (
                "it has diffusers' name, the base has the original checkpoint's; give the pipeline in diffusers' layout"
            )
            lacking[name] = Skipped(SkipReason.NO_TARGET, why)
        else:
            lacking[name] = NO_TARGET
    return result
