"""LoRA and its kin (AdaLoRA, LoHa, LoKr, DoRA), from PEFT's folders and files: delta = scale * B A or similar."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from shiradelta.errors import SourceError
from shiradelta.format.arithmetic import Float32, to_float32
from shiradelta.format.registry import ADD_DTYPES
from shiradelta.models.checkpoint import Checkpoint
from shiradelta.models.library import Converted, shared_tensors
from shiradelta.models.names import Named
from shiradelta.select.topk import Rows, row_shape
from shiradelta.util.text import count

from . import dora, lora_on_base, lycoris
from .base_names import BaseTensors, find_tensors
from .differences import change_of, dense_names
from .item import Item, Skipped, SkipReason, Source, not_addable
from .lora_converted import Change, add_converted, rescaled
from .lora_keys import (
    TRAINING,
    Module,
    find_attention,
    find_halves,
    has_adapter_name,
    parse_key,
    refuse_unmerged,
    sort_keys,
)
from .lora_parameters import find_parameters, stacked_rows
from .lora_scale import Scale, number
from .lora_tied import TiedModules
from .lora_whole import add_whole
from .orientation import Weight, find_transposed
from .peft_config import check_parts, quantised_base
from .sources import SourceFiles, source

HALF = Skipped(
    SkipReason.PARTS, "is half of the change of an nn.MultiheadAttention, of which PEFT saves in_proj and out_proj"
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
    order=17,
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
    modules, alpha_keys, others = sort_keys(source)
    training = [key for key in others if TRAINING.search(key)]
    others = {key: name for key, name in others.items() if key not in training}
    for module, parts in modules.items():
        if parts.bias_of is None:
            check_parts(scale.config(module), parts.keys, next(iter(parts.keys.values())), scale.where)
            scale.check_magnitudes(module, parts.magnitudes is not None)
            scale.check_bias(module, f"{module}.bias" in modules and modules[f"{module}.bias"].bias_of == module)
    on_base = {module: parts for module, parts in modules.items() if lora_on_base.method_of(parts.keys) is not None}
    modules = {module: parts for module, parts in modules.items() if module not in on_base}
    modules = find_parameters(modules, scale, source, base)
    alphas = {module: _alpha(source, key) for module, key in alpha_keys.items()}
    shapes: dict[str, tuple[int, ...]] = {}
    halves = find_halves(modules, base or ())
    for module, parts in modules.items():
        found = HALF if module in halves else _shape(source, parts, scale.of_peft(module))
        if isinstance(found, Skipped):
            result.skipped[module] = found
        else:
            shapes[module] = found
    no_alpha = [
        module
        for module in shapes
        if modules[module].bias_of is None
        and _rank(source, module, modules[module], scale)
        and scale.alpha_of(module, alphas.get(module)) is None
    ]
    if no_alpha:
        result.warnings.append(
            f"no alpha for {len(no_alpha)} of {count(shapes, 'module')}; the rank is taken for it, so the scale is 1;"
            " --alpha sets another"
        )
    attention = find_attention(modules)
    tensors = {module: _tensor(module, modules[module], module in attention) for module in shapes}
    if attention:
        result.warnings.append(
            f"{min(attention)}.out_proj changes by twice its factors' product, as PEFT 0.21 runs and merges it"
        )
    differences = dense_names(others)
    others |= differences
    called = {tensor: [module, *modules[module].all_keys] for module, tensor in tensors.items()}
    called |= {f"{module}.weight": [module, *parts.all_keys] for module, parts in on_base.items()}
    for key, name in others.items():
        called.setdefault(name, []).append(key)
    wanted = dict.fromkeys(called)
    wanted |= {name: source[key].shape for key, name in others.items()}
    wanted |= {tensors[module]: shape for module, shape in shapes.items()}
    there = _tensors(source, tensors, wanted, base, lambda name: files.may_lack(name, *called[name]))
    names = there.found
    result.skipped |= {module: there.lacking[tensor] for module, tensor in tensors.items() if tensor in there.lacking}
    matched = {module: names[tensor] for module, tensor in tensors.items() if tensor in names}
    converted = {module: there.converted[tensor] for module, tensor in tensors.items() if tensor in there.converted}
    weights = _weights(matched, converted, tensors, base)
    changing = {module: modules[module] for module in weights if modules[module].stack is None}
    swapped = find_transposed(changing, shapes, scale, weights, base, result)
    for module in swapped:
        if lycoris.is_lycoris(modules[module].keys):
            why = "the base stores it as [in, out], which is not supported for LoHa and LoKr; merge it first"
            result.skipped[module] = Skipped(SkipReason.UNSUPPORTED, why)
    changed = [module for module in weights if module not in result.skipped]
    factors = {
        module: _factor(source, module, modules[module], scale, alphas.get(module))
        for module in shapes
        if modules[module].bias_of is None
    }
    factors |= {module: factors.get(of, 0.0) for module in shapes if (of := modules[module].bias_of) is not None}
    factors |= {module: 2 * factors[module] for module in attention.values() if module in factors}
    asks = bool(others) or any(parts.embedding for parts in modules.values())
    shared = shared_tensors(base) if base is not None and asks else {}
    tied = TiedModules(source, modules, factors, tensors, there.tied, shared, scale)
    for module in [module for module in changed if module in matched]:
        item = _item(source, modules[module], shapes[module], matched[module], base, factors[module], module in swapped)
        skipped = item if isinstance(item, Skipped) else tied.add(module, item)
        if skipped is not None:
            result.skipped[module] = skipped
    result.items += tied.items
    result.warnings += tied.warnings
    both = {module: (alphas.get(module), scale.alpha_of(module, alphas.get(module))) for module in on_base}
    lora_on_base.add(source, {module: parts.keys for module, parts in on_base.items()}, both, there, base, result)
    if base is not None:
        changes: dict[str, Change] = {}
        for module in [module for module in changed if module in converted]:
            swap, lengths = module in swapped, modules[module].magnitudes
            change = _change(source, modules[module], shapes[module], factors[module], swap)
            made: Change | Skipped = change
            if lengths is not None:
                made = rescaled(module, change, converted[module], base, source, lengths, swap)
            if isinstance(made, Skipped):
                result.skipped[module] = made
            else:
                changes[module] = made
        apart = {
            key: there.converted[name]
            for key, name in differences.items()
            if name in there.converted and source[key].dtype.name in ADD_DTYPES
        }
        others = {key: name for key, name in others.items() if key not in apart}
        changes |= {key: change_of(source, key) for key in apart}
        add_converted(changes, converted | apart, base, result)
    if base is None or result.items:  # without any match the base is another model
        add_whole(source, others, set(differences), names, scale, base, result, there.tied, shared)
    lone = Skipped(SkipReason.EMPTY, "an alpha without factors")
    result.skipped |= {key: lone for module, key in alpha_keys.items() if module not in {*modules, *on_base}}
    result.skipped |= dict.fromkeys(training, Skipped(SkipReason.EMPTY, "PEFT uses it in training only"))
    for module in modules.keys() & result.skipped.keys():
        lost = result.skipped[module].called(
            *modules[module].all_keys, tensors.get(module, f"{module}.weight"), matched.get(module)
        )
        if module in shapes and modules[module].magnitudes is None:
            change = _change(source, modules[module], shapes[module], factors[module], False)
            lost = lost.of_change(change.rows, change.shape)
        result.skipped[module] = lost
    return result


def _tensor(module: str, parts: Module, attention: bool) -> str:
    """The name of the tensor that a module changes."""
    if parts.stack is not None or parts.bias_of is not None:
        return module
    return f"{module}.{'in_proj_' if attention else ''}weight"


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


def _change(source: Checkpoint, parts: Module, shape: tuple[int, ...], factor: float, swap: bool) -> Change:
    """The change of a module by itself: in the factors' own order of dimensions, or transposed."""
    shape = shape[::-1] if swap else shape
    return Change(partial(_dense(parts), source, parts, factor, swap, shape), shape)


