"""LoRA and kin (AdaLoRA, LoHa, LoKr): delta = scale * B A or another product, from PEFT's folders and lone files."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from shiradelta.errors import SourceError
from shiradelta.format.arithmetic import Float32, to_float32
from shiradelta.format.delta import TensorDelta
from shiradelta.models.checkpoint import Checkpoint, read_json, tied_slot
from shiradelta.select.topk import Rows, row_shape

from . import diff, lycoris
from .item import Item, Source, whole_tensor
from .lora_keys import TOKENS, Module, find_tensors, sort_keys
from .lora_scale import CONFIG, TYPES, Scale, check_type, number

_FACTORS = ("float32", "float16", "bfloat16")
#: Models whose layers are stored as [in, out].
_CONV1D = ("gpt2", "gpt", "openai-gpt", "imagegpt")


def adapter_weights(path: Path) -> Path | None:
    """The weights of PEFT's adapter folder, if `path` is one.  Raises SourceError."""
    weights, config = path / "adapter_model.safetensors", path / CONFIG
    if config.exists():
        about = read_json(config)
        check_type(about if isinstance(about, dict) else {}, config, *TYPES, "SHIRA")
        if not weights.exists():
            raise SourceError(f"{path}: has no adapter_model.safetensors; save the adapter as safetensors first")
    return weights if weights.exists() else None


def open_lora(source: Checkpoint, base: Checkpoint | None, alpha: float | None) -> Source:
    """All LoRA modules of a file, and the tensors that it saves whole."""
    result = Source()
    scale = Scale.of(source, alpha)
    modules, alpha_keys, others = sort_keys(source)
    alphas = {module: _alpha(source, key) for module, key in alpha_keys.items()}
    shapes: dict[str, tuple[int, ...]] = {}
    for module, parts in modules.items():
        found = _shape(source, parts, scale.of_peft(module))
        if isinstance(found, str):
            result.skipped[module] = found
        else:
            shapes[module] = found
    untold = [module for module in shapes if scale.told(module, alphas.get(module)) is None]
    if untold:
        result.warnings.append(
            f"nothing tells the alpha of {len(untold)} of {len(shapes)} modules: taken to be their rank, so their"
            " scale is 1; --alpha sets another"
        )
    tensors = {module: f"{module}.weight" for module in shapes}
    differences = {key: parsed[0] for key in others if (parsed := diff.parse_key(key)) and parsed[1] == "dense"}
    others |= differences
    names, lacking = _names(source, tensors, shapes, others, base)
    result.skipped |= {module: lacking[tensor] for module, tensor in tensors.items() if tensor in lacking}
    matched = {module: names[tensor] for module, tensor in tensors.items() if tensor in names}
    swapped = _swapped({m: modules[m] for m in matched}, shapes, scale, matched, base, result)
    taken: set[str] = set()
    for module, name in matched.items():
        factor = _factor(source, module, modules[module], scale, alphas.get(module))
        item = _item(source, modules[module], shapes[module], name, base, factor, module in swapped)
        if isinstance(item, str):
            result.skipped[module] = item
        elif name in taken:
            result.skipped[module] = f"another module changes {name!r} already"
        else:
            result.items.append(item)
            taken.add(name)
    if base is None or taken:  # else it is another model's, and whatever it holds would be new
        _add_whole(source, others, set(differences), names, scale, base, result)
    result.skipped |= {key: "an alpha without factors" for module, key in alpha_keys.items() if module not in modules}
    return result


def _alpha(source: Checkpoint, key: str) -> float:
    """A tensor of one number, of whatever dtype."""
    slot, bits = source[key], source.bits(key)
    if not bits.size:
        raise SourceError(f"{source.root}: {key!r} is empty; get the file again")
    if slot.dtype.name in _FACTORS:
        value = to_float32(bits, slot.dtype.name)[0]
    elif slot.dtype.name == "float64" or "int" in slot.dtype.name:
        value = bits.view(slot.dtype.name)[0]
    else:
        raise SourceError(f"{source.root}: {key!r} is {slot.dtype.name}, which is no number; give --alpha")
    return number(value.item(), f"{source.root}: {key!r}")


def _factor(source: Checkpoint, module: str, parts: Module, scale: Scale, alpha: float | None) -> float:
    """What the product of the factors is multiplied with."""
    if "E" in parts.keys:
        return scale.adaptive(module)
    if not lycoris.is_lycoris(parts.keys):
        return scale(module, source[parts.keys["A"]].shape[0], alpha)
    rank = lycoris.rank(source, parts.keys) or scale.whole_rank(module)
    return 1.0 if rank is None else scale(module, rank, alpha)


