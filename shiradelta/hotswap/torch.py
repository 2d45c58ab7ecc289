"""The backend in plain torch operations, for any device that torch has.

Positions are stored as RICE, whatever index codec the file has, so a device needs to decode only one codec.  Bits are
signed integers of the elements' size, which every device can index and compare.
"""

# mypy: disable-error-code="no-any-return, no-untyped-call"
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from operator import call
from typing import Any

import torch

from shiradelta.errors import DeltaError, FormatError
from shiradelta.format import arithmetic, registry
from shiradelta.format.codecs import BITS, F32, VALUE_CODECS
from shiradelta.format.codecs.base import Bytes, TorchDecoder, ValueCodec
from shiradelta.format.codecs.bits import bits_dtype
from shiradelta.format.record import Record
from shiradelta.format.registry import ORDERED, Order
from shiradelta.hotswap.bits_there import fields_at, ones_of
from shiradelta.hotswap.checks import checks_of
from shiradelta.hotswap.elementwise import Elementwise
from shiradelta.hotswap.from_base import ElementsThere, TorchFromBase
from shiradelta.hotswap.layers import Held, Layer, Patch
from shiradelta.hotswap.on_device import resident_on_base
from shiradelta.hotswap.protocol import Fit
from shiradelta.hotswap.resident import NOTHING, Resident, SectionPart, Sections, residents, sections_of
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

    def all_elements(self, target: Target) -> Elements:
        return ElementsThere(self.from_base, flat(target))

    def hold(self, files: Sequence[tuple[Bytes, Sequence[Fit]]]) -> Held:
        """Copies all sections into one buffer on the device, aligned as in a file; other threads check them."""
        fits = [(source, *fit) for source, tensors in files for fit in tensors]
        records = [tensor.record for _, tensor, _, _ in fits]
        codecs = self._resident(records)
        others = [tensor for _, tensor, _, _ in fits if not tensor.record.needs_base]
        try:
            with meanwhile(call, checks_of(others, THREADS)):
                every = self._residents(fits, codecs)
                buffer, starts = self._upload([part for kept in every for part in (kept.positions, kept.values)])
                sections = sections_of(buffer, every, starts, records, codecs)
                targets, dtypes = [target for _, _, target, _ in fits], [dtype for *_, dtype in fits]
                held = Held(list(map(Patch, targets, records, dtypes, sections)), buffer.numel())
                self.arrange(held)
            if len(others) < len(fits):
                self.check_base(held)
            return held
        finally:
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()  # the sources may be freed now

    def arrange(self, held: Held) -> None:
        """Makes `held.data`, while the sections are checked: no work that reads them may be queued here."""

    def _residents(
        self, fits: Sequence[tuple[Bytes, StoredTensor, Target, str]], codecs: Sequence[TorchDecoder]
    ) -> list[Resident]:
        """The sections of tensors as the device keeps them: in the file, new bytes, or made on the device."""
        every = [(source, tensor, codec) for (source, tensor, _, _), codec in zip(fits, codecs, strict=True)]
        on_base = [i for i, (_, tensor, _) in enumerate(every) if tensor.record.needs_base]
        if not on_base:
            return residents(every)
        with self.ordered(self.stream(None), reads=True):
            made = self.read_on_base([(*fits[i][:3], codecs[i]) for i in on_base])
        there = dict(zip(on_base, made, strict=True))
        others = iter(residents([one for i, one in enumerate(every) if i not in there]))
        return [there[i] if i in there else next(others) for i in range(len(every))]

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

    def _upload(self, parts: Sequence[SectionPart]) -> tuple[Tensor, list[int]]:
        """(a buffer on the device, the offset of each part in it).  Neighbours in a file take one copy.

        Keep the parts alive until the copy has finished.
        """
        copies: list[tuple[int, SectionPart]] = []
        starts: list[int] = []
        source: Bytes | Tensor = NOTHING
        first, stop, at = 0, 0, 0  # the copy that the part before belongs to, and where it goes
        for part in parts:
            if part.source is not source or part.start != registry.align(stop, registry.SECTION_ALIGNMENT):
                copies.append((at, SectionPart(source, first, stop)))
                at = registry.align(at + stop - first, registry.SECTION_ALIGNMENT)
                source, first = part.source, part.start
            starts.append(at + part.start - first)
            stop = part.stop
        copies.append((at, SectionPart(source, first, stop)))
        buffer = torch.empty(at + stop - first, dtype=torch.uint8, device=self.device)
        for start, part in copies:
            if part.size:
                buffer[start : start + part.size].copy_(part.content, non_blocking=True)
        return buffer, starts

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
                layer.held.patches[0].data.buffer.record_stream(current)

    def replace(self, before: Sequence[Layer], after: Sequence[Layer]) -> None:
        super().replace(before, after)
        self._used([*before, *after])

    # -------------------------------------------------------------------------------------- decoding

    def decodes(self, codec: TorchDecoder) -> bool:
        """Whether the device decodes this codec; values in other codecs are decoded when a file is loaded."""
        return True

    def _resident(self, records: Sequence[Record]) -> list[TorchDecoder]:
        """The codecs of tensors' values on the device."""
        kinds = {(record.value_codec, record.adds) for record in records}
        found = {(own, adds): self._resident_codec(VALUE_CODECS.by_id.get(own), adds) for own, adds in kinds}
        return [found[record.value_codec, record.adds] for record in records]

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
