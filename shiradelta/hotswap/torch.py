"""The backend in plain torch operations, for any device that torch has.

Positions are stored as RICE, whatever index codec the file has, so a device needs to decode only one codec.  Bits are
signed integers of the elements' size, which every device can index and compare.
"""

# mypy: disable-error-code="no-any-return, no-untyped-call"
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import accumulate
from operator import methodcaller
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shiradelta.errors import DeltaError, FormatError
from shiradelta.format import arithmetic, registry
from shiradelta.format.codecs import BITS, F32, VALUE_CODECS
from shiradelta.format.codecs.base import Bytes, TorchDecoder, ValueCodec
from shiradelta.format.codecs.bits import bits_dtype
from shiradelta.format.operations import OPERATIONS
from shiradelta.format.registry import ORDERED, Order
from shiradelta.hotswap.bits_there import fields_at, ones_of
from shiradelta.hotswap.checks import pieces_of
from shiradelta.hotswap.elementwise import Elementwise
from shiradelta.hotswap.fits import FitColumns, Fits
from shiradelta.hotswap.from_base import ElementsThere, TorchFromBase
from shiradelta.hotswap.layers import Held, Layer, Patch, Stack, together
from shiradelta.hotswap.on_device import resident_on_base
from shiradelta.hotswap.resident import Resident, Residents, SectionParts, residents
from shiradelta.hotswap.section_table import Sections, SectionTable
from shiradelta.io.reader import StoredTensor
from shiradelta.io.restored import Elements
from shiradelta.models.live import Target
from shiradelta.models.memory import is_array
from shiradelta.util.threads import THREADS, meanwhile

Tensor = torch.Tensor


