"""Finds tensors in a checkpoint as the library that loads it does.

transformers renames, stacks, splits, transposes and ties tensors on loading.  The model is built from its config.json
without weights, and asked how it would be saved.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from shiradelta.models.checkpoint import Checkpoint
from shiradelta.models.names import Found, Named, Shape, find_names
from shiradelta.models.saved import SavedTensor, saved_tensors
from shiradelta.models.views import View
from shiradelta.util.json_files import read_json

#: Ends of the names of output layers that models may tie to their input embeddings, and of those.
_OUTPUTS = ("lm_head.weight", "embed_out.weight", "predictions.decoder.weight", "lm_head.decoder.weight")
_INPUTS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")

#: Keys of a configuration under which transformers looks for that of the text.
_TEXT_PARTS = ("text_config", "decoder", "generator", "text_encoder")


@dataclass(frozen=True)
class Converted:
    """A tensor that the checkpoint stores in another form: stacked, split or transposed.

    It is a weight in memory, or a tensor as the library saves it, of a checkpoint that was saved otherwise.

    Attributes:
        shape: its shape.
        views: the checkpoint's tensors that have its elements; their `weight` is the tensor itself.
    """

    shape: Shape
    views: tuple[View, ...]


@dataclass
class FoundInBase(Found):
    """The result of a search in a checkpoint.

    Attributes:
        tied: wanted name -> the stored name of the tensor that it is tied to; it is in `names`, too.
        converted: wanted name -> where its elements are, if they are stored in another form.  A name that is in `names`
            as well has the dimensions of its stacked matrices in another order.
    """

    tied: dict[str, str] = field(default_factory=dict)
    converted: dict[str, Converted] = field(default_factory=dict)


def match_names(wanted: Named, checkpoint: Checkpoint) -> FoundInBase:
    """Finds tensors in a checkpoint: as `find_names`, then as the library that loads it would.

    Args:
        wanted: names as in a file or in memory -> their shapes, with dimensions in any order; None if unknown.
        checkpoint: where to look.
    """
    by_name = find_names(wanted, checkpoint.shapes)
    found = FoundInBase(by_name.names, by_name.unclear)
    for name in wanted:
        if name not in found.names and (tied := _tied_by_name(checkpoint, name, wanted[name])) is not None:
            found.names[name] = found.tied[name] = tied
            found.unclear.pop(name, None)
    turned = {name: (there, shape) for name, there in found.names.items() if (shape := wanted[name]) is not None}
    turned = {
        name: (there, shape) for name, (there, shape) in turned.items() if _is_turned(shape, checkpoint[there].shape)
    }
    for prefix, folder in checkpoint.folders.items():
        here = {name: one for name, one in turned.items() if one[0].startswith(prefix)}
        if here and (library := library_of(folder)) is not None:
            found.converted |= _Loaded(library, checkpoint, prefix).turned(here)
        missing = {name: wanted[name] for name in wanted if name not in found.names and name.startswith(prefix)}
        if missing and (library := library_of(folder)) is not None:
            _Loaded(library, checkpoint, prefix).find(missing, found)
    return found


def _is_turned(shape: Shape, stored: Shape) -> bool:
    """Whether stacked matrices have their dimensions in another order than the checkpoint's."""
    return len(shape) > 2 and shape != stored and sorted(shape) == sorted(stored)


