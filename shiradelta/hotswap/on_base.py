"""Adapters that are read with their base only: the weights that are there when one is loaded are that base."""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np

from shiradelta.errors import FormatError
from shiradelta.format.arithmetic import Array
from shiradelta.format.record import Record
from shiradelta.hotswap.transcode import stored_positions
from shiradelta.io.context import write_plain
from shiradelta.io.reader import Delta
from shiradelta.models.live import Target
from shiradelta.models.memory import is_array
from shiradelta.models.views import View
from shiradelta.util.arrays import ranges


def plain_bytes(label: str, delta: Delta, matched: Mapping[str, str], targets: Mapping[str, Target]) -> bytes:
    """A file that does the same as a delta and needs no base to be read.

    Args:
        label: the delta's file, for messages.
        delta: the delta.
        matched: the file's names -> the model's.
        targets: the model's tensors by name.

    Raises:
        FormatError: the weights are not the ones that it was made for, or are in pieces, or the file is damaged.
    """

    def base(record: Record) -> Array:
        target = targets[matched[record.name]].in_form(record.shape) if record.name in matched else None
        leaves = [] if target is None else list(target.leaves())
        sizes = {leaf.tensor.itemsize for leaf, _ in leaves}
        if target is None or target.shape != record.shape or not sizes <= {record.element_size}:
            raise FormatError("wrong_base", "no tensor of the model fits", tensor=record.name, file=label)
        if target.extent is None:
            return _bits(target)
        bits = np.zeros(record.numel, record.dtype.bits)
        if sum(_take_over(bits, leaf, views) for leaf, views in leaves) < record.numel:
            error = FormatError("base_needed", "this process has a part of it only", tensor=record.name, file=label)
            error.remedy = "make it plain first: shiradelta recode FILE OUT --base MODEL"
            raise error
        return bits

    output = io.BytesIO()
    try:
        write_plain(delta, base, output)
    except FormatError as error:
        error.file = error.file or label
        raise
    return output.getvalue()


def _take_over(bits: Array, leaf: Target, views: tuple[View, ...]) -> int:
    """Copies the elements that a piece of memory has; returns how many they are."""
    own, taken = _bits(leaf), 0
    for start, stop in ranges(own.size):
        chosen, stored = stored_positions(np.arange(start, stop), views)
        bits[stored] = own[start:stop][chosen]
        taken += stored.size
    return taken


def _bits(target: Target) -> Array:
    """All elements' bits, flat, in NumPy."""
    if is_array(target.tensor):
        array: Array = np.ascontiguousarray(target.tensor)
    else:
        import torch

        size = target.tensor.element_size()
        signed = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
        array = target.tensor.contiguous().view(signed).cpu().numpy()
    return array.reshape(-1).view(f"<u{array.itemsize}")
