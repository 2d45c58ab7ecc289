"""LoRA and its kin (AdaLoRA, LoHa, LoKr, DoRA), from PEFT's folders and files: delta = scale * B A or similar.

`lora_modules` reads what a file holds, and `lora_products` computes the change of a module.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial

from shiradelta.errors import SourceError
from shiradelta.format.registry import ADD_DTYPES
from shiradelta.models.checkpoint import Checkpoint
from shiradelta.models.library import Converted, shared_tensors

from . import dora, lora_on_base, lycoris
from .base_names import BaseTensors, find_tensors
from .differences import change_of
from .item import Item, Skipped, SkipReason, Source, not_addable
from .lora_converted import Change, add_converted, rescaled
from .lora_keys import has_adapter_name, parse_key, refuse_unmerged
from .lora_modules import LoraModules, read_modules
from .lora_products import is_flat
from .lora_scale import Scale
from .lora_tied import TiedModules
from .lora_whole import add_whole
from .orientation import Weight, find_transposed
from .peft_config import quantised_base
from .sources import SourceFiles, source

_LYCORIS_SWAPPED = Skipped(
    SkipReason.UNSUPPORTED,
    "the base stores it as [in, out], which is not supported for LoHa and LoKr; merge it first",
)


def _recognises(files: SourceFiles) -> bool:
    refuse_unmerged(files.checkpoint)
    keys = files.checkpoint
    return any(parse_key(key) or has_adapter_name(key) or dora.parse_key(key) for key in keys) or bool(
        lora_on_base.parse_keys(keys)
    )


@source(
    "lora",
    "A LoRA or its kin (AdaLoRA, LoHa, LoKr, DoRA, GLoRA, OFT, ...): PEFT's folder, or a file of PEFT, kohya, LyCORIS"
    " or diffusers.",
    _recognises,
    options=["alpha"],
    order=18,
)
def open_lora(files: SourceFiles, alpha: float | None = None) -> Source:
    """All LoRA modules of a file, and the tensors that it saves whole."""
    refuse_unmerged(files.checkpoint)
    scale = Scale.of(files.checkpoint, alpha)
    result = read_lora(files.checkpoint, files, scale)
    result.warnings += quantised_base(scale.configs)
    return result


def read_lora(source: Checkpoint, files: SourceFiles, scale: Scale) -> Source:
    """The LoRA of a checkpoint with PEFT's or kohya's names.

    Args:
        source: the factors, under such names.
        files: the base, and what may be left out.
        scale: the factors on their products.
    """
    base, result = files.base, Source()
    lora = read_modules(source, scale, base, result)
    there = _find(lora, files)
    tensors = lora.tensors.items()
    result.skipped |= {module: there.lacking[tensor] for module, tensor in tensors if tensor in there.lacking}
    matched = {module: there.found[tensor] for module, tensor in tensors if tensor in there.found}
    converted = {module: there.converted[tensor] for module, tensor in tensors if tensor in there.converted}
    swapped = _swapped(lora, _weights(matched, converted, lora.tensors, base), base, result)
    tied_may_matter = bool(lora.others) or any(parts.embedding for parts in lora.modules.values())
    shared = shared_tensors(base) if base is not None and tied_may_matter else {}
    tied = TiedModules(source, lora.modules, lora.factors, lora.tensors, there.tied, shared, scale)
    _add_matched(lora, matched, swapped, tied, base, result)
    on_base = {module: parts.keys for module, parts in lora.on_base.items()}
    both = {module: ((own := lora.alphas.get(module)), scale.alpha_of(module, own)) for module in on_base}
    lora_on_base.add(source, on_base, both, there, base, result)
    others = dict(lora.others)
    if base is not None:
        apart = _add_elsewhere(lora, converted, swapped, there, base, result)
        others = {key: name for key, name in others.items() if key not in apart}
    if base is None or result.items:  # without any match the base is another model
        add_whole(source, others, lora.differences, there.found, scale, base, result, there.tied, shared)
    _explain(lora, matched, result)
    return result


def _find(lora: LoraModules, files: SourceFiles) -> BaseTensors:
    """The base's tensors that a LoRA changes; the source's names of modules' weights without a base."""
    if files.base is not None:
        called = lora.called
        return find_tensors(lora.wanted, files.base, lambda name: files.may_lack(name, *called[name]))
    mangled = [module for module in lora.tensors if "." not in module and "_" in module]
    if mangled:
        raise SourceError(
            f"{lora.source.root}: {mangled[0]!r} has underscores for dots, so its tensor is unknown; give --base MODEL"
        )
    return BaseTensors({tensor: tensor for tensor in lora.tensors.values()})


