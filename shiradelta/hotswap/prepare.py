"""The part of loading an adapter that does not read the weights: from a file's bytes to what switches work on."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from shiradelta.backends.choose import AUTO, FILE_BACKENDS
from shiradelta.errors import FormatError
from shiradelta.format.codecs.base import Bytes
from shiradelta.format.record import Record, Section
from shiradelta.hotswap.devices import Devices
from shiradelta.hotswap.loaded import Loaded
from shiradelta.hotswap.matching import Names, check_target, match, only_these
from shiradelta.hotswap.on_base import are_read_there, naming_file, plain_bytes
from shiradelta.hotswap.protocol import Fit
from shiradelta.hotswap.reading import PartlyRead, read_whole
from shiradelta.hotswap.reports import LoadReport
from shiradelta.hotswap.sections import can_be_shared, read_shared
from shiradelta.hotswap.shares import Share
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


@dataclass(frozen=True)
class Preparation:
    """What adapters are prepared for.

    Attributes:
        targets: the model's tensors by name.
        names: the file's names -> the model's, where they differ.
        backend: the backend that was chosen.
        devices: where the tensors are.
    """

    targets: Mapping[str, Target]
    names: Names | None
    backend: str
    devices: Devices

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
            # A signature is of the whole file.
            if key is None and isinstance(source, (str, os.PathLike)) and self._has_parts_only:
                label = os.fspath(source)
                partly = PartlyRead(source)
                data = partly.data
            else:
                label, data = read_whole(source, self.devices.buffer, key)
            with ExitStack() as locked:
                need_weights = partial(locked.enter_context, lock)
                return self._prepare(name, label, data, partly, allow_dtype, skip, only, limit, need_weights)
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
    ) -> Loaded:
        """Checks that a file fits the model, and copies it, compressed, to where the tensors are.

        The sections of a file that is partly read are read here, as soon as it is known which are of use.
        """
        choice = self.backend if self.backend in FILE_BACKENDS else AUTO
        delta = open_delta(data, choice, limit=limit)
        tensors = dict(delta)
        every, unmatched = match(tensors, self.targets, self.names, label, skip)
        matched = only_these(label, every, only)
        targets = {own: self.targets[other].in_form(tensors[own].shape) for own, other in matched.items()}
        shared = {} if delta.needs_base or delta.packed else _shared(tensors, targets)
        if partly is not None and not delta.packed:
            here = (own for own in targets if own not in shared and not _is_elsewhere(targets[own]))
            partly.read(tensors[own].record for own in (tensors if delta.needs_base else here))
        readings = read_shared(shared, data, partly.read_spans if partly is not None else lambda spans: None)
        plain = delta.unpacked
        if delta.needs_base:
            need_weights()
        if delta.needs_base and not are_read_there(tensors, every, self.targets, self.devices):
            plain = plain_bytes(label, delta, every, self.targets, self.devices, allow_dtype)
        if plain is not None:
            _, data = read_whole(plain, self.devices.buffer)
            delta = open_delta(data, choice, limit=limit)
            tensors = dict(delta)
        wanted = tensors if only is None else matched
        delta.check_memory("all of it", sum(tensors[own].record.unpacked_size for own in wanted))
        fits: dict[Target, tuple[StoredTensor, str]] = {}
        for own, target in targets.items():
            tensor = tensors[own]
            where = f"{label}: tensor {own!r}"
            dtype = check_target(where, tensor, target, allow_dtype)
            first, _ = fits.setdefault(target, (tensor, dtype))
            check_tied(where, first, tensor, "untie the model before loading")
        whole = [(tensor, target, dtype) for target, (tensor, dtype) in fits.items() if target.extent is None]
        parts = [(tensor, target, dtype) for target, (tensor, dtype) in fits.items() if target.extent is not None]
        nonzeros: dict[str, Mapping[Share, int]] = {tensor.record.name: {(): tensor.nnz} for tensor, _, _ in whole}
        files: list[tuple[Bytes, Sequence[Fit]]] = [(data, whole)]
        if parts:
            transcoded = take_apart(label, parts, fits, choice, self.devices.buffer, readings)
            nonzeros.update(transcoded.nonzeros)
            files = [(transcoded.data, transcoded.fits)]
            if whole:
                files.append(_alone(data, whole, delta, choice, limit))
        with naming_file(label):
            held = self.devices.hold(files)
        records = {tensor.record.name: tensor.record for tensor, _ in fits.values()}
        report = LoadReport(
            name,
            matched,
            unmatched,
            unchecked=(),
            nonzeros=sum(record.nnz for record in records.values()),
            nbytes=sum(one.nbytes for one in held.values()),
            transcoded=len(parts),
        )
        pieces = [InPieces(tensor.record, target, dtype) for tensor, target, dtype in parts]
        return Loaded(bytes.fromhex(delta.digest), held, pieces, records, nonzeros, report, label, readings)


def _is_elsewhere(target: Target) -> bool:
    """Whether this process has no element of a tensor."""
    return all(show_nothing(views) for _, views in target.leaves())


def _rows(target: Target) -> Rows | None:
    """The rows of a tensor that this process has, where it is a DTensor of which each process has some."""
    is_whole = target.refusal is None and target.extent is not None and is_sharded(target.holder)
    return rows_of(target.holder, [view for _, view in target.parts]) if is_whole else None


def _shared(tensors: Mapping[str, StoredTensor], targets: Mapping[str, Target]) -> dict[str, tuple[Record, Rows]]:
    """The tensors that processes read together: the same ones in all processes that have rows of them."""
    found: dict[str, tuple[Record, Rows]] = {}
    for own, target in targets.items():
        rows = _rows(target)
        if rows is not None and can_be_shared(tensors[own].record):
            found[own] = tensors[own].record, rows
    return found


def _alone(
    data: Bytes, fits: Sequence[Fit], delta: Delta, backend: str, limit: int | str | None
) -> tuple[Bytes, list[Fit]]:
    """A file in which only the tables and these tensors take memory, so that the others' can be given back."""
    kept = np.zeros(data.size, np.uint8)  # pages that nobody writes take none
    starts = [section.offset for tensor in delta.values() for section in _sections(tensor) if section.stored]
    spans = [(0, min(starts, default=data.size))]
    spans += [(section.offset, section.end) for tensor, _, _ in fits for section in _sections(tensor)]
    for start, end in spans:
        kept[start:end] = data[start:end]
    same = open_delta(kept, backend, limit=limit)
    return kept, [(same[tensor.record.name], target, dtype) for tensor, target, dtype in fits]


def _sections(tensor: StoredTensor) -> tuple[Section, Section]:
    return tensor.record.index, tensor.record.values
