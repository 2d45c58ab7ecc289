"""Adapters of PEFT that no other layout reads: PEFT's own merge, a layer at a time.

transformers builds the base's model without weights, and its parameters become maps of the base's files.  PEFT adds its
layers and loads the adapter as it would to run it.  Then the layers are merged one by one, each in a copy in float32.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shiradelta.errors import SourceError
from shiradelta.format.arithmetic import Float32, to_float32
from shiradelta.format.registry import ADD_DTYPES
from shiradelta.io.recognise import Wanted
from shiradelta.models.checkpoint import Checkpoint, open_checkpoint
from shiradelta.models.library import shared_tensors
from shiradelta.models.peft import CONFIG, PICKLED_WEIGHTS, WEIGHTS, unwrap
from shiradelta.models.safetensors import Slot
from shiradelta.select.topk import Rows, blocks, row_shape
from shiradelta.util.json_files import read_json
from shiradelta.util.optional import importing
from shiradelta.util.text import brief

from .base_names import find_tensors
from .item import CONVERTED, NO_TARGET, Item, Skipped, SkipReason, Source, not_addable
from .peft_config import MERGE, TYPES, type_of
from .peft_folder import find_weights
from .sources import SourceFiles, source

if TYPE_CHECKING:
    from torch import nn

#: Types that PEFT has no merge for -> why.
_NO_WEIGHTS = {
    "XLORA": "mixes adapters by the text",
    "POLY": "mixes factors by the task",
    "LILY": "has factors that depend on the input",
    "SHADOW": "runs a second network beside the model",
    "ADAPTION_PROMPT": "adds tokens to the attention",
}
#: How PEFT names types; another name is refused where its own layouts are read.
_TYPE = re.compile(r"[A-Z0-9_]{1,40}")
#: The largest number in a configuration that is no seed; ranks and counts of frequencies are thousands at most.
_MOST = 1 << 16


def _config_of(path: Path) -> tuple[Path, Mapping[str, Any]]:
    """PEFT's configuration of a folder, or beside a file of a folder's weights; empty if there is none."""
    folder = path.parent if path.name in (WEIGHTS, PICKLED_WEIGHTS) else path
    where = folder / CONFIG
    about = read_json(where) if where.is_file() else {}
    return where, about if isinstance(about, dict) else {}


def _recognises(files: SourceFiles) -> bool:
    kind = type_of(_config_of(files.path)[1])
    return kind is not None and kind not in TYPES and _TYPE.fullmatch(kind) is not None


@source(
    "peft",
    "Any other adapter that PEFT can merge (OFT, IA3, VeRA, ...): by its own code; it needs peft and the base.",
    _recognises,
    order=10,
)
def open_peft(files: SourceFiles) -> Source:
    """The changes of all layers that PEFT wraps."""
    where, about = _config_of(files.path)
    kind, base, result = type_of(about), files.base, Source()
    if kind is None:
        raise SourceError(f"{files.path}: has no {CONFIG} with a type of PEFT's; give an adapter's folder")
    if kind in _NO_WEIGHTS:
        raise SourceError(f"{where}: is of type {kind}, which {_NO_WEIGHTS[kind]}; no change of weights does the same")
    if base is None:
        raise SourceError(
            f"{where}: is of type {brief(kind, 80)}, which PEFT itself has to merge, for which it needs the base; give"
            " --base MODEL"
        )
    layers = _Layers(where, about, base, open_checkpoint(find_weights(where.parent), Wanted.SOURCE))
    shared = shared_tensors(base)
    taken: set[str] = set()
    for path in layers.paths:
        for name, shape in layers.changed(path):
            found = layers.names.get(name)
            if name in layers.converted:
                result.add(name, CONVERTED)
            elif found is None:
                result.add(name, NO_TARGET)
            elif found in taken or found in shared or name in layers.tied:
                why = (
                    f"the base shares {found!r} with other layers, which would change too; untie them in the base first"
                )
                result.add(name, Skipped(SkipReason.CONFLICT, why, names=(found,)))
            else:
                taken.add(found)
                slot = base[found]
                dense = partial(layers.rows, path, name.removeprefix(f"{path}."))
                item = Item(found, shape, slot.dtype.name, dense, base_bits=partial(base.bits, found))
                result.add(name, not_addable(found, slot) or item)
    return result


class _Layers:
    """The layers that PEFT wraps, in a model whose parameters are maps of the base's files.

    Attributes:
        paths: their names in the model.
        names: a parameter's name in the model -> the base's tensor.
        tied: names of parameters that the base ties to others.
        converted: names of parameters that the base stores in another form.

    Raises:
        SourceError: PEFT or transformers cannot build them, or a part of the adapter has no place in them.
    """

    def __init__(self, where: Path, about: Mapping[str, Any], base: Checkpoint, adapter: Checkpoint) -> None:
        with importing(f"{where}: a conversion by PEFT's own merge"):
            import peft
            import torch
            from peft.tuners.tuners_utils import BaseTunerLayer
            from peft.utils.save_and_load import set_peft_model_state_dict

            from shiradelta.models.empty import bounded, build_empty

        self._where, self._base, self._version = where, base, peft.__version__
        config = self._config(about)
        folder = base.root if base.root.is_dir() else base.root.parent
        settings = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        model = build_empty(folder, settings) if isinstance(settings, dict) and settings else None
        if model is None:
            raise SourceError(f"{folder}: transformers cannot build its model, which PEFT needs to merge; {MERGE}")
        own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        there = find_tensors(dict(own), base, lambda name: True)
        self.names, self.tied, self.converted = there.found, there.tied, there.converted
        mapped = {name: _mapped(base[found]) for name, found in there.found.items() if base[found].shape == own[name]}
        state = {key: _mapped(slot) for key, slot in adapter.items()}
        with warnings.catch_warnings(), torch.random.fork_rng([]):
            warnings.simplefilter("ignore")
            try:
                model.load_state_dict(mapped, strict=False, assign=True)
                with bounded():
                    wrapped = peft.PeftModel(model, config)
                trained: dict[int, list[str]] = {}  # several names may be one parameter
                for name, parameter in wrapped.named_parameters(remove_duplicate=False):
                    if parameter.requires_grad:
                        trained.setdefault(id(parameter), []).append(name)
                loaded = set_peft_model_state_dict(wrapped, state)
                wrapped.eval()
            except Exception as error:  # whatever PEFT makes of an adapter that is not for this model
                raise self._failed("load", error) from None
        placeless = [*loaded.unexpected_keys, *(key for key in state if unwrap(key) in own)]
        missing = set(loaded.missing_keys)
        lacking = [names[0] for names in trained.values() if missing.issuperset(names)]
        if placeless or lacking:
            what = f"{brief(repr(placeless[0]), 120)} has no place" if placeless else f"{lacking[0]!r} is lacking"
            raise SourceError(f"{where.parent}: {what} in the layers that PEFT {peft.__version__} makes; {MERGE}")
        found = [(path, layer) for path, layer in wrapped.base_model.model.named_modules()]
        self._layers = {path: layer for path, layer in found if isinstance(layer, BaseTunerLayer)}
        self.paths = list(self._layers)

    def _config(self, about: Mapping[str, Any]) -> Any:
        """PEFT's configuration object.

        Raises:
            SourceError: PEFT does not know it, or it changes no weights, or more than layers.
        """
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        kind = type_of(about)
        known = {str(getattr(each, "value", each)): each for each in PEFT_TYPE_TO_CONFIG_MAPPING}
        if kind not in known:
            raise SourceError(f"{self._where}: PEFT {self._version} knows no type {brief(str(kind), 80)}; upgrade peft")
        large = [key for key, value in about.items() if _is_large(key, value)]
        if large:
            raise SourceError(f"{self._where}: {brief(repr(large[0]), 80)} has a number of no adapter; get it again")
        for key in ("modules_to_save", "megatron_config", "trainable_token_indices"):
            if about.get(key):
                raise SourceError(f"{self._where}: sets {key} in an adapter of type {kind}; {MERGE}")
        try:
            config = PEFT_TYPE_TO_CONFIG_MAPPING[known[kind]](**{**about, "inference_mode": False})
        except Exception as error:
            raise self._failed("read its configuration", error) from None
        if config.is_prompt_learning or config.is_adaption_prompt:
            raise SourceError(
                f"{self._where}: is of type {kind}, which trains inputs of the model and not its weights; no change of"
                " weights does the same"
            )
        return config

    def _failed(self, what: str, error: Exception) -> SourceError:
        said = brief(f"{type(error).__name__}: {error}".replace("\n", " "), 200)
        return SourceError(f"{self._where.parent}: PEFT {self._version} cannot {what} ({said}); {MERGE}")

    def changed(self, path: str) -> list[tuple[str, tuple[int, ...]]]:
        """(name in the model, shape) of the parameters of a layer that its merge changes.

        A layer's only parameter is taken for changed without a merge, which may be slow, where it is a plain tensor of
        the base.
        """
        inner = dict(self._layers[path].get_base_layer().named_parameters(recurse=False))
        if len(inner) == 1 and path != self.paths[0]:
            name = f"{path}.{next(iter(inner))}"
            if name in self.names and name not in self.converted and name not in self.tied:
                return [(name, self._base[self.names[name]].shape)]
        after = self._merged(path)
        if any(name not in inner or inner[name].shape != parameter.shape for name, parameter in after.items()):
            raise SourceError(f"{self._where.parent}: the merge of {path!r} adds to its parameters; {MERGE}")
        return [
            (f"{path}.{name}", parameter.shape)
            for name, parameter in after.items()
            if any(rows(*block).any() for rows in [self._change(path, name, parameter)] for block in _blocks(parameter))
        ]

    def rows(self, path: str, parameter: str) -> Rows:
        """The change of a parameter of a layer, which is in memory then, once."""
        return self._change(path, parameter, self._merged(path)[parameter])

    def _change(self, path: str, parameter: str, after: Float32) -> Rows:
        """The change of a parameter, given what it is after the merge."""
        found = self.names[f"{path}.{parameter}"]
        bits, dtype = self._base.bits(found), self._base[found].dtype.name
        columns = row_shape(after.shape)[1]
        flat = after.reshape(-1)

        def rows(start: int, stop: int) -> Float32:
            part = slice(start * columns, stop * columns)
            with np.errstate(invalid="ignore", over="ignore"):
                made: Float32 = (flat[part] - to_float32(bits[part], dtype)).reshape(-1, columns)
            return made

        return rows

    def _merged(self, path: str) -> dict[str, Float32]:
        """A layer's own parameters after PEFT has merged it, in float32.

        Raises:
            SourceError: PEFT cannot merge it.
        """
        import torch

        own = self._layers[path].get_base_layer()
        kept = {id(parameter): parameter for parameter in own.parameters(recurse=False)}
        layer: Any = copy.deepcopy(self._layers[path], kept)  # without the weights, which are exchanged at once
        inner: nn.Module = layer.get_base_layer()
        for name, parameter in list(inner.named_parameters(recurse=False)):
            found = self.names.get(f"{path}.{name}")
            if found is None or parameter.device.type == "meta" or self._base[found].dtype.name not in ADD_DTYPES:
                raise SourceError(
                    f"{self._where.parent}: PEFT changes {f'{path}.{name}'!r}, which the base lacks or stores in"
                    f" another form; {MERGE}"
                )
            slot = self._base[found]
            before = to_float32(self._base.bits(found), slot.dtype.name).reshape(slot.shape)
            if not before.flags.writeable:  # a map of the base's file
                before = before.copy()
            setattr(inner, name, torch.nn.Parameter(torch.from_numpy(before), requires_grad=False))
            del before
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            try:
                layer.merge(safe_merge=False)  # without a copy; whoever reads the change checks that it is finite
                merged = dict(layer.get_base_layer().named_parameters(recurse=False))
                return {name: parameter.float().numpy() for name, parameter in merged.items()}
            except Exception as error:  # PEFT's methods without a merge have no error in common
                raise self._failed(f"merge {path!r}", error) from None


def _blocks(parameter: Float32) -> list[tuple[int, int]]:
    return blocks(row_shape(parameter.shape))


def _is_large(key: str, value: object) -> bool:
    return isinstance(value, int | float) and abs(value) > _MOST and "seed" not in key


def _mapped(slot: Slot) -> Any:
    """A tensor of torch whose elements are mapped from a file; what is written to it stays in memory."""
    import torch

    size = slot.dtype.size
    if slot.numel == 0:
        return torch.empty(slot.shape, dtype=getattr(torch, slot.dtype.name))
    kind = f"<i{size}" if size > 1 else "u1"
    if slot.read is None:
        bits = np.asarray(np.memmap(slot.file, kind, "c", slot.offset, slot.numel))
    else:
        bits = slot.read().view(kind).copy()
    return torch.from_numpy(bits).view(getattr(torch, slot.dtype.name)).reshape(slot.shape)