def _dense(parts: Module) -> Callable[[Checkpoint, Module, float, bool, tuple[int, ...]], Rows]:
    """The function that opens the change of a module."""
    if parts.stack is not None:
        return _stacked
    if parts.bias_of is not None:
        return _bias
    return _lycoris if lycoris.is_lycoris(parts.keys) else _product


def _alpha(source: Checkpoint, key: str) -> float:
    """The number in a module's alpha tensor, of any dtype."""
    slot, bits = source[key], source.bits(key)
    if not bits.size:
        raise SourceError(f"{source.root}: {key!r} is empty; get the file again")
    if slot.dtype.name in ADD_DTYPES:
        value = to_float32(bits, slot.dtype.name)[0]
    elif slot.dtype.name == "float64" or "int" in slot.dtype.name:
        value = bits.view(slot.dtype.name)[0]
    else:
        raise SourceError(f"{source.root}: {key!r} is {slot.dtype.name}, which is not a number; give --alpha")
    return number(value.item(), f"{source.root}: {key!r}")


def _factor(source: Checkpoint, module: str, parts: Module, scale: Scale, alpha: float | None) -> float:
    """The factor on the product of a module's factors."""
    if "E" in parts.keys:
        factor = scale.adaptive(module)
    else:
        rank = _rank(source, module, parts, scale)
        factor = 1.0 if rank is None else scale(module, rank, alpha)
    if abs(factor) > float(np.finfo(np.float32).max):
        raise SourceError(f"{module}: a scale of {factor:g} is beyond float32; give --alpha")
    return factor