def _shape(source: Checkpoint, parts: Module, of_peft: bool) -> tuple[int, ...] | str:
    """Of the product of the factors, or why there is none."""
    others = lycoris.is_lycoris(parts.keys)
    if not others and set(parts.keys) - {"E"} != {"A", "B"}:
        return f"only {' '.join(parts.keys)} of A and B is there"
    for key in parts.keys.values():
        if source[key].dtype.name not in _FACTORS:
            raise SourceError(
                f"{source.root}: {key!r} is {source[key].dtype.name}; LoRA factors are {', '.join(_FACTORS)}"
            )
    if others:
        if of_peft and "lokr_w2" in parts.keys and len(source[parts.keys["lokr_w2"]].shape) == 3:
            return "PEFT takes the dimensions of a one-dimensional convolution's LoKr in another order; merge it first"
        return lycoris.matrix_shape(source, parts.keys)
    a, b = source[parts.keys["A"]].shape, source[parts.keys["B"]].shape
    if len(a) != len(b) or not 2 <= len(a) <= 5 or a[0] != b[1] or not a[0]:
        return f"shapes {list(b)} and {list(a)} do not multiply"
    if math.prod(b[2:]) != 1:
        return f"B of shape {list(b)} is not a 1 x 1 convolution"
    return (b[0], *a[1:])


def _names(
    source: Checkpoint,
    tensors: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    others: Mapping[str, str],
    base: Checkpoint | None,
) -> tuple[dict[str, str], dict[str, str]]:
    """As `find_tensors`, of the modules and of what is saved whole; without a base names are as they are."""
    if base is not None:
        whole = {name: source[key].shape for key, name in others.items()}
        return find_tensors(whole | {tensors[module]: shape for module, shape in shapes.items()}, base)
    mangled = [module for module in tensors if "." not in module and "_" in module]
    if mangled:
        raise SourceError(
            f"{source.root}: {mangled[0]!r} has underscores for dots, so its tensor is unknown; give --base MODEL"
        )
    return {tensor: tensor for tensor in tensors.values()}, {}


def _swapped(
    modules: Mapping[str, Module],
    shapes: Mapping[str, tuple[int, ...]],
    scale: Scale,
    names: Mapping[str, str],
    base: Checkpoint | None,
    result: Source,
) -> set[str]:
    """The modules whose tensors are (B A)^T: embeddings, and layers that are stored as [in, out].

    The base's shapes tell.  What is square goes with the others of its source, then by what the configurations say.
    """
    if base is None:
        return {module for module, parts in modules.items() if parts.embedding or scale.orientation(module)}
    swapped: set[str] = set()
    seen: set[bool] = set()
    square: list[str] = []
    for module, parts in modules.items():
        shape = shapes[module]
        if len(shape) == 2 and shape[0] == shape[1] and not parts.embedding:
            square.append(module)
        elif len(shape) == 2 and base[names[module]].shape in (shape, shape[::-1]):
            swap = parts.embedding if shape[0] == shape[1] else base[names[module]].shape != shape
            swapped |= {module} if swap else set()
            seen |= set() if parts.embedding else {swap}
    for module in square:
        family = base.config(names[module]).get("model_type") in _CONV1D
        told = scale.orientation(module)
        if (seen == {True}) or (seen != {False} and (family or told)):
            swapped.add(module)
        elif len(seen) == 2 and told is None:
            result.warnings.append(f"{module} is square: taken as [out, in], though other layers here are [in, out]")
    return swapped


def _item(
    source: Checkpoint,
    parts: Module,
    shape: tuple[int, ...],
    name: str,
    base: Checkpoint | None,
    factor: float,
    swap: bool,
) -> Item | str:
    """The dense delta of one module, or why there is none."""
    others = lycoris.is_lycoris(parts.keys)
    if others and swap:
        return "the base stores it as [in, out], which is not known of LoHa and LoKr; merge it first"
    shape = shape[::-1] if swap else shape
    if others and base is not None and _is_flat(shape, base[name].shape):
        shape = base[name].shape
    dense = partial(_lycoris if others else _product, source, parts, factor, swap, shape)
    if base is None:
        return Item(name, shape, "unspecified", dense)
    slot = base[name]
    if slot.shape != shape:
        return f"it changes a tensor of shape {list(shape)}, the base's {name!r} has {list(slot.shape)}"
    if slot.dtype.name not in _FACTORS:
        return f"the base stores {name!r} as {slot.dtype.name}, to which nothing can be added exactly"
    return Item(name, shape, slot.dtype.name, dense, base_bits=partial(base.bits, name))


def _product(source: Checkpoint, parts: Module, factor: float, swap: bool, shape: tuple[int, ...]) -> Rows:
    """factor * B A (transposed if `swap`), a few rows at a time."""
    rank = source[parts.keys["A"]].shape[0]
    b, a = (to_float32(source.bits(key), source[key].dtype.name) for key in (parts.keys["B"], parts.keys["A"]))
    left, right = b.reshape(-1, rank), a.reshape(rank, -1)
    if "E" in parts.keys:  # AdaLoRA's singular values
        right = right * to_float32(source.bits(parts.keys["E"]), source[parts.keys["E"]].dtype.name).reshape(rank, 1)
    if swap:
        left, right = right.T, left.T
    scaled: Float32 = np.ascontiguousarray(left) * np.float32(factor)
    right = np.ascontiguousarray(right)

    def product(start: int, stop: int) -> Float32:
        made: Float32 = scaled[start:stop] @ right
        return made

    return _in_rows(product, right.shape[1], shape)


