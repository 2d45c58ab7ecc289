"""The part of loading an adapter that does not read the weights: from a file's bytes to what switches work on."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shiradelta.backends.choose import AUTO, FILE_BACKENDS
from shiradelta.errors import FormatError
from shiradelta.format.codecs.base import Bytes
from shiradelta.format.record import Record
from shiradelta.hotswap.devices import Devices
from shiradelta.hotswap.fits import Fit, FitColumns, Fits, Targets
from shiradelta.hotswap.layers import Stack
from shiradelta.hotswap.loaded import Loaded
from shiradelta.hotswap.matching import Names, check_target, mapped, match, only_these
from shiradelta.hotswap.on_base import are_read_there, naming_file, plain_bytes
from shiradelta.hotswap.reading import PartlyRead, read_whole
from shiradelta.hotswap.reports import LoadReport
from shiradelta.hotswap.sections import can_be_shared, read_shared
from shiradelta.hotswap.shares import Shares
from shiradelta.hotswap.transcode import InPieces, take_apart
from shiradelta.io.reader import Delta, Source, StoredTensor, open_delta
from shiradelta.io.recognise import explain_refusal
from shiradelta.models.compatibility import check_tied
from shiradelta.models.live import Target
from shiradelta.models.memory import is_sharded
from shiradelta.models.sharded import Rows, rows_of
from shiradelta.models.views import show_nothing
from shiradelta.signing.keys import Keys
from shiradelta.signing.verify import local_with_signature

#: Number of kinds of files for which a session remembers what fits: those that it has seen last.
_KNOWN = 4


class Matched(NamedTuple):
    """What a file's names and shapes are in a model.

    Attributes:
        every: the file's names -> the model's.
        unmatched: the file's names that are left out, since the model does not have them.
        matched: those of `every` that are to be loaded.
        targets: the file's names of these -> the model's tensors.
        checked: what `check_target` has allowed: numbers in the table, targets and their dtypes.
        are_whole: whether each of these tensors of the model is in one piece, and has one of these names only.
    """

    every: Mapping[str, str]
    unmatched: tuple[str, ...]
    matched: Mapping[str, str]
    targets: Mapping[str, Target]
    checked: dict[tuple[bytes, bool], tuple[NDArray[np.int64], Targets, Sequence[str]]]
    are_whole: bool


@dataclass(frozen=True)
class Preparation:
    """What adapters are prepared for.

    Attributes:
        targets: the model's tensors by name.
        names: the file's names -> the model's, where they differ.
        backend: the backend that was chosen.
        devices: where the tensors are.
        active: what is on each tensor, the topmost first.
    """

    targets: Mapping[str, Target]
    names: Names | None
    backend: str
    devices: Devices
    active: Callable[[], Mapping[Target, Stack]] = dict
    _known: dict[tuple[object, ...], Matched] = field(default_factory=dict)

    def read(
        self,
        name: str,
        source: Source,
        key: Keys | None,
        allow_dtype: bool,
        skip: Sequence[str],
        only: Sequence[str] | None,
        limit: int | str | None,
        lock: AbstractContextManager[object],
    ) -> Loaded:
        """Reads an adapter and prepares it; arguments and errors are those of `HotSwap.load`.

        Where the weights are read for that, nobody who holds the lock writes them meanwhile.
        """
        source = local_with_signature(source, key)
        partly: PartlyRead | None = None
        label = "delta"
        try:
            with ExitStack() as opened:
                # A signature is of the whole file.
                if key is None and isinstance(source, (str, os.PathLike)):
                    label = os.fspath(source)
                    buffer = _zeros if self._has_parts_only else self.devices.buffer
                    partly = opened.enter_context(PartlyRead(source, buffer))
                    data = partly.data
                else:
                    label, data = read_whole(source, self.devices.buffer, key)
                need_weights = partial(opened.enter_context, lock)
                prepare = partial(
                    self._prepare, name, label, data, partly, allow_dtype, skip, only, limit, need_weights
                )
                try:
                    return prepare({})
                except FormatError as error:
                    below = self.active()
                    if error.reason != "wrong_base" or not below:
                        raise
                return prepare(below)  # the file was not made for what is there, so perhaps for what is beneath
        except FormatError as error:
            error.file = error.file or label
            if isinstance(source, (str, os.PathLike)):
                explain_refusal(error, Path(source))
            raise

    @cached_property
    def _has_parts_only(self) -> bool:
        """Whether other processes have tensors, or rows of some, so that this one need not read all of a file."""
        return any(_is_elsewhere(target) or _rows(target) is not None for target in self.targets.values())

    def _prepare(
        self,
        name: str,
        label: str,
        data: Bytes,
        partly: PartlyRead | None,
        allow_dtype: bool,
        skip: Sequence[str],
        only: Sequence[str] | None,
        limit: int | str | None,
        need_weights: Callable[[], object],
        below: Mapping[Target, Stack],
    ) -> Loaded:
        """Checks that a file fits the model, and copies it, compressed, to where the tensors are.

        A file that needs its base is read with what is beneath `below`.

        The sections of a file that is partly read are read as soon as it is known which are of use: by the backends, if
        nothing else looks at them before.
        """
        choice = self.backend if self.backend in FILE_BACKENDS else AUTO
        delta = open_delta(data, choice, limit=limit)
        names = self._matched(label, delta, skip, only)
        shared = {}
        if self._has_parts_only and not (delta.needs_base or delta.packed):
            shared = _shared(delta, names.targets)
        unread = partly if names.are_whole and not (delta.packed or delta.needs_base or self._has_parts_only) else None
        if partly is not None and unread is None and not delta.packed:
            here = (own for own, target in names.targets.items() if own not in shared and not _is_elsewhere(target))
            partly.read(delta[own].record for own in (delta if delta.needs_base else here))
        readings = read_shared(shared, data, partly.fill if partly is not None else lambda spans: None)
        plain = delta.unpacked
        if delta.needs_base:
            need_weights()
        if delta.needs_base and (below or not are_read_there(delta, names.every, self.targets, self.devices)):
            plain = plain_bytes(label, delta, names.every, self.targets, self.devices, allow_dtype, below)
        if plain is not None:
            _, data = read_whole(plain, self.devices.buffer)
            delta = open_delta(data, choice, limit=limit)
        delta.check_memory("all of it", delta.table.unpacked_size(None if only is None else names.matched))
        whole, parts = self._fits(label, delta, names, allow_dtype)
        nonzeros: Shares[int] = {}
        files = [Fits(data, delta, whole, unread)]
        if parts:
            every = [*Fits(data, delta, whole).fits(), *parts]
            others = {target: (tensor, dtype) for tensor, target, dtype in every}
            transcoded = take_apart(label, parts, others, choice, self.devices.buffer, readings)
            nonzeros = transcoded.nonzeros
            files = [transcoded.fits, *(_alone(one, choice, limit) for one in files if len(whole))]
        with naming_file(label):
            held = self.devices.hold(files)
        report = LoadReport(
            name,
            names.matched,
            names.unmatched,
            unchecked=(),
            nonzeros=int(whole.nonzeros.sum()) + sum(tensor.nnz for tensor, _, _ in parts),
            nbytes=sum(one.nbytes for one in held.values()),
            transcoded=len(parts),
        )
        pieces = [InPieces(tensor.record, target, dtype) for tensor, target, dtype in parts]
        return Loaded(bytes.fromhex(delta.digest), held, pieces, delta.table, whole, nonzeros, report, label, readings)

    def _matched(self, label: str, delta: Delta, skip: Sequence[str], only: Sequence[str] | None) -> Matched:
        """The model's tensors of a file's; made once for files whose tensors have the same names and shapes."""
        renamed = None if self.names is None else tuple(mapped(self.names, name) for name in delta)
        key = delta.table.target_key, renamed, tuple(skip), None if only is None else tuple(only)
        if key not in self._known:
            every, unmatched = match(delta, self.targets, self.names, label, skip)
            chosen = only_these(label, every, only)
            shapes = {own: delta[own].shape for own in chosen}
            targets = {own: self.targets[other].in_form(shapes[own]) for own, other in chosen.items()}
            are_whole = all(target.extent is None for target in targets.values())
            are_whole &= len(set(targets.values())) == len(targets)
            if len(self._known) >= _KNOWN:
                del self._known[next(iter(self._known))]
            self._known[key] = Matched(every, unmatched, chosen, targets, {}, are_whole)
        return self._known[key]

    def _fits(self, label: str, delta: Delta, names: Matched, allow_dtype: bool) -> tuple[FitColumns, list[Fit]]:
        """Checks tensors against the model's: (those of whole tensors, those of tensors in parts), one a target."""
        key = delta.table.target_key, allow_dtype
        if key in names.checked:
            return FitColumns(delta.table, *names.checked[key]), []
        fits: dict[Target, tuple[StoredTensor, str]] = {}
        for own, target in names.targets.items():
            tensor = delta[own]
            where = f"{label}: tensor {own!r}"
            dtype = check_target(where, tensor, target, allow_dtype)
            first, _ = fits.setdefault(target, (tensor, dtype))
            check_tied(where, first, tensor, "untie the model before loading")
        parts = [(tensor, target, dtype) for target, (tensor, dtype) in fits.items() if target.extent is not None]
        whole = [(tensor, target, dtype) for target, (tensor, dtype) in fits.items() if target.extent is None]
        columns = FitColumns.of(delta, whole)
        if not parts and len(fits) == len(names.targets):  # no other check depends on more than names and shapes
            names.checked[key] = columns.numbers, columns.targets, columns.dtypes
        return columns, parts