def _weights(
    matched: Mapping[str, str], converted: Mapping[str, Converted], tensors: Mapping[str, str], base: Checkpoint | None
) -> dict[str, Weight]:
    """What the base says of modules' weights: those stored as they are, and those stored in another form."""
    if base is None:
        return {module: Weight(name, None, {}) for module, name in matched.items()}
    found = {module: Weight(name, base[name].shape, base.config(name)) for module, name in matched.items()}
    return found | {
        module: Weight(tensors[module], stored.shape, base.config(stored.views[0].name))
        for module, stored in converted.items()
    }


def _swapped(
    lora: LoraModules, weights: Mapping[str, Weight], base: Checkpoint | None, result: Source
) -> Collection[str]:
    """The modules whose change is transposed."""
    changing = {module: lora.modules[module] for module in weights if lora.modules[module].stack is None}
    swapped = find_transposed(changing, lora.shapes, lora.scale, weights, base, result)
    of_lycoris = [module for module in swapped if lycoris.is_lycoris(lora.modules[module].keys)]
    result.skipped |= dict.fromkeys(of_lycoris, _LYCORIS_SWAPPED)
    return swapped


def _add_matched(
    lora: LoraModules,
    matched: Mapping[str, str],
    swapped: Collection[str],
    tied: TiedModules,
    base: Checkpoint | None,
    result: Source,
) -> None:
    """Adds the changes of weights that the base stores as they are."""
    for module, name in matched.items():
        if module in result.skipped:
            continue
        item = _item(lora, module, name, base, module in swapped)
        skipped = item if isinstance(item, Skipped) else tied.add(module, item)
        if skipped is not None:
            result.skipped[module] = skipped
    result.items += tied.items
    result.warnings += tied.warnings


def _item(lora: LoraModules, module: str, name: str, base: Checkpoint | None, swap: bool) -> Item | Skipped:
    """The dense delta of one module, or the reason to skip it."""
    parts, change = lora.modules[module], lora.change(module, swap)
    if base is None:
        plain = parts.magnitudes is None
        return Item(name, change.shape, "unspecified", change.rows) if plain else dora.NEEDS_BASE
    slot = base[name]
    if lycoris.is_lycoris(parts.keys) and is_flat(change.shape, slot.shape):
        change = lora.change(module, shape=slot.shape)
    if slot.shape != change.shape:
        why = f"it changes a tensor of shape {list(change.shape)}, the base's {name!r} has {list(slot.shape)}"
        remedy = "give the base that it was trained on, or merge it there and convert the merged model"
        return Skipped(SkipReason.PARTS, f"{why}; {remedy}")
    item = Item(name, change.shape, slot.dtype.name, change.rows, base_bits=partial(base.bits, name))
    if (refused := not_addable(name, slot)) is not None or parts.magnitudes is None:
        return refused or item
    return dora.changed(item, lora.source, parts.magnitudes, swap)


def _add_elsewhere(
    lora: LoraModules,
    converted: Mapping[str, Converted],
    swapped: Collection[str],
    there: BaseTensors,
    base: Checkpoint,
    result: Source,
) -> Collection[str]:
    """Adds the changes of weights that the base stores in another form; returns the keys of differences among them."""
    changes: dict[str, Change] = {}
    for module in [module for module in converted if module not in result.skipped]:
        change, swap, lengths = (
            lora.change(module, module in swapped),
            module in swapped,
            lora.modules[module].magnitudes,
        )
        made: Change | Skipped = change
        if lengths is not None:
            made = rescaled(module, change, converted[module], base, lora.source, lengths, swap)
        if isinstance(made, Skipped):
            result.skipped[module] = made
        else:
            changes[module] = made
    apart = {
        key: there.converted[lora.others[key]]
        for key in lora.differences
        if lora.others[key] in there.converted and lora.source[key].dtype.name in ADD_DTYPES
    }
    changes |= {key: change_of(lora.source, key) for key in apart}
    add_converted(changes, {**converted, **apart}, base, result)
    return apart.keys()


def _explain(lora: LoraModules, matched: Mapping[str, str], result: Source) -> None:
    """Says of what is skipped how else it is called, and what is lost with it; and of keys that change nothing."""
    lone = Skipped(SkipReason.EMPTY, "an alpha without factors")
    modules = {*lora.modules, *lora.on_base}
    result.skipped |= {key: lone for module, key in lora.alpha_keys.items() if module not in modules}
    result.skipped |= dict.fromkeys(lora.training, Skipped(SkipReason.EMPTY, "PEFT uses it in training only"))
    for module in lora.modules.keys() & result.skipped.keys():
        parts = lora.modules[module]
        tensor = lora.tensors.get(module, f"{module}.weight")
        lost = result.skipped[module].called(*parts.all_keys, tensor, matched.get(module))
        if module in lora.shapes and parts.magnitudes is None:
            change = lora.change(module)
            lost = lost.of_change(change.rows, change.shape)
        result.skipped[module] = lost