def _lycoris(source: Checkpoint, parts: Module, factor: float, swap: bool, shape: tuple[int, ...]) -> Rows:
    """factor * a LoHa's or LoKr's change, a few rows at a time."""
    return _in_rows(lycoris.matrix_rows(source, parts.keys, factor), math.prod(shape[1:]), shape)


def _in_rows(matrix: lycoris.MatrixRows, width: int, shape: tuple[int, ...]) -> Rows:
    """A matrix of that width as rows of `row_shape`, of which one of its own may hold several."""
    columns = row_shape(shape)[1]
    pieces = width // columns if columns else 1

    def rows(start: int, stop: int) -> Float32:
        first = start // pieces
        made = matrix(first, -(-stop // pieces))
        return made.reshape(-1, columns)[start - first * pieces : stop - first * pieces]

    return rows


def _is_flat(matrix: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether a matrix is a convolution of that shape with its trailing dimensions flat."""
    return len(shape) > 2 and matrix == (shape[0], math.prod(shape[1:]))


def _add_whole(
    source: Checkpoint,
    keys: Mapping[str, str],
    differences: Collection[str],
    names: Mapping[str, str],
    scale: Scale,
    base: Checkpoint | None,
    result: Source,
) -> None:
    """Tensors saved whole (PEFT's modules_to_save, biases): changed, or new where they were meant to be.

    LyCORIS saves differences beside its factors (of norms, say).
    """
    lost: dict[str, str] = {}
    taken = {item.name for item in result.items}
    for key, name in keys.items():
        if ".original_module." in key:
            result.skipped[key] = "the module as it was before"
        elif base is None:
            lost[key] = "saved whole; give --base to tell whether it is new or changed"
        elif names.get(name, name) in taken:
            (lost if key in differences else result.skipped)[key] = f"{names.get(name, name)!r} is in already"
        else:
            found = names.get(name)
            if TOKENS.match(key):
                item = _tokens(source, key, name, found, scale, base)
            elif key in differences:
                item = diff.difference(source, key, found, base) if found else "the base has no such tensor"
            else:
                item = _whole(source, key, name, found, scale, base)
            if isinstance(item, str):
                lost[key] = item
            else:
                result.items.append(item)
                taken.add(item.name)
    result.skipped |= lost
    if lost:
        key, why = next(iter(lost.items()))
        result.warnings.append(f"{len(lost)} tensors beside the LoRA are left out, such as {key}: {why}")


def _tokens(source: Checkpoint, key: str, name: str, found: str | None, scale: Scale, base: Checkpoint) -> Item | str:
    """Rows of an embedding, stored as they are after training: what is added to the base's."""
    rows = scale.tokens(name.removesuffix(".weight"))
    slot = source[key]
    if found is None or rows is None:
        return "the base has no such tensor" if found is None else f"{CONFIG} does not say which rows these are"
    shape, dtype = base[found].shape, base[found].dtype.name
    if slot.shape != (len(rows), *shape[1:]) or len(set(rows)) < len(rows) or max(rows, default=0) >= shape[0]:
        return f"{len(rows)} rows of shape {list(slot.shape)} do not fit {found!r} of {list(shape)}"
    if slot.dtype.name not in _FACTORS or dtype not in _FACTORS:
        return f"it is {slot.dtype.name}, the base's {dtype}, and nothing can be added to that exactly"

    def exact() -> TensorDelta:
        order = np.argsort(rows)
        positions = (np.array(rows)[order][:, None] * shape[1] + np.arange(shape[1])).reshape(-1)
        tuned = to_float32(source.bits(key), slot.dtype.name).reshape(len(rows), -1)[order].reshape(-1)
        bits = base.bits(found)[positions]
        change = tuned - to_float32(bits, dtype)
        kept = np.flatnonzero(change)
        return TensorDelta(shape, positions[kept], change[kept], dtype, base_bits=bits[kept])

    return Item(found, shape, dtype, exact=exact)


def _whole(source: Checkpoint, key: str, name: str, found: str | None, scale: Scale, base: Checkpoint) -> Item | str:
    from .full import difference

    if found is not None:
        return difference(source, key, base, found)
    tied = tied_slot(base, name, source[key].shape)
    if tied is not None:
        return f"the base ties it to {tied!r}, which would change too; untie them in the base first"
    meant = scale.adds(name)
    if meant is None:
        meant = name.endswith((".weight", ".bias"))
    return whole_tensor(source, key, name) if meant else "the base has no such tensor, and nothing says that it is new"