def _is_elsewhere(target: Target) -> bool:
    """Whether this process has no element of a tensor."""
    return all(show_nothing(views) for _, views in target.leaves())


def _rows(target: Target) -> Rows | None:
    """The rows of a tensor that this process has, where it is a DTensor of which each process has some."""
    is_whole = target.refusal is None and target.extent is not None and is_sharded(target.holder)
    return rows_of(target.holder, [view for _, view in target.parts]) if is_whole else None


def _shared(delta: Delta, targets: Mapping[str, Target]) -> dict[str, tuple[Record, Rows]]:
    """The tensors that processes read together: the same ones in all processes that have rows of them."""
    found: dict[str, tuple[Record, Rows]] = {}
    for own, target in targets.items():
        rows = _rows(target)
        if rows is not None and can_be_shared(delta[own].record):
            found[own] = delta[own].record, rows
    return found


def _zeros(size: int) -> Bytes:
    """Memory of which what nobody writes takes none."""
    return np.zeros(size, np.uint8)


def _alone(fits: Fits, backend: str, limit: int | str | None) -> Fits:
    """A file in which only the tables and these tensors take memory, so that the others' can be given back."""
    data, delta, columns, _ = fits
    kept = _zeros(data.size)
    starts = [section.offset for record in delta.table for section in (record.index, record.values) if section.stored]
    spans = [(0, min(starts, default=data.size))]
    for number in columns.numbers.tolist():
        record = delta.table[number]
        spans += [(section.offset, section.end) for section in (record.index, record.values)]
    for start, end in spans:
        kept[start:end] = data[start:end]
    same = open_delta(kept, backend, limit=limit)
    return Fits(kept, same, replace(columns, table=same.table))