def shared_tensors(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """A checkpoint's tensors of which the library makes several, all the same: name -> the other names in memory."""
    shared: dict[str, list[str]] = {}
    for prefix, folder in checkpoint.folders.items():
        library = library_of(folder)
        if library is not None and library.tied:
            shared |= _Loaded(library, checkpoint, prefix).shared()
    return shared


def linear_weights(checkpoint: Checkpoint) -> dict[str, list[str]] | None:
    """A checkpoint's tensor -> the linear layers in memory whose weight it is; None if the library cannot tell."""
    library = library_of(checkpoint.folders.get("", checkpoint.root))
    if library is None:
        return None
    weights = {f"{name}.weight": library.shapes[f"{name}.weight"] for name in library.linear}
    found: dict[str, list[str]] = {}
    for weight, name in match_names(weights, checkpoint).names.items():
        found.setdefault(name, []).append(weight.removesuffix(".weight"))
    return found


def _tied_by_name(checkpoint: Checkpoint, name: str, shape: Shape | None) -> str | None:
    """The stored name of an output embedding that the configuration says is tied, as most models call them."""
    component, _, leaf = name.rpartition("/")
    if not leaf.endswith(_OUTPUTS):
        return None
    found = [
        other
        for other, slot in checkpoint.items()
        if other.endswith(_INPUTS)
        and other.rpartition("/")[0] == component
        and (shape is None or sorted(slot.shape) == sorted(shape))
    ]
    return found[0] if len(found) == 1 and _says_tied(checkpoint.config(found[0])) else None


def _says_tied(config: Mapping[str, Any]) -> bool:
    """Whether a configuration, or the text's within it, says that embeddings are tied, and none says otherwise.

    Where it says nothing the library's default decides, which differs by model.
    """
    parts = [config, *(part for name in _TEXT_PARTS if isinstance(part := config.get(name), dict))]
    return {bool(part["tie_word_embeddings"]) for part in parts if "tie_word_embeddings" in part} == {True}


@dataclass(frozen=True)
class Library:
    """A model as transformers loads it.

    Attributes:
        shapes: name in memory -> shape of a parameter or a stored buffer; tied ones have several names.
        first: name in memory -> the first name of the same tensor.
        saved: name in the checkpoint -> tensor.
        transposed: modules that say that their stacked matrices are [in, out].
        linear: torch's linear layers.
    """

    shapes: Mapping[str, Shape]
    first: Mapping[str, str]
    saved: Mapping[str, SavedTensor]
    transposed: frozenset[str] = frozenset()
    linear: tuple[str, ...] = ()

    @classmethod
    def of_model(cls, model: Any) -> Library:
        """The library's view of a torch module."""
        own = model.state_dict(keep_vars=True)
        seen: dict[int, str] = {}
        first = {name: seen.setdefault(id(tensor), name) for name, tensor in own.items()}
        saved = {tensor.name: tensor for tensor in saved_tensors(model)}
        transposed = frozenset(name for name, part in model.named_modules() if getattr(part, "is_transposed", False))
        linear = tuple(name for name, part in model.named_modules() if type(part).__name__ == "Linear")
        return cls({name: tuple(tensor.shape) for name, tensor in own.items()}, first, saved, transposed, linear)

    @cached_property
    def saved_shapes(self) -> dict[str, Shape]:
        """Name in the checkpoint -> shape."""
        return {name: tensor.shape for name, tensor in self.saved.items()}

    @cached_property
    def stored(self) -> dict[str, list[tuple[SavedTensor, View]]]:
        """First name in memory -> the saved tensors that hold its elements, and which."""
        stored: dict[str, list[tuple[SavedTensor, View]]] = {}
        for tensor in self.saved.values():
            for weight, view in tensor.parts or ():
                stored.setdefault(self.first[weight], []).append((tensor, view))
        return stored

    @cached_property
    def tied(self) -> set[str]:
        """First names of tensors that have several."""
        return {first for name, first in self.first.items() if name != first}


def library_of(folder: Path) -> Library | None:
    """The model of a folder; None if it is no model of transformers' own classes, or transformers is missing."""
    file = folder / "config.json"
    try:
        file.stat()
        config = read_json(file)
        if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
            return None
        return _library(_Configured(json.dumps(config, sort_keys=True), folder))
    except (OSError, ImportError, RecursionError):
        return None


@dataclass(frozen=True)
class _Configured:
    """What a config.json says, and one of the folders that have it: a base and its fine-tune have the same."""

    text: str
    folder: Path = field(compare=False)


@lru_cache(maxsize=4)
def _library(configured: _Configured) -> Library | None:
    from shiradelta.models.empty import build_empty

    model = build_empty(configured.folder, json.loads(configured.text))
    return None if model is None else Library.of_model(model)


class _Loaded:
    """A folder's tensors under the names that the library gives them."""

    def __init__(self, library: Library, checkpoint: Checkpoint, prefix: str) -> None:
        self._library, self._prefix = library, prefix
        self._there = {
            name[len(prefix) :]: shape for name, shape in checkpoint.shapes.items() if name.startswith(prefix)
        }
        self._saved = find_names(library.saved_shapes, self._there).names

    @cached_property
    def _in_memory(self) -> dict[str, str]:
        """Names in memory under which the folder has tensors -> its names."""
        return find_names(self._library.shapes, self._there).names

    def find(self, wanted: Named, found: FoundInBase) -> None:
        """Adds to a result what the library finds."""
        bare = {name[len(self._prefix) :]: shape for name, shape in wanted.items()}
        memory = find_names(bare, self._library.shapes).names
        saved = find_names(bare, self._library.saved_shapes).names
        for name in bare:
            full = self._prefix + name
            if name in memory:
                self._add(full, memory[name], found)
            elif name in saved:
                self._add_saved(full, self._library.saved[saved[name]], found)
            if full in found.names or full in found.converted:
                found.unclear.pop(full, None)

    def turned(self, wanted: Mapping[str, tuple[str, Shape]]) -> dict[str, Converted]:
        """Finds tensors that the folder has with two dimensions exchanged, where the library reads both forms.

        Args:
            wanted: wanted name -> (the folder's name, the wanted shape).
        """
        saved = {self._prefix + there: self._library.saved[name] for name, there in self._saved.items()}
        result = {}
        for name, (there, shape) in wanted.items():
            tensor = saved.get(there)
            turned = None if tensor is None else tensor.turned
            if tensor is None or turned is None or not turned.parts:
                continue
            view, stored = turned.parts[0][1], self._there[there[len(self._prefix) :]]
            if (shape, stored) == (tensor.shape, turned.shape):
                result[name] = Converted(shape, (replace(view, name=there),))
            elif (shape, stored) == (turned.shape, tensor.shape):
                result[name] = Converted(shape, (view.reversed(there, stored),))
        return result

    def shared(self) -> dict[str, list[str]]:
        """As `shared_tensors`; a name that is stored as well has a tensor of its own."""
        shared: dict[str, list[str]] = {}
        for first in self._library.tied:
            names = [name for name, other in self._library.first.items() if other == first]
            stored = [name for name in names if name in self._in_memory] or [first]
            found = FoundInBase()
            self._add(first, first, found)
            others = [self._prefix + name for name in names if name not in stored]
            if first in found.names and others:
                shared[found.names[first]] = others
        return shared

    def _add_saved(self, wanted: str, tensor: SavedTensor, found: FoundInBase) -> None:
        """Adds where the folder has a tensor of the library's checkpoint, if it was saved as it is in memory."""
        parts = [(self._in_memory.get(weight), view) for weight, view in tensor.parts or ()]
        if tensor.renamed is not None and parts[0][0] is not None:
            found.names[wanted] = self._prefix + parts[0][0]
        elif parts and all(there is not None for there, _ in parts):
            views = [
                view.reversed(self._prefix + there, self._library.shapes[weight])
                for (there, view), (weight, _) in zip(parts, tensor.parts or (), strict=True)
                if there is not None
            ]
            found.converted[wanted] = Converted(tensor.shape, tuple(views))

    def _add(self, wanted: str, name: str, found: FoundInBase) -> None:
        """Adds where a tensor in memory is stored."""
        first = self._library.first[name]
        stored = [(tensor, view) for tensor, view in self._library.stored.get(first, []) if tensor.name in self._saved]
        same = [self._saved[tensor.name] for tensor, _ in stored if tensor.renamed is not None]
        if same:
            found.names[wanted] = self._prefix + same[0]
            if first in self._library.tied and not find_names({name: None}, {same[0]: None}).names:
                found.tied[wanted] = found.names[wanted]
        elif sum(view.weight.numel for _, view in stored) == math.prod(self._library.shapes[name]):
            views = tuple(replace(view, name=self._prefix + self._saved[view.name]) for _, view in stored)
            found.converted[wanted] = Converted(self._library.shapes[name], views)
