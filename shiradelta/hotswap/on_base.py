"""Adapters that are read with their base only: the weights that are there when one is loaded are that base."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np

from shiradelta.errors import REMEDIES, FormatError
from shiradelta.format.arithmetic import Array
from shiradelta.format.codecs.base import Bytes
from shiradelta.format.record import Record
from shiradelta.hotswap.devices import Devices
from shiradelta.hotswap.layers import Stack
from shiradelta.hotswap.matching import check_target
from shiradelta.hotswap.numpy import host_bits
from shiradelta.hotswap.transcode import stored_positions
from shiradelta.io.context import write_plain
from shiradelta.io.reader import Delta, StoredTensor
from shiradelta.io.restored import Elements
from shiradelta.models.live import Target
from shiradelta.models.memory import is_array
from shiradelta.models.views import View
from shiradelta.util.arrays import ranges
from shiradelta.util.files import temporary_errors
from shiradelta.util.threads import THREADS


@contextmanager
def naming_file(label: str) -> Iterator[None]:
    """Refusals in it name the file, and say what to do if the weights are not its base."""
    try:
        yield
    except FormatError as error:
        error.file = error.file or label
        if error.reason == "wrong_base":
            error.remedy = f"take out the adapters that it was not made with, or {REMEDIES['base_needed']}"
        raise


def are_read_there(
    tensors: Mapping[str, StoredTensor],
    matched: Mapping[str, str],
    targets: Mapping[str, Target],
    devices: Devices,
) -> bool:
    """Whether backends can decode all of a file that is read with its base only, where the weights are.

    Its digest is not computed then: the base's fingerprints tell whether the weights are the right ones.

    Args:
        tensors: the file.
        matched: the file's names -> the model's.
        targets: the model's tensors by name.
        devices: where they are.
    """

    def is_read_there(name: str, record: Record) -> bool:
        if not record.needs_base:
            return True
        if name not in matched or record.base_fingerprint is None:
            return False
        target = targets[matched[name]].in_form(record.shape)
        if target.refusal is not None or not devices.reads_on_base(target):
            return False
        stands_for_bfloat16 = is_array(target.tensor) and (target.dtype, record.dtype.name) == ("uint16", "bfloat16")
        return (target.shape, target.dtype) == (record.shape, record.dtype.name) or stands_for_bfloat16

    is_untied = len({*matched.values()}) == len(matched)
    return is_untied and all(is_read_there(name, tensor.record) for name, tensor in tensors.items())


def plain_bytes(
    label: str,
    delta: Delta,
    matched: Mapping[str, str],
    targets: Mapping[str, Target],
    devices: Devices,
    allow_dtype: bool,
    below: Mapping[Target, Stack],
) -> Bytes:
    """A file that does the same as a delta and needs no base to be read.

    Args:
        label: the delta's file, for messages.
        delta: the delta.
        matched: the file's names -> the model's.
        targets: the model's tensors by name.
        devices: where they are.
        allow_dtype: take values that were made against another dtype; they cannot be read with the weights then.
        below: what is on each tensor, the topmost first, if the file is to be read with what is beneath.

    Raises:
        FormatError: the weights are not the ones that it was made for, or not all are here, or the file is damaged.
        TargetError: a tensor cannot be written.
        BaseMismatchError: a tensor does not fit.
    """

    def base(record: Record) -> Array | Elements:
        if record.name not in matched:
            raise FormatError("base_needed", "the model does not have it", tensor=record.name, file=label)
        target = targets[matched[record.name]].in_form(record.shape)
        dtype = check_target(f"{label}: tensor {record.name!r}", delta[record.name], target, allow_dtype)
        if dtype != record.dtype.name:
            raise FormatError("wrong_base", f"the model has it as {dtype}", tensor=record.name, file=label)
        if target.extent is None:
            return devices.all_elements(target, below.get(target, []))
        bits = np.zeros(record.numel, record.dtype.bits)
        if sum(_take_over(bits, leaf, views) for leaf, views in target.leaves()) < record.numel:
            raise FormatError("base_needed", "this process has a part of it only", tensor=record.name, file=label)
        return bits

    output = io.BytesIO()
    with naming_file(label), temporary_errors():
        write_plain(delta, base, output, passing=True, threads=THREADS)
    return np.frombuffer(output.getbuffer(), np.uint8)


def _take_over(bits: Array, leaf: Target, views: tuple[View, ...]) -> int:
    """Copies the elements that a piece of memory has; returns how many they are."""
    own, taken = host_bits(leaf), 0
    for start, stop in ranges(own.size):
        chosen, stored = stored_positions(np.arange(start, stop), views)
        bits[stored] = own[start:stop][chosen]
        taken += stored.size
    return taken