class TorchBackend(Elementwise):
    """The backend of one device.  Its work runs in the order of the calls, whatever the streams."""

    name = "torch"
    xp = torch
    from_base = TorchFromBase()
    reads_on_base = True

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self._stream: torch.cuda.Stream | None = None
        self._streams: set[Any] = set()

    # ---------------------------------------------------------------------------------------- memory

    def buffer(self, size: int) -> Bytes:
        """Pinned, so that copies to the device run at full speed."""
        pinned = self.device.type == "cuda"
        empty: Bytes = torch.empty(size, dtype=torch.uint8, pin_memory=pinned).numpy()
        return empty

    def all_elements(self, target: Target, below: Stack) -> Elements:
        bits = flat(target)
        return ElementsThere(self.from_base, self.lay_over(bits.clone(), below) if below else bits)

    def hold(self, files: Sequence[Fits]) -> Held:
        """Copies all sections into one buffer on the device, aligned as in a file; threads read and check them."""
        fits = [one.columns for one in files]
        try:
            with meanwhile(methodcaller("check"), pieces_of(files, THREADS), methodcaller("read")):
                for unread in [one.unread for one in files if one.unread is not None]:
                    unread.check_read()
                codecs = [codec for one in fits for codec in self._resident(one)]
                every = self._residents(files, codecs)
                buffer, starts = self._upload(every.parts)
                nnz, numel = together([one.nonzeros for one in fits]), together([one.numel for one in fits])
                held = Held(fits, SectionTable(buffer, every, starts, nnz, numel, codecs), buffer.numel())
                self.arrange(held)
            if any(one.needs_base.any() for one in fits):
                self.check_base(held)
            return held
        finally:
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()  # the sources may be freed now

    def arrange(self, held: Held) -> None:
        """Makes `held.data`, while the sections are checked: no work that reads them may be queued here."""

    def _residents(self, files: Sequence[Fits], codecs: Sequence[TorchDecoder]) -> Residents:
        """The sections of tensors as the device keeps them: in the file, new bytes, or made on the device."""
        made, places, on_base, at = [], [], [], 0
        for source, delta, fits, _ in files:
            own, needs_base = codecs[at : at + len(fits)], fits.needs_base
            chosen = np.flatnonzero(~needs_base)
            here = fits if chosen.size == len(fits) else fits.some(chosen)
            made.append(residents(source, delta, here, [own[number] for number in chosen.tolist()]))
            places += [chosen + at]
            for number in np.flatnonzero(needs_base).tolist():
                tensor = delta[delta.table.names[fits.numbers[number]]]
                on_base.append((at + number, (source, tensor, fits.targets[number], own[number])))
            at += len(fits)
        if on_base:
            with self.ordered(self.stream(None), reads=True):
                made.append(Residents.of(self.read_on_base([given for _, given in on_base])))
            places.append(np.array([number for number, _ in on_base]))
        return Residents.together(made, np.argsort(np.concatenate(places)))

    def read_on_base(self, tensors: Sequence[tuple[Bytes, StoredTensor, Target, TorchDecoder]]) -> list[Resident]:
        """Decodes tensors that are read with their base only, and encodes them anew, on the device.

        Args:
            tensors: (the file, the tensor, its base, the codec of the values on the device).

        Raises:
            FormatError: a section is damaged, or was made for another base.
            LimitError: a tensor takes too much memory.
        """
        return [
            resident_on_base(source, tensor, flat(target), self.from_base, codec)
            for source, tensor, target, codec in tensors
        ]

    def check_base(self, held: Held) -> None:
        """Compares fingerprints of what is read with its base only: they tell that positions are right.

        Raises:
            FormatError: the weights are not the ones that a tensor was made for.
        """
        with self.ordered(self.stream(None), reads=True):
            found = self.fingerprints(held, [])()
        for patch, fingerprint in zip(held.patches, found, strict=True):
            if patch.record.needs_base and fingerprint != patch.record.base_fingerprint:
                raise FormatError("wrong_base", tensor=patch.record.name)

    def _upload(self, parts: SectionParts) -> tuple[Tensor, NDArray[np.int64]]:
        """(a buffer on the device, the offset of each part in it).  Neighbours in a file take one copy.

        Keep the parts alive until the copy has finished.
        """
        copies, number_of = parts.joined(registry.SECTION_ALIGNMENT)
        ends = [0, *accumulate(registry.align(part.size, registry.SECTION_ALIGNMENT) for part in copies)]
        buffer = torch.empty(ends[-2] + copies[-1].size if copies else 0, dtype=torch.uint8, device=self.device)
        for start, part in zip(ends, copies, strict=False):
            if part.size:
                buffer[start : start + part.size].copy_(part.content, non_blocking=True)
        moved = np.array([start - part.start for start, part in zip(ends, copies, strict=False)], np.int64)
        return buffer, parts.starts + moved[number_of]

    def room(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def bits_type(self, dtype: str) -> torch.dtype:
        return bits_dtype(registry.DTYPE_OF_NAME[dtype].size)

    def stream(self, given: Any) -> Any:
        if self.device.type != "cuda":
            return None
        of_device = given is not None and given.device == self.device
        return given if of_device else torch.cuda.current_stream(self.device)

    def ordered(self, stream: Any, reads: bool = False) -> AbstractContextManager[None]:
        """Queues work on the stream, after everything on the stream that last wrote.

        So a forward pass queued there after that write still sees the weights that it wrote.
        """
        return self._queued(stream, reads) if self.device.type == "cuda" else torch.inference_mode()

    @contextmanager
    def _queued(self, stream: Any, reads: bool) -> Iterator[None]:
        with torch.inference_mode(), torch.cuda.device(self.device), torch.cuda.stream(stream):
            if self._stream is not None and self._stream != stream:
                stream.wait_stream(self._stream)
            if not reads:
                self._stream = stream
            self._streams.add(stream)
            yield

    def _used(self, layers: Sequence[Layer]) -> None:
        """Keeps the allocator from reusing memory that another stream still reads."""
        if len(self._streams) > 1:
            current = torch.cuda.current_stream(self.device)
            for layer in layers:
                layer.room.record_stream(current)
                layer.held.datas.buffer.record_stream(current)

    def replace(self, before: Sequence[Layer], after: Sequence[Layer]) -> None:
        super().replace(before, after)
        self._used([*before, *after])

    # -------------------------------------------------------------------------------------- decoding

    def decodes(self, codec: TorchDecoder) -> bool:
        """Whether the device decodes this codec; values in other codecs are decoded when a file is loaded."""
        return True

    def _resident(self, fits: FitColumns) -> list[TorchDecoder]:
        """The codecs of tensors' values on the device."""
        kinds = list(zip(fits.rows["value_codec"].tobytes(), fits.rows["operation"].tobytes(), strict=True))
        found = {
            (own, done): self._resident_codec(VALUE_CODECS.by_id.get(own), OPERATIONS.by_id[done].adds)
            for own, done in set(kinds)
        }
        return [found[kind] for kind in kinds]

    def _resident_codec(self, own: ValueCodec | None, adds: bool) -> TorchDecoder:
        """The codec of values on the device that a file has in another; None for no values."""
        if isinstance(own, TorchDecoder) and self.decodes(own):
            return own
        return F32 if adds else BITS

    def positions(self, patch: Patch) -> Tensor:
        """Decodes all blocks at once, as `codecs.rice` does."""
        sections: Sections = patch.data
        nnz, k = patch.record.nnz, sections.k
        if not nnz:
            return torch.zeros(0, dtype=torch.int64, device=self.device)
        index = sections.index_bytes
        unary = index[sections.unary : sections.unary + -(-sections.unary_bits // 8)]
        ones = ones_of(unary)[:nnz]
        rank = torch.arange(nnz, device=self.device)
        positions = ((ones - rank) << k) + rank
        if k:
            # The last field's next word is unary bits or slack.
            fields = fields_at(index[sections.low : sections.unary + 8], rank * k, k)
            positions += fields.cumsum(0)
        return positions

    def payload(self, patch: Patch) -> Tensor:
        sections: Sections = patch.data
        if patch.record.nnz:
            return sections.codec.decode_torch(sections.values_bytes, patch.record.nnz, patch.record.element_size)
        return torch.zeros(
            0, dtype=torch.float32 if patch.record.adds else self.bits_type(patch.dtype), device=self.device
        )

    # ------------------------------------------------------------------------------------- elements

    def read(self, target: Target, positions: Tensor) -> Tensor:
        elements, index = _elements(target, positions)
        return elements[index]

    def write(self, target: Target, positions: Tensor, bits: Tensor) -> None:
        elements, index = _elements(target, positions)
        elements[index] = bits

    def merge(self, parts: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        union, indices = torch.unique(torch.cat(list(parts)), return_inverse=True)
        return union, list(indices.split([len(part) for part in parts]))

    def zeros(self, like: Tensor, dtype: str) -> Tensor:
        return torch.zeros(like.shape, dtype=getattr(torch, dtype), device=self.device)

    def scaled(self, values: Tensor, strength: float) -> Tensor:
        # As in the reference, strength 1 takes no product.
        return values if strength == 1 else values * torch.tensor(strength, dtype=torch.float32, device=self.device)

    def plus(self, one: Tensor, other: Tensor) -> Tensor:
        return one + other

    def add(self, bits: Tensor, dtype: str, contribution: Tensor) -> Tensor:
        """Adds in float32.

        Raises:
            DeltaError: the format defines no sums of this dtype.
        """
        if dtype not in _ROUNDED:
            raise DeltaError(f"{dtype} elements cannot be added to; take {', '.join(_ROUNDED)}")
        floats = bits.view(getattr(torch, dtype))
        weight = floats.float()
        total = weight + contribution
        rounded = _ROUNDED[dtype](total)
        quiet = arithmetic.QUIET_NAN[dtype]
        return torch.where(weight.isnan(), bits, torch.where(total.isnan(), quiet, rounded))

    def shift(self, bits: Tensor, dtype: str, shifts: Tensor) -> Tensor:
        """Adds in the highest bits of int64, which wraps."""
        order = ORDERED[dtype]
        unused = 64 - 8 * bits.element_size()
        magnitude = ((1 << 63) - 1) >> unused << unused

        def turned(whole: Tensor) -> Tensor:
            if order is Order.SIGN_AND_MAGNITUDE:
                return whole ^ ((whole >> 63) & magnitude)
            return whole ^ (-1 << 63) if order is Order.UNSIGNED else whole

        start, by = turned(bits.to(torch.int64) << unused), shifts.to(torch.int64) << unused
        end = start + by
        if bool((((start ^ end) & (by ^ end)) < 0).any()):
            raise arithmetic.out_of_range("an element")
        return (turned(end) >> unused).to(bits.dtype)

    def fingerprint(self, positions: Tensor, bits: Tensor) -> int:
        """Computes in int64, which wraps; masks make shifts logical."""
        with torch.inference_mode():
            size = bits.element_size()
            wide = bits.to(torch.int64)
            if size < 8:
                wide = wide & ((1 << 8 * size) - 1)
            x = positions * _signed(0x9E3779B97F4A7C15) + (wide + 1) * _signed(0xD1B54A32D192ED03)
            x = (x ^ ((x >> 32) & 0xFFFFFFFF)) * _signed(0xD6E8FEB86659FD93)
            x = x ^ ((x >> 32) & 0xFFFFFFFF)
            return int(x.sum()) % (1 << 64)


def _bfloat16_bits(values: Tensor) -> Tensor:
    """Rounds by integer arithmetic, as the reference does."""
    whole = values.view(torch.int32)
    return ((whole + ((whole >> 16) & 1) + 0x7FFF) >> 16).to(torch.int16)


#: Dtype -> the function that rounds float32 to its bits.
_ROUNDED: dict[str, Callable[[Tensor], Tensor]] = {
    "float32": lambda values: values.view(torch.int32),
    "float16": lambda values: values.to(torch.float16).view(torch.int16),
    "bfloat16": _bfloat16_bits,
}


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >> 63 else constant


def flat(target: Target) -> Tensor:
    """All elements of a tensor as integers, row by row: its memory as it is if it is contiguous."""
    return _bits(target).reshape(-1)


def _bits(target: Target) -> Tensor:
    """The tensor's elements as integers that share its memory."""
    tensor = torch.from_numpy(target.tensor) if is_array(target.tensor) else target.tensor
    return tensor.view(bits_dtype(tensor.element_size()))


def _elements(target: Target, positions: Tensor) -> tuple[Tensor, Any]:
    """The tensor's elements as integers that share its memory, and an index of the positions into them."""
    elements = _bits(target)
    if elements.is_contiguous():
        return elements.view(-1), positions
    return elements, torch.unravel_index(positions, elements.shape)
