"""The next checkpoint, bit for bit: every tensor that differs, as the smallest of what the format has.

Where elements keep their dtype, a step of training moves most of those that change by one or two representable numbers.
So a tensor holds these shifts, or its new elements, or is stored whole; tensors are added, dropped and replaced.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from shiradelta.chain.difference import changed, shifted
from shiradelta.errors import ArgumentError, SourceError, TargetError
from shiradelta.folder.recode import base_of
from shiradelta.format.arithmetic import Array
from shiradelta.format.codecs import BITS, ULP
from shiradelta.format.codecs.base import Bytes
from shiradelta.format.delta import TensorDelta
from shiradelta.io.context import plain_delta, write_on_base
from shiradelta.io.download import local_model
from shiradelta.io.encoded import Encoded
from shiradelta.io.reader import Delta, parse_delta
from shiradelta.io.recognise import Wanted
from shiradelta.io.writer import DeltaWriter, writing_to
from shiradelta.models.candidates import refuse_several
from shiradelta.models.checkpoint import Checkpoint, open_checkpoint
from shiradelta.models.held import HeldCheckpoint
from shiradelta.models.provenance import base_names, named
from shiradelta.util.arrays import ranges
from shiradelta.util.files import replacing
from shiradelta.util.progress import Progress, part_of
from shiradelta.util.threads import ahead
from shiradelta.util.version import made_by

from .report import ConversionReport, TensorReport
from .target import check_delta_target, target_of

#: Elements compared at a time; they stay in a core's cache.
_BLOCK = 1 << 17
#: No limit on what decoding a tensor takes: the file is our own, and its tensors are in memory here anyway.
_UNLIMITED = 1 << 62

#: What tensors in memory are called.
_SOURCE = "source"
#: A model's path, or its tensors by name.
Model = str | os.PathLike[str] | Mapping[str, Any]


def convert_lossless(
    source: Model,
    out: str | os.PathLike[str] | None,
    base: Model | None,
    choices: Mapping[str, object],
    zstd: bool,
    backend: str,
    metadata: Mapping[str, str] | None,
    context: str,
    progress: Progress | None,
) -> ConversionReport:
    """`convert` with `lossless`, whose arguments these are; `choices` are those for a selection, None if not given.

    Raises:
        ArgumentError: such an argument is given, or a file's name is needed.
    """
    if given := [name.replace("_", " ") for name, value in choices.items() if value is not None]:
        raise ArgumentError(f"lossless keeps everything as it is, so {', '.join(given)} cannot be chosen; leave it out")
    found, before = _located(source), None if base is None else _located(base)
    if isinstance(found, Path):
        target = target_of(found, out)
    elif out is None:
        raise ArgumentError("tensors in memory have no name for the file to write; give out=FILE")
    else:
        check_delta_target(target := Path(out))
    if before is None:
        where = found if isinstance(found, Path) else _SOURCE
        raise SourceError(f"{where}: lossless needs the checkpoint before it; give --base MODEL")
    pairs = base_names(before) if isinstance(before, Path) else {}
    if isinstance(found, Path):
        pairs = named(found, before if isinstance(before, Path) else None)
    return Lossless(
        source=_opened(found, _SOURCE, Wanted.SOURCE),
        base=_opened(before, "base", Wanted.BASE),
        target=target,
        pairs=pairs,
        zstd=zstd,
        backend=backend,
        metadata=metadata or {},
        context=context,
        progress=progress or (lambda what, done, total: None),
    ).write()


def _located(model: Model) -> Path | Mapping[str, Any]:
    """A model with the path of what is on the Hub."""
    return model if isinstance(model, Mapping) else local_model(model, pickles=True)


def _opened(model: Path | Mapping[str, Any], called: str, wanted: Wanted) -> Checkpoint:
    """A model's tensors, whatever their bits stand for."""
    if isinstance(model, Mapping):
        return HeldCheckpoint(called, model)
    refuse_several(model)
    return open_checkpoint(model, wanted, packed=True)


