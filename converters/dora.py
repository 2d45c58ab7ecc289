"""DoRA (arXiv:2402.09353): W' = m (W + D) / |W + D|, with a learned length m for each output, or for each input.

D is the change of a LoRA, LoHa or LoKr.  The lengths need the base, so the change W' - W does.  PEFT saves a length for
each output of a layer as `lora_magnitude_vector`; LyCORIS saves `dora_scale`, whose shape says which it has.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial

import numpy as np

from shiradelta.format.arithmetic import Array, Float32, to_float32
from shiradelta.format.registry import ADD_DTYPES
from shiradelta.models.checkpoint import Checkpoint
from shiradelta.models.peft import ADAPTER, unwrap
from shiradelta.select.topk import Rows, row_shape

from .item import Item, Skipped, SkipReason

_OF_LYCORIS = "dora_scale"
_KEY = re.compile(rf"^(?P<module>.+?)\.(?:lora_magnitude_vector|{_OF_LYCORIS})(?:{re.escape(ADAPTER)})?(?:\.weight)?$")
#: LyCORIS adds this to each length, so that none is 0.
_EPSILON = np.finfo(np.float32).eps
#: Elements whose lengths are computed at a time.
_BLOCK = 1 << 20

NEEDS_BASE = Skipped(SkipReason.NEEDS_BASE, "is a DoRA, whose change depends on the base's weights; give --base MODEL")
#: A tensor that several layers share, changed by another module, too.
SHARED = Skipped(
    SkipReason.CONFLICT, "is a DoRA of a tensor that another module changes too, and their changes do not add up"
)


def parse_key(key: str) -> str | None:
    """The module whose lengths a key holds; None for another key."""
    match = _KEY.match(key)
    return None if match is None else unwrap(match["module"])


def changed(item: Item, source: Checkpoint, key: str, swap: bool) -> Item | Skipped:
    """The change W' - W of a tensor.

    Args:
        item: the change D of the module's factors, with the base's elements.
        source: the adapter's checkpoint.
        key: the key of the module's lengths in it.
        swap: whether the base stores the weight transposed, [in, out], as of embeddings and Conv1D.

    Returns:
        The item of the whole change, or the reason to skip it: the lengths do not fit.
    """
    slot, shape = source[key], item.shape
    if slot.dtype.name not in ADD_DTYPES:
        return Skipped(SkipReason.PARTS, f"its magnitudes {key!r} are {slot.dtype.name}")
    axis = _axis(slot.shape, shape[:2][::-1] if swap else shape[:2], _OF_LYCORIS in key)
    if axis is None:
        why = f"its magnitudes {key!r} of shape {list(slot.shape)} do not fit a tensor of shape {list(shape)}"
        return Skipped(SkipReason.PARTS, why)
    epsilon = _EPSILON if _OF_LYCORIS in key else np.float32(0)
    assert item.dense is not None
    assert item.base_bits is not None
    dense = partial(_rows, item, item.dense, item.base_bits, source, key, axis ^ swap, epsilon)
    return Item(item.name, shape, item.dtype, dense, base_bits=item.base_bits)


def _axis(lengths: tuple[int, ...], layer: tuple[int, ...], of_lycoris: bool) -> int | None:
    """Which dimension of a layer's weight, [out, in, ...], has a length for each index; None if none fits."""
    outputs, inputs = layer
    if of_lycoris:
        if lengths[:1] == (outputs,) and math.prod(lengths) == outputs:
            return 0
        return 1 if lengths[:2] == (1, inputs) and math.prod(lengths) == inputs else None
    return 0 if math.prod(lengths) == outputs else None


def _rows(
    item: Item,
    opened: Callable[[], Rows],
    base_bits: Callable[[], Array],
    source: Checkpoint,
    key: str,
    axis: int,
    epsilon: np.float32,
) -> Rows:
    """W' - W in float32, a few rows at a time, once all lengths of W + D are known."""
    change, bits, (count, columns) = opened(), base_bits(), row_shape(item.shape)
    wanted = to_float32(source.bits(key), source[key].dtype.name).reshape(-1)
    size, inner = item.shape[axis], math.prod(item.shape[axis + 1 :])

    def base(start: int, stop: int) -> Float32:
        return to_float32(bits[start * columns : stop * columns], item.dtype).reshape(-1, columns)

    def index(start: int, stop: int) -> Array:
        """The index along the axis of each element, or of all of a row."""
        if inner % columns == 0:  # a row lies within one index
            return (np.arange(start, stop) * columns // inner % size)[:, None]
        if columns % (inner * size) == 0:  # each row has all of them
            return (np.arange(columns) // inner % size)[None]
        return (np.arange(start * columns, stop * columns) // inner % size).reshape(-1, columns)

    squares = np.zeros(size)
    step = max(1, _BLOCK // max(columns, 1))
    for start in range(0, count, step):
        stop = min(start + step, count)
        with np.errstate(over="ignore", invalid="ignore"):
            part = np.square((base(start, stop) + change(start, stop)).astype(np.float64))
        at = index(start, stop)
        for dim in (0, 1):  # adds up along what has one index
            part = part.sum(axis=dim, keepdims=True) if at.shape[dim] < part.shape[dim] else part
        squares += np.bincount(at.reshape(-1), part.reshape(-1), size)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        factors: Float32 = wanted / (np.sqrt(squares).astype(np.float32) + epsilon)

    def rows(start: int, stop: int) -> Float32:
        old = base(start, stop)
        with np.errstate(over="ignore", invalid="ignore"):
            made: Float32 = factors[index(start, stop)] * (old + change(start, stop)) - old
        return made

    return rows
