"""The backend in plain torch operations, for any device that torch has.

Positions are kept as RICE, whatever the file has: what a device decodes is then one codec, and any set of positions
fits it.  Bits are signed integers of the elements' size, which every device can index and compare.
"""

# mypy: disable-error-code="no-any-return, no-untyped-call"
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from shiradelta import arithmetic, wire
from shiradelta.codecs.base import Bytes
from shiradelta.codecs.bits import field_words
from shiradelta.codecs.rice import Rice
from shiradelta.engine.live import Target, is_array
from shiradelta.engine.live_backend import Elementwise, Layer, Patch, Stack
from shiradelta.engine.reading import in_threads
from shiradelta.header import Record, Section
from shiradelta.reader import StoredTensor
from shiradelta.reference import unzstd
from shiradelta.wire import IndexCodec, ValueCodec

Tensor = torch.Tensor

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, eq=False)
class Sections:
    """A patch's sections on the device, out of zstd and with RICE for an index; uint8.

    `low` and `unary` are where these parts of the index start, `codes` where the values' codes do, in bytes.
    """

    index: Tensor
    values: Tensor
    k: int
    unary_bits: int
    low: int
    unary: int
    codes: int

    @classmethod
    def of(cls, index: Tensor, values: Tensor, head: bytes, record: Record) -> Sections:
        """From a patch's sections and the first bytes of its index."""
        k, unary_bits = wire.RICE_HEAD.unpack(head) if head else (0, 0)
        low = wire.RICE_HEAD.size + -(-unary_bits // wire.BLOCK_BITS) * 2 * wire.word_size(record.numel)
        groups = -(-record.nnz // wire.GROUP)
        codes = {ValueCodec.I8: wire.align(2 * groups, 4), ValueCodec.SIGN: wire.align(2 * groups, 4)}
        codes[ValueCodec.I4] = 4 * groups
        unary = low + 4 * field_words(record.nnz, k)
        return cls(index, values, k, unary_bits, low, unary, codes.get(record.value_codec, 0))

    @property
    def blocks(self) -> int:
        """Of the index."""
        return -(-self.unary_bits // wire.BLOCK_BITS)


class TorchBackend(Elementwise):
    """One device.  Its work is in the order of the device's streams that it was given."""

    name = "torch"
    xp = torch

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self._last: torch.cuda.Event | None = None
        self._streams: set[Any] = set()

    # ---------------------------------------------------------------------------------------- memory

    def buffer(self, size: int) -> Bytes:
        """Pinned, so that what is read into it goes to the device at full speed."""
        pinned = self.device.type == "cuda"
        empty: Bytes = torch.empty(size, dtype=torch.uint8, pin_memory=pinned).numpy()
        return empty

    def hold(self, source: Bytes, tensors: Sequence[tuple[StoredTensor, Target, str]]) -> list[Patch]:
        """One buffer on the device for all sections, each where a file would align it."""
        pairs = in_threads(lambda item: self._checked(source, item[0]), tensors)
        parts = [part for pair in pairs for part in pair]
        spans = _spans([part.size for part in parts])
        buffer = torch.empty(spans[-1].stop if spans else 0, dtype=torch.uint8, device=self.device)
        views = [buffer[span.start : span.start + part.size] for span, part in zip(spans, parts, strict=True)]
        for view, part in zip(views, parts, strict=True):
            view.copy_(torch.from_numpy(part), non_blocking=True)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # the source is free to go
        patches = []
        for i, ((tensor, target, dtype), (index, _)) in enumerate(zip(tensors, pairs, strict=True)):
            head = index[: wire.RICE_HEAD.size].tobytes()
            patches.append(
                Patch(target, tensor.record, dtype, Sections.of(views[2 * i], views[2 * i + 1], head, tensor.record))
            )
        return patches

    def _checked(self, source: Bytes, tensor: StoredTensor) -> tuple[Bytes, Bytes]:
        """(index as RICE, values) of a tensor that decodes without an error; arrays that may be written to."""
        record, positions = tensor.record, tensor.positions()
        tensor.bits()
        if record.index_codec is IndexCodec.RICE:
            index = stored_bytes(source, record.index)
        else:
            encoded = Rice().encode(positions, record.shape) if record.nnz else b""
            index = np.frombuffer(bytearray(encoded), np.uint8)
        return index, stored_bytes(source, record.values)

    def room(self, patches: Sequence[Patch]) -> list[Tensor]:
        """Parts of one buffer for each type of elements."""
        rooms: dict[Patch, Tensor] = {}
        for kind in {_bits_type(patch.dtype) for patch in patches}:
            mine = [patch for patch in patches if _bits_type(patch.dtype) is kind]
            sizes = [patch.record.nnz for patch in mine]
            rooms |= zip(mine, torch.empty(sum(sizes), dtype=kind, device=self.device).split(sizes), strict=True)
        return [rooms[patch] for patch in patches]

    def nbytes(self, patches: Sequence[Patch]) -> int:
        """The sections."""
        return sum(patch.data.index.numel() + patch.data.values.numel() for patch in patches)

    @contextmanager
    def ordered(self, stream: Any) -> Iterator[None]:
        """Work is queued on the stream, behind what was queued on another before."""
        with torch.inference_mode(), self._on(stream):
            if self.device.type != "cuda":
                yield
                return
            current = torch.cuda.current_stream()
            if self._last is not None:
                current.wait_event(self._last)
            self._streams.add(current)
            try:
                yield
            finally:
                self._last = current.record_event()

    @contextmanager
    def _on(self, stream: Any) -> Iterator[None]:
        inner: AbstractContextManager[Any] = nullcontext() if stream is None else torch.cuda.stream(stream)
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext(), inner:
            yield

    def _used(self, layers: Sequence[Layer]) -> None:
        """Keeps the allocator from reusing memory that another stream still reads."""
        if len(self._streams) > 1:
            current = torch.cuda.current_stream(self.device)
            for layer in layers:
                for tensor in (layer.saved, layer.patch.data.index, layer.patch.data.values):
                    tensor.record_stream(current)

    def apply(self, stacks: Sequence[Stack]) -> None:
        """As every backend."""
        super().apply(stacks)
        self._used([layer for stack in stacks for layer in stack])

    def restore(self, layers: Sequence[Layer]) -> None:
        """As every backend."""
        super().restore(layers)
        self._used(layers)

    # -------------------------------------------------------------------------------------- decoding

    def positions(self, patch: Patch) -> Tensor:
        """All blocks at once, as `codecs.rice` does."""
        sections: Sections = patch.data
        nnz, k = patch.record.nnz, sections.k
        if not nnz:
            return torch.zeros(0, dtype=torch.int64, device=self.device)
        unary = sections.index[sections.unary : sections.unary + -(-sections.unary_bits // 8)]
        eight = torch.arange(8, dtype=torch.uint8, device=self.device)
        ones = ((unary[:, None] >> eight) & 1).view(-1).nonzero().view(-1)[:nnz]
        rank = torch.arange(nnz, device=self.device)
        positions = ((ones - rank) << k) + rank
        if k:
            # Two words, so that a field that crosses from one to the next is whole; the slack is behind the last.
            words = sections.index[sections.low : sections.unary + 8].view(torch.int32)
            at = rank * k
            word = at >> 5
            pair = (words[word].to(torch.int64) & 0xFFFFFFFF) | (words[word + 1].to(torch.int64) << 32)
            positions += ((pair >> (at & 31)) & ((1 << k) - 1)).cumsum(0)
        return positions

    def payload(self, patch: Patch) -> Tensor:
        """Values as float32, or elements."""
        record, data = patch.record, patch.data.values
        nnz, codec = record.nnz, record.value_codec
        if not nnz:
            return torch.zeros(0, dtype=torch.float32 if record.adds else _bits_type(patch.dtype), device=self.device)
        groups = -(-nnz // wire.GROUP)
        rank = torch.arange(nnz, device=self.device)
        if codec is ValueCodec.BITS:
            return data[: nnz * record.element_size].view(_bits_type(patch.dtype))
        if codec is ValueCodec.F32:
            return data[: 4 * nnz].view(torch.float32)
        if codec in (ValueCodec.F16, ValueCodec.BF16):
            return data[: 2 * nnz].view(torch.float16 if codec is ValueCodec.F16 else torch.bfloat16).float()
        group = rank // wire.GROUP
        if codec is ValueCodec.I4:
            lo, step = data[: 4 * groups].view(torch.bfloat16).float().view(groups, 2).unbind(1)
            nibble = (data[patch.data.codes + rank // 2] >> (rank % 2 * 4).to(torch.uint8)) & 15
            magnitude = lo[group] + step[group] * (nibble & 7).float()
            return torch.where(nibble > 7, -magnitude, magnitude)
        scale = data[: 2 * groups].view(torch.bfloat16).float()[group]
        codes = patch.data.codes
        if codec is ValueCodec.I8:
            return scale * data[codes : codes + nnz].view(torch.int8).float()
        minus = (data[codes + rank // 8] >> (rank % 8).to(torch.uint8)) & 1
        return torch.where(minus > 0, -scale, scale)

    # ------------------------------------------------------------------------------------- elements

    def read(self, target: Target, positions: Tensor) -> Tensor:
        """A gather."""
        elements, index = _elements(target, positions)
        return elements[index]

    def write(self, target: Target, positions: Tensor, bits: Tensor) -> None:
        """A scatter."""
        elements, index = _elements(target, positions)
        elements[index] = bits

    def merge(self, parts: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """By sorting."""
        union, places = torch.unique(torch.cat(list(parts)), return_inverse=True)
        return union, list(places.split([len(part) for part in parts]))

    def zeros(self, like: Tensor, dtype: str) -> Tensor:
        """On the device."""
        return torch.zeros(like.shape, dtype=getattr(torch, dtype), device=self.device)

    def scaled(self, values: Tensor, strength: float) -> Tensor:
        """As the reference: strength 1 changes nothing."""
        return values if strength == 1 else values * torch.tensor(strength, dtype=torch.float32, device=self.device)

    def plus(self, one: Tensor, other: Tensor) -> Tensor:
        """As it is."""
        return one + other

    def add(self, bits: Tensor, dtype: str, contribution: Tensor) -> Tensor:
        """Rounds bf16 by integer arithmetic, as the reference."""
        floats = bits.view(getattr(torch, dtype))
        weight = floats.float()
        total = weight + contribution
        if dtype == "bfloat16":
            whole = total.view(torch.int32)
            rounded = ((whole + ((whole >> 16) & 1) + 0x7FFF) >> 16).to(torch.int16)
        else:
            rounded = total.to(floats.dtype).view(bits.dtype)
        quiet = arithmetic.QUIET_NAN[dtype]
        return torch.where(weight.isnan(), bits, torch.where(total.isnan(), quiet, rounded))

    def fingerprint(self, positions: Tensor, bits: Tensor) -> int:
        """In int64, which wraps; shifts are made logical by masking."""
        with torch.inference_mode():
            size = bits.element_size()
            wide = bits.to(torch.int64)
            if size < 8:
                wide = wide & ((1 << 8 * size) - 1)
            x = positions * _signed(0x9E3779B97F4A7C15) + (wide + 1) * _signed(0xD1B54A32D192ED03)
            x = (x ^ ((x >> 32) & 0xFFFFFFFF)) * _signed(0xD6E8FEB86659FD93)
            x = x ^ ((x >> 32) & 0xFFFFFFFF)
            return int(x.sum()) % (1 << 64)


def _spans(sizes: Sequence[int]) -> list[slice]:
    """Where parts of these sizes lie in one buffer, aligned as in a file."""
    ends = np.cumsum([wire.align(size, wire.SECTION_ALIGNMENT) for size in sizes], dtype=np.int64).tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def stored_bytes(source: Bytes, section: Section) -> Bytes:
    """A section's bytes, out of zstd."""
    stored = source[section.offset : section.offset + section.stored]
    return np.frombuffer(bytearray(unzstd(stored, section.decoded)), np.uint8) if section.zstd else stored


def _bits_type(dtype: str) -> torch.dtype:
    return _BITS[wire.DTYPE_OF_NAME[dtype].size]


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >> 63 else constant


def _elements(target: Target, positions: Tensor) -> tuple[Tensor, Any]:
    """The tensor's elements as integers that share its memory, and an index of the positions into them."""
    tensor = torch.from_numpy(target.tensor) if is_array(target.tensor) else target.tensor
    elements = tensor.view(_BITS[tensor.element_size()])
    if elements.is_contiguous():
        return elements.view(-1), positions
    return elements, torch.unravel_index(positions, elements.shape)