@dataclass(frozen=True)
class Lossless:
    """A conversion of everything that differs.

    Attributes:
        source, base: the next checkpoint and the one before it.
        target: the file to write.
        pairs: what the file says of the two.
        zstd: compress sections where that helps.
        backend: a name of `shiradelta.backends.choose.FILE_BACKENDS`, or "auto".
        metadata: further pairs for the file.
        context: one of `CONTEXTS`.
        progress: called with (what, done, total).
    """

    source: Checkpoint
    base: Checkpoint
    target: Path
    pairs: Mapping[str, str]
    zstd: bool
    backend: str
    metadata: Mapping[str, str]
    context: str
    progress: Progress

    def write(self) -> ConversionReport:
        """Writes the file, and compares what it gives with the source before it is put in place.

        Raises:
            SourceError: nothing differs, or the two have no tensor in common.
            TargetError: the file cannot be written, or does not give the source.
        """
        source, base = self.source, self.base
        names = _names(source, base)
        report = ConversionReport(os.fspath(source.root), os.fspath(self.target), 0.0, "lossless", lossless=True)
        scratch = self.target.absolute().parent
        parts = 3 if self.context == "base" else 2
        comparing, encoding, verifying = (part_of(self.progress, part, parts) for part in (0, 1, parts - 1))
        with replacing(self.target) as output, ExitStack() as stack:
            plain = output
            if self.context == "base":
                plain = stack.enter_context(tempfile.TemporaryFile(dir=scratch))
            packed = self.zstd and plain is output
            with writing_to(plain, "f32", self.zstd, self.backend, scratch, packed) as writer:
                work = ahead(lambda name: _encoded(writer, name, _difference(source, base, name)), names)
                for number, (name, tensor) in enumerate(zip(names, work, strict=True)):
                    comparing(name, number, len(names))
                    if tensor is not None:
                        record = tensor.record
                        writer.add_encoded(tensor, compress=2 * record.nnz > record.numel)
                        about = name, record.operation.name, record.shape, record.nnz, record.numel
                        report.tensors.append(TensorReport(*about, energy=0.0, lost=0.0, inexact=0))
                if not report.tensors:
                    raise SourceError(f"{source.root}: nothing differs from {base.root}; give the next checkpoint")
                writer.metadata.update(
                    {
                        "created_by": made_by(),
                        "method": "lossless",
                        "exactness": "exact",
                        **self.pairs,
                        **self.metadata,
                    }
                )
            if plain is not output:
                with self._opened(plain) as delta:
                    write_on_base(delta, base_of(delta, base), output, encoding, scratch=scratch)
            self._verify(output, source, base, verifying)
        changed = sum(tensor.nnz for tensor in report.tensors if not tensor.operation.creates)
        report.sparsity = changed / max(sum(slot.numel for slot in base.values()), 1)
        report.file_bytes = self.target.stat().st_size
        return report

    def _opened(self, output: IO[bytes]) -> Delta:
        """The file as far as it is written."""
        output.flush()
        mapped = mmap.mmap(output.fileno(), 0, access=mmap.ACCESS_READ)
        data = np.frombuffer(mapped, np.uint8)
        return parse_delta(data, os.fspath(self.target), self.backend, mapped, limit=_UNLIMITED)

    def _verify(self, output: IO[bytes], source: Checkpoint, base: Checkpoint, progress: Progress) -> None:
        """Reads the file and compares what it gives with the source, bit for bit."""
        with ExitStack() as stack:
            delta = stack.enter_context(self._opened(output))
            if delta.needs_base:
                delta = stack.enter_context(plain_delta(delta, base_of(delta, base)))
            delta.verify()
            # One buffer for all: memory that was not touched before takes longer to fill than to compare.
            largest = max((tensor.numel * tensor.record.element_size for tensor in delta.values()), default=0)
            room = np.empty(largest, np.uint8)
            for number, name in enumerate(delta):
                progress("verifying", number, len(delta))
                if not _gives(delta, name, source, base, room):
                    raise TargetError(f"{self.target}: tensor {name!r} would not be the source's; report this")


def _names(source: Checkpoint, base: Checkpoint) -> list[str]:
    """The names of all tensors, in byte order.

    Raises:
        SourceError: no name is in both.
    """
    if not set(source) & set(base):
        raise SourceError(
            f"{source.root}: has no tensor of {base.root}, by their names; give the checkpoint before it as the base"
        )
    return sorted({*source, *base}, key=str.encode)


def _difference(source: Checkpoint, base: Checkpoint, name: str) -> TensorDelta | None:
    """The change of one tensor, None if there is none."""
    step = changed(name, base, source)
    if step is None or step.operation.restructures:
        return step
    return smallest(step, base.bits(name), source.bits(name))


def _encoded(writer: DeltaWriter, name: str, tensor: TensorDelta | None) -> Encoded | None:
    return None if tensor is None else writer.encode(name, tensor)


def smallest(step: TensorDelta, old: Array, new: Array) -> TensorDelta:
    """The delta with the smallest sections that does what a step does.

    Args:
        step: sets the elements that differ.
        old: all elements' bits before, flat.
        new: all of them after.
    """
    step = shifted(step)
    if 2 * step.nnz <= old.size or step.all_positions:
        return step
    # Where most elements change, positions are a bitmap: one bit an element.
    size = ULP.encoded_size(step.bits()) if step.operation.shifts else BITS.size(step.nnz, old.itemsize)
    if size + old.size // 8 > BITS.size(old.size, old.itemsize):
        return TensorDelta.trusted(step.shape, None, new, step.dtype, "set", old)
    return step


def _gives(delta: Delta, name: str, source: Checkpoint, base: Checkpoint, room: Bytes) -> bool:
    """Whether a tensor of the file makes the base's tensor the source's; there is room for the tensor's bytes."""
    tensor = delta[name]
    operation = tensor.operation
    if (name in base, name in source) != (operation.in_base, operation.in_result):
        return False
    if not operation.in_result:
        return True
    new = source.bits(name)
    if operation.creates:
        return new.size == tensor.nnz and all(map(np.array_equal, tensor.bits_windows(), _cut(new)))
    old = base.bits(name)
    patched = room[: old.nbytes].view(old.dtype)
    np.copyto(patched, old)
    tensor.patch(patched, tensor.dtype)
    return all(np.array_equal(patched[start:stop], new[start:stop]) for start, stop in ranges(new.size, _BLOCK))


def _cut(bits: Array) -> Iterator[Array]:
    """In windows as a delta's are."""
    return (bits[start:stop] for start, stop in ranges(bits.size))