def _rank(source: Checkpoint, module: str, parts: Module, scale: Scale) -> int | None:
    """What a module's alpha is divided by; None for a LoKr of whole factors, which has no scale."""
    if lycoris.is_lycoris(parts.keys):
        return lycoris.rank(source, parts.keys) or scale.whole_rank(module)
    experts = 1 if parts.stack is None else parts.stack.experts
    return source[parts.keys["A"]].shape[0] // experts


def _shape(source: Checkpoint, parts: Module, of_peft: bool) -> tuple[int, ...] | Skipped:
    """The shape of the product of the factors, or the reason to skip it."""
    others = lycoris.is_lycoris(parts.keys)
    if parts.magnitudes is not None and "E" in parts.keys:
        return Skipped(SkipReason.UNSUPPORTED, "has AdaLoRA's singular values and a DoRA's magnitudes")
    if not others and set(parts.keys) - {"E", "mid", "bias"} != (set() if parts.bias_of else {"A", "B"}):
        return Skipped(SkipReason.PARTS, f"only {' '.join(parts.keys)} of A and B is there")
    for key in parts.keys.values():
        if source[key].dtype.name not in ADD_DTYPES:
            raise SourceError(
                f"{source.root}: {key!r} is {source[key].dtype.name}; LoRA factors are {', '.join(ADD_DTYPES)}"
            )
    if parts.stack is not None:
        if parts.magnitudes is not None:
            return Skipped(SkipReason.UNSUPPORTED, "is a DoRA of a parameter by its name, which PEFT does not make")
        return parts.stack.shape
    if others:
        if of_peft and "lokr_w2" in parts.keys and len(source[parts.keys["lokr_w2"]].shape) == 3:
            return Skipped(
                SkipReason.UNSUPPORTED,
                "PEFT takes the dimensions of a one-dimensional convolution's LoKr in another order; merge it first",
            )
        return lycoris.matrix_shape(source, parts.keys)
    if parts.bias_of is not None:
        return source[parts.keys["bias"]].shape
    a, b = source[parts.keys["A"]].shape, source[parts.keys["B"]].shape
    core = source[parts.keys["mid"]].shape if "mid" in parts.keys else None
    if core is not None and (len(core) < 3 or core[:2] != (b[1:2] + a[:1]) or math.prod(a[2:]) != 1):
        return Skipped(SkipReason.PARTS, f"shapes {list(b)}, {list(core)} and {list(a)} do not multiply")
    if not 2 <= len(b) <= len(a) <= 5 or a[0] != b[1] or not a[0]:
        return Skipped(SkipReason.PARTS, f"shapes {list(b)} and {list(a)} do not multiply")
    if "E" in parts.keys and source[parts.keys["E"]].numel != a[0]:
        return Skipped(SkipReason.PARTS, f"E has {count(source[parts.keys['E']].numel, 'value')} for rank {a[0]}")
    if math.prod(b[2:]) != 1:
        return Skipped(SkipReason.PARTS, f"B of shape {list(b)} is not a 1 x 1 convolution")
    return (b[0], *a[1:]) if core is None else (b[0], a[1], *core[2:])


