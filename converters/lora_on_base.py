"""Adapters of LyCORIS and kohya whose change depends on the base's weights W: GLoRA, Diag-OFT, BOFT, (IA)^3, T-LoRA.

`METHODS` has a row for each.  W is [out, in, kernel...], and the change is made a few outputs at a time.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from shiradelta.errors import SourceError
from shiradelta.format.arithmetic import Array, Float32, to_float32
from shiradelta.format.registry import ADD_DTYPES
from shiradelta.models.checkpoint import Checkpoint
from shiradelta.models.peft import unwrap
from shiradelta.select.topk import NOT_FINITE
from shiradelta.util.text import count

from .base_names import BaseTensors
from .item import CONVERTED, Item, Skipped, SkipReason, Source, not_addable
from .lycoris import MatrixRows, in_rows, no_remarks, through

Shape = tuple[int, ...]
#: Part -> its elements.
Parts = Mapping[str, Float32]
#: Rows [start, stop) of W, in float32, flat but for the first dimension.
Base = MatrixRows


@dataclass(frozen=True)
class OnBase:
    """The row of a method.

    Attributes:
        name: what it is called.
        parts: what its keys end in, by which it is known.
        more: other ends that a module of it may have.
        fits: whether parts of such shapes fit a weight of a shape.
        change: (parts, a weight's shape, its rows, alpha) -> rows of the change.
        scaled: whether alpha over the rank scales the change, so that the user may give another.
        assumes: what its files do not say and `change` takes for given, for a warning.
    """

    name: str
    parts: tuple[str, ...]
    more: tuple[str, ...]
    fits: Callable[[Mapping[str, Shape], Shape], bool]
    change: Callable[[Parts, Shape, Base, float | None], MatrixRows]
    scaled: bool = True
    assumes: str = ""


def parse_keys(keys: Collection[str]) -> dict[str, tuple[str, str, bool]]:
    """Key -> (module, part, False), for the modules that have all parts of a method."""
    found: dict[str, tuple[str, str, bool]] = {}
    for method in METHODS:
        first, *others = method.parts
        for key in keys:
            module = key.removesuffix(f".{first}")
            if module != key and all(f"{module}.{part}" in keys for part in others):
                there = [part for part in (*method.parts, *method.more) if f"{module}.{part}" in keys]
                found.update({f"{module}.{part}": (unwrap(module), part, False) for part in there})
    return found


def method_of(parts: Iterable[str]) -> OnBase | None:
    """The method that a module's parts are of; None if it is one of `lora_keys`' own."""
    held = set(parts)
    return next((method for method in METHODS if held.issuperset(method.parts)), None)


def add(
    source: Checkpoint,
    modules: Mapping[str, Mapping[str, str]],
    alphas: Mapping[str, tuple[float | None, float | None]],
    there: BaseTensors,
    base: Checkpoint | None,
    result: Source,
) -> None:
    """Adds the changes of modules.

    Args:
        source: the adapter.
        modules: module -> its parts' keys.
        alphas: module -> (its alpha in the file, the user's or else that).
        there: where the base has the modules' weights.
        base: the base, or None.
        result: where items and skipped modules go.
    """
    taken = {item.name for item in result.items}
    assumed: Counter[OnBase] = Counter()
    for module, keys in modules.items():
        method, weight = method_of(keys), f"{module}.weight"
        assert method is not None
        found: Item | Skipped
        if base is None:
            why = f"is of {method.name}, whose change depends on the base's weights; give --base MODEL"
            found = Skipped(SkipReason.NEEDS_BASE, why)
        elif weight in there.converted:
            found = CONVERTED
        elif weight not in there.found:
            found = there.lacking[weight]
        elif weight in there.tied or there.found[weight] in taken:
            found = Skipped(SkipReason.CONFLICT, f"other layers change {there.found[weight]!r}, too")
        else:
            taken.add(there.found[weight])
            found = _changed(method, source, keys, there.found[weight], base, alphas[module][method.scaled])
        if isinstance(found, Skipped):
            found = found.called(*keys.values(), weight, there.found.get(weight))
        else:
            assumed[method] += bool(method.assumes)
        result.add(module, found)
    for method, number in (+assumed).items():
        result.warnings.append(f"{count(number, 'module')} of {method.name}: {method.assumes}")


def _changed(
    method: OnBase, source: Checkpoint, keys: Mapping[str, str], name: str, base: Checkpoint, alpha: float | None
) -> Item | Skipped:
    """The change of a tensor of the base, or why there is none."""
    slot = base[name]
    strange = set(keys) - {*method.parts, *method.more}
    if strange:
        return Skipped(SkipReason.PARTS, f"{' '.join(sorted(keys))} are of several methods")
    for part, key in keys.items():
        if source[key].dtype.name not in ADD_DTYPES and part != "on_input":
            raise SourceError(
                f"{source.root}: {key!r} is {source[key].dtype.name}; factors are {', '.join(ADD_DTYPES)}"
            )
    shapes = {part: source[key].shape for part, key in keys.items()}
    if len(slot.shape) < 2 or 0 in slot.shape or not method.fits(shapes, slot.shape):
        listed = ", ".join(f"{part} {list(shape)}" for part, shape in shapes.items())
        return Skipped(SkipReason.PARTS, f"its parts ({listed}) fit no {method.name} of {name!r} {list(slot.shape)}")
    if (refused := not_addable(name, slot)) is not None:
        return refused
    width = math.prod(slot.shape[1:])
    bits_of_base = partial(base.bits, name)

    def rows_of(bits: Array, start: int, stop: int) -> Float32:
        return to_float32(bits[start * width : stop * width], slot.dtype.name).reshape(-1, width)

    @no_remarks
    def dense() -> Callable[[int, int], Float32]:
        held = {part: _read(source, key) for part, key in keys.items()}
        made = method.change(held, slot.shape, partial(rows_of, bits_of_base()), alpha)
        return in_rows(made, width, slot.shape)

    return Item(name, slot.shape, slot.dtype.name, dense, base_bits=bits_of_base)


def _read(source: Checkpoint, key: str) -> Float32:
    slot, bits = source[key], source.bits(key)
    if slot.dtype.name in ADD_DTYPES:
        return to_float32(bits, slot.dtype.name).reshape(slot.shape)
    if slot.dtype.name.startswith(("float4", "float6", "float8")):
        raise SourceError(f"{source.root}: {key!r} is {slot.dtype.name}, which no factor is; get the file again")
    return bits.view(np.dtype(slot.dtype.name)).astype(np.float32).reshape(slot.shape)


# ------------------------------------------------------------------------------------------ GLoRA


def _fits_glora(shapes: Mapping[str, Shape], weight: Shape) -> bool:
    flat = {part: (shape[0], math.prod(shape[1:])) for part, shape in shapes.items() if shape}
    if len(flat) < len(shapes):
        return False
    outputs, inputs, kernel = weight[0], weight[1], math.prod(weight[2:])
    rank = flat["a2.weight"][0]
    core = shapes.get("bm.weight")
    inner = flat["b2.weight"][0]
    return (
        flat["a1.weight"] == (inputs, rank)
        and flat["a2.weight"] == (rank, inputs)
        and flat["b1.weight"] == (outputs, inner)
        and flat["b2.weight"][1] == inputs * (1 if core else kernel)
        and (core is None or core == (inner, inner, *weight[2:]))
    )


def _glora(parts: Parts, weight: Shape, base: Base, alpha: float | None) -> MatrixRows:
    """alpha / rank (b1 b2 + W a1 a2)."""
    a1, a2, b1 = (parts[part].reshape(len(parts[part]), -1) for part in ("a1.weight", "a2.weight", "b1.weight"))
    b2 = parts["b2.weight"]
    right = through(parts["bm.weight"], b2) if "bm.weight" in parts else b2.reshape(len(b2), -1)
    factor = np.float32(1.0 if alpha is None else alpha / len(a2))
    inputs, kernel = weight[1], math.prod(weight[2:])

    @no_remarks
    def rows(start: int, stop: int) -> Float32:
        old = base(start, stop).reshape(-1, inputs, kernel).transpose(0, 2, 1)
        through_base = ((old @ a1) @ a2).transpose(0, 2, 1).reshape(stop - start, -1)
        made: Float32 = np.multiply(b1[start:stop] @ right + through_base, factor, dtype=np.float32)
        return made

    return rows


# ------------------------------------------------------------------------------------------ rotations


def _rotations(blocks: Float32, alpha: float | None, outputs: int) -> Float32:
    """The orthogonal matrices (I + Q)(I - Q)^-1 of blocks, Q = B - B^T, its norm bounded by alpha for each output."""
    q = np.asarray(blocks - np.swapaxes(blocks, -1, -2), np.float64)
    bound = (alpha or 0.0) * outputs
    norm = float(np.sqrt(np.square(q).sum())) + 1e-8
    if 0 < bound < norm:
        q *= bound / norm
    one = np.eye(q.shape[-1])
    made: Float32 = ((one + q) @ np.linalg.inv(one - q)).astype(np.float32)
    return made


def _fits_rescale(shapes: Mapping[str, Shape], weight: Shape) -> bool:
    rescale = shapes.get("rescale")
    return rescale is None or (rescale[:1] == weight[:1] and math.prod(rescale) == weight[0])


def _fits_blocks(shapes: Mapping[str, Shape], weight: Shape) -> bool:
    blocks = shapes["oft_blocks"]
    if len(blocks) not in (3, 4) or blocks[-1] != blocks[-2] or blocks[-3] * blocks[-1] != weight[0]:
        return False
    if len(blocks) == 4 and (blocks[-1] % 2 or (blocks[-1] << max(blocks[0] - 1, 0)) > weight[0]):
        return False  # stage i mixes outputs that are 2^i * half a block apart
    return _fits_rescale(shapes, weight)


def _oft(parts: Parts, weight: Shape, base: Base, alpha: float | None) -> MatrixRows:
    """Diag-OFT, one rotation a block of outputs; BOFT, where several stages of rotations mix them all."""
    turned = _butterfly if parts["oft_blocks"].ndim == 4 else _block_by_block
    rotated = turned(_rotations(parts["oft_blocks"], alpha, weight[0]), base)
    lengths = parts["rescale"].reshape(-1, 1) if "rescale" in parts else None

    @no_remarks
    def rows(start: int, stop: int) -> Float32:
        made = rotated(start, stop)
        made = made if lengths is None else made * lengths[start:stop]
        change: Float32 = made - base(start, stop)
        return change

    return rows


def _block_by_block(rotations: Float32, base: Base) -> MatrixRows:
    size = rotations.shape[-1]

    def rows(start: int, stop: int) -> Float32:
        first, last = start // size, -(-stop // size)
        old = base(first * size, last * size).reshape(last - first, size, -1)
        made = np.swapaxes(rotations[first:last], 1, 2) @ old
        whole: Float32 = made.reshape((last - first) * size, -1)
        return whole[start - first * size : stop - first * size]

    return rows


def _butterfly(rotations: Float32, base: Base) -> MatrixRows:
    stages, count, size = rotations.shape[:3]
    made = base(0, count * size)
    for stage in range(stages):
        apart = 2**stage * size // 2
        mixed = np.swapaxes(made.reshape(-1, 2, apart, made.shape[1]), 1, 2).reshape(count, size, -1)
        mixed = (rotations[stage] @ mixed).reshape(-1, apart, 2, made.shape[1])
        made = np.ascontiguousarray(np.swapaxes(mixed, 1, 2)).reshape(count * size, -1)
    return lambda start, stop: made[start:stop]


# ------------------------------------------------------------------------------------------ (IA)^3


def _fits_ia3(shapes: Mapping[str, Shape], weight: Shape) -> bool:
    return math.prod(shapes["on_input"]) == 1 and math.prod(shapes["weight"]) in weight[:2]


def _ia3(parts: Parts, weight: Shape, base: Base, alpha: float | None) -> MatrixRows:
    """W times the learned vector, along the inputs or the outputs."""
    vector, on_input = parts["weight"].reshape(-1), bool(parts["on_input"].reshape(-1)[0])
    if vector.size != weight[on_input]:
        side = "inputs" if on_input else "outputs"
        raise SourceError(f"has {vector.size} lengths for {weight[on_input]} {side}; get the file again")
    along = np.repeat(vector, math.prod(weight[2:]))[None] if on_input else vector[:, None]

    @no_remarks
    def rows(start: int, stop: int) -> Float32:
        made: Float32 = base(start, stop) * (along if on_input else along[start:stop])
        return made

    return rows


# ------------------------------------------------------------------------------------------ T-LoRA


def _fits_tlora(shapes: Mapping[str, Shape], weight: Shape) -> bool:
    rank = math.prod(shapes["lambda_layer"])
    q, p = shapes["q_layer.weight"], shapes["p_layer.weight"]
    return (
        math.prod(weight[2:]) == 1  # LyCORIS' own merge of larger kernels is another one than it runs
        and 0 < rank <= min(weight[:2])
        and q[:2] == (rank, weight[1])
        and p[:2] == (weight[0], rank)
        and math.prod(q) == rank * weight[1]
        and math.prod(p) == rank * weight[0]
    )


def _tlora(parts: Parts, weight: Shape, base: Base, alpha: float | None) -> MatrixRows:
    """alpha / rank (P L Q - U S V), where U S V is W cut to the rank, which P L Q began as."""
    lengths = parts["lambda_layer"].reshape(-1)
    q = parts["q_layer.weight"].reshape(lengths.size, -1)
    p = parts["p_layer.weight"].reshape(-1, lengths.size)
    factor = np.float32(1.0 if alpha is None else alpha / lengths.size)
    whole = base(0, weight[0])
    if not np.isfinite(whole).all():
        raise SourceError(f"of the base {NOT_FINITE}")
    u, s, v = np.linalg.svd(whole, full_matrices=False)
    began = (u[:, : lengths.size] * s[: lengths.size], v[: lengths.size])

    @no_remarks
    def rows(start: int, stop: int) -> Float32:
        made: Float32 = ((p[start:stop] * lengths) @ q - began[0][start:stop] @ began[1]) * factor
        return made

    return rows


METHODS = (
    OnBase("GLoRA", ("a1.weight", "a2.weight", "b1.weight", "b2.weight"), ("bm.weight",), _fits_glora, _glora),
    OnBase("OFT", ("oft_blocks",), ("rescale",), _fits_blocks, _oft, scaled=False),
    OnBase("(IA)^3", ("on_input", "weight"), (), _fits_ia3, _ia3),
    OnBase(
        "T-LoRA",
        ("lambda_layer", "q_layer.weight", "p_layer.weight"),
        (),
        _fits_tlora,
        _tlora,
        assumes="the file does not store what the factors were before training; they are taken to be the largest"
        " singular values and vectors of the base's weight, LyCORIS' default (sig_type principal)",
    ),
)