def _tensors(
    source: Checkpoint,
    tensors: Mapping[str, str],
    wanted: Named,
    base: Checkpoint | None,
    may_lack: Callable[[str], bool],
) -> BaseTensors:
    """As `find_tensors`; keeps the source's names of modules' weights without a base."""
    if base is not None:
        return find_tensors(wanted, base, may_lack)
    mangled = [module for module in tensors if "." not in module and "_" in module]
    if mangled:
        raise SourceError(
            f"{source.root}: {mangled[0]!r} has underscores for dots, so its tensor is unknown; give --base MODEL"
        )
    return BaseTensors({tensor: tensor for tensor in tensors.values()})


def _item(
    source: Checkpoint,
    parts: Module,
    shape: tuple[int, ...],
    name: str,
    base: Checkpoint | None,
    factor: float,
    swap: bool,
) -> Item | Skipped:
    """The dense delta of one module, or the reason to skip it."""
    others = lycoris.is_lycoris(parts.keys)
    change = _change(source, parts, shape, factor, swap)
    shape, dense = change.shape, change.rows
    if base is None:
        return Item(name, shape, "unspecified", dense) if parts.magnitudes is None else dora.NEEDS_BASE
    if others and _is_flat(shape, base[name].shape):
        shape = base[name].shape
        dense = partial(_lycoris, source, parts, factor, swap, shape)
    slot = base[name]
    if slot.shape != shape:
        why = f"it changes a tensor of shape {list(shape)}, the base's {name!r} has {list(slot.shape)}"
        remedy = "give the base that it was trained on, or merge it there and convert the merged model"
        return Skipped(SkipReason.PARTS, f"{why}; {remedy}")
    item = Item(name, shape, slot.dtype.name, dense, base_bits=partial(base.bits, name))
    if (refused := not_addable(name, slot)) is not None or parts.magnitudes is None:
        return refused or item
    return dora.changed(item, source, parts.magnitudes, swap)


@lycoris.no_remarks
def _product(source: Checkpoint, parts: Module, factor: float, swap: bool, shape: tuple[int, ...]) -> Rows:
    """factor * B A (transposed if `swap`), a few rows at a time."""
    rank = source[parts.keys["A"]].shape[0]
    b, a = (to_float32(source.bits(key), source[key].dtype.name) for key in (parts.keys["B"], parts.keys["A"]))
    left, right = b.reshape(-1, rank), a.reshape(rank, -1)
    if "mid" in parts.keys:
        core = source[parts.keys["mid"]]
        bits = source.bits(parts.keys["mid"])
        right = lycoris.through(to_float32(bits, core.dtype.name).reshape(core.shape), right)
    if "E" in parts.keys:  # AdaLoRA's singular values
        right = right * to_float32(source.bits(parts.keys["E"]), source[parts.keys["E"]].dtype.name).reshape(rank, 1)
    if swap:
        left, right = right.T, left.T
    scaled: Float32 = np.ascontiguousarray(left) * np.float32(factor)
    right = np.ascontiguousarray(right)

    @lycoris.no_remarks
    def product(start: int, stop: int) -> Float32:
        made: Float32 = scaled[start:stop] @ right
        return made

    return lycoris.in_rows(product, right.shape[1], shape)


def _bias(source: Checkpoint, parts: Module, factor: float, swap: bool, shape: tuple[int, ...]) -> Rows:
    """factor * what is added to a bias."""
    key = parts.keys["bias"]
    bits = source.bits(key)
    if not bits.size:
        raise SourceError(f"{source.root}: {key!r} has no elements; get the file again")
    with np.errstate(over="ignore", invalid="ignore"):
        change = to_float32(bits, source[key].dtype.name).reshape(row_shape(shape)) * np.float32(factor)
    return lambda start, stop: change[start:stop]


def _stacked(source: Checkpoint, parts: Module, factor: float, swap: bool, shape: tuple[int, ...]) -> Rows:
    """factor * the change of a parameter that PEFT adapts by name."""
    assert parts.stack is not None
    return stacked_rows(source, parts, parts.stack, factor)


def _lycoris(source: Checkpoint, parts: Module, factor: float, swap: bool, shape: tuple[int, ...]) -> Rows:
    """factor * the change of a LoHa or LoKr, a few rows at a time."""
    return lycoris.in_rows(lycoris.matrix_rows(source, parts.keys, factor), math.prod(shape[1:]), shape)


def _is_flat(matrix: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether a matrix is a convolution of that shape with its trailing dimensions flat."""
    return len(shape) > 2 and matrix == (shape[0], math.prod(shape[1:]))
