"""The fused backend: every tensor of a device in one launch.

What one adapter alone does to a contiguous tensor goes through the kernels; tensors that several adapters change
together, and strided ones, take the way of plain torch operations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch

from shiradelta import wire
from shiradelta.codecs import VALUE_CODECS
from shiradelta.codecs.base import Bytes
from shiradelta.codecs.rice import section_size
from shiradelta.engine import triton_kernels as kernels
from shiradelta.engine.live import Target
from shiradelta.engine.live_backend import Layer, Patch, Stack
from shiradelta.engine.torch_backend import Sections, TorchBackend, stored_bytes
from shiradelta.errors import FormatError
from shiradelta.header import Record, Section, crc32
from shiradelta.reader import StoredTensor
from shiradelta.wire import IndexCodec

#: Of a program; 2,048 lanes.  Measured on an H100: benchmarks/switch.py.
_WARPS = 4
_BIG = 1 << 31


#: Of the kernels' table.
Row = tuple[int, ...]
Item = TypeVar("Item")
_UNARY_BITS = kernels.COLUMNS.index("unary_bits")


@dataclass(frozen=True)
class _Fused:
    """What the kernels need to know of a patch: all that stays as it is is looked up once, for a switch is short.

    `values` is (value codec, dtype); `elements` is (bytes of one, bytes of a directory's word, whether positions
    pass 2^31).
    """

    row: Row
    values: tuple[int, str]
    elements: tuple[int, int, bool]

    @classmethod
    def of(cls, patch: Patch) -> _Fused | None:
        """None where plain torch has to do it."""
        record = patch.record
        if not record.nnz or not patch.target.tensor.is_contiguous():
            return None
        size, word = wire.DTYPE_OF_NAME[patch.dtype].size, wire.word_size(record.numel)
        return cls(_row(patch), (int(record.value_codec), patch.dtype), (size, word, record.numel >= _BIG))


@dataclass(frozen=True, eq=False)
class _Held(Sections):
    fused: _Fused | None = None


class TritonBackend(TorchBackend):
    """A CUDA or ROCm device (or, in Triton's interpreter, the CPU)."""

    name = "triton"

    # --------------------------------------------------------------------------------------- loading

    def hold(self, source: bytes, tensors: Sequence[tuple[StoredTensor, Target, str]]) -> list[Patch]:
        """The index's structure is checked on the device that decodes it; checksums and values on the host."""
        patches = super().hold(source, tensors)
        mine = [i for i, (tensor, _, _) in enumerate(tensors) if _is_rice(tensor)]
        with self.ordered(None):
            wrong = self._sums(
                [_row(patches[i]) for i in mine],
                [(wire.word_size(patches[i].record.numel),) for i in mine],
                lambda rows, sums, word: self._launch(kernels.check_kernel, rows, sums, WORD=word),
            )
        for i, count in zip(mine, wrong, strict=True):
            if count:
                tensors[i][0].positions()  # says what is wrong
                raise FormatError("bad_directory", tensor=tensors[i][0].record.name)
        return [replace(patch, data=_Held(**vars(patch.data), fused=_Fused.of(patch))) for patch in patches]

    def _checked(self, source: bytes, tensor: StoredTensor) -> tuple[Bytes, Bytes]:
        """(index, values), of which the index has been looked at from outside."""
        if not _is_rice(tensor):
            return super()._checked(source, tensor)
        record = tensor.record
        index, values = stored_bytes(source, record.index), stored_bytes(source, record.values)
        if not (_crc_is_right(source, record.index) and _frame_is_sound(index, record)):
            tensor.positions()  # says what is wrong
        try:
            if not _crc_is_right(source, record.values):
                raise FormatError("section_checksum")
            VALUE_CODECS[record.value_codec].check(values, record.nnz, record.element_size)
        except FormatError as error:
            error.tensor, error.offset = record.name, record.values.offset
            raise
        return index, values

    def fingerprints(self, patches: Sequence[Patch], below: Mapping[Target, Stack]) -> list[int]:
        """Fused where nothing is on the tensor yet."""
        plain = [patch for patch in patches if patch.data.fused and patch.target not in below]
        sums = self._sums(
            [patch.data.fused.row for patch in plain],
            [patch.data.fused.elements for patch in plain],
            lambda rows, sums, size, word, big: self._launch(
                kernels.fingerprint_kernel, rows, sums, SIZE=size, WORD=word, BIG=big
            ),
        )
        found = dict(zip(plain, sums, strict=True))
        rest = [patch for patch in patches if patch not in found]
        found |= zip(rest, super().fingerprints(rest, below), strict=True)
        return [found[patch] % (1 << 64) for patch in patches]

    # ------------------------------------------------------------------------------------- switching

    def apply(self, stacks: Sequence[Stack]) -> None:
        """One launch for each kind of values and elements; a model has one, as a rule."""
        fused = [stack[0] for stack in stacks if len(stack) == 1 and stack[0].patch.data.fused]
        keys = [(*layer.patch.data.fused.values, *layer.patch.data.fused.elements) for layer in fused]
        for key, layers in _groups(keys, fused).items():
            codec, dtype, size, word, big = key
            self._launch(kernels.apply_kernel, _rows(layers), CODEC=codec, DTYPE=dtype, SIZE=size, WORD=word, BIG=big)
            for layer in layers:
                layer.filled = True
        super().apply([stack for stack in stacks if len(stack) > 1 or not stack[0].patch.data.fused])
        self._used(fused)

    def restore(self, layers: Sequence[Layer]) -> None:
        """Likewise."""
        fused = [layer for layer in layers if layer.patch.data.fused]
        keys = [layer.patch.data.fused.elements for layer in fused]
        for (size, word, big), group in _groups(keys, fused).items():
            self._launch(kernels.restore_kernel, _rows(group), SIZE=size, WORD=word, BIG=big)
        super().restore([layer for layer in layers if not layer.patch.data.fused])
        self._used(fused)

    # -------------------------------------------------------------------------------------- launching

    def _launch(self, kernel: Any, rows: Sequence[Row], *sums: torch.Tensor, **kind: Any) -> None:
        """A program for each block of each row's tensor."""
        blocks = np.array([-(-row[_UNARY_BITS] // wire.BLOCK_BITS) for row in rows])
        owner = torch.from_numpy(np.repeat(np.arange(len(rows), dtype=np.int32), blocks)).to(self.device)
        first = torch.from_numpy(np.cumsum(blocks) - blocks).to(self.device)
        table = torch.tensor(rows, dtype=torch.int64).to(self.device)
        kernel[(owner.numel(),)](table, owner, first, *sums, **kind, num_warps=_WARPS, enable_fp_fusion=False)

    def _sums(self, rows: Sequence[Row], keys: Sequence[Any], launch: Callable[..., None]) -> list[int]:
        """What a kernel adds up for each row."""
        found: dict[int, int] = {}
        for key, places in _groups(keys, range(len(rows))).items():
            sums = torch.zeros(len(places), dtype=torch.int64, device=self.device)
            launch([rows[i] for i in places], sums, *key)
            found |= zip(places, sums.tolist(), strict=True)
        return [found[i] for i in range(len(rows))]


def _row(patch: Patch) -> Row:
    """A row of the kernels' table, with nothing saved and no strength."""
    sections: Sections = patch.data
    index, values = sections.index.data_ptr(), sections.values.data_ptr()
    return (
        index + wire.RICE_HEAD.size,
        index + sections.low,
        index + sections.unary,
        values + sections.codes,
        values,
        patch.target.tensor.data_ptr(),
        sections.k,
        sections.unary_bits,
        patch.record.nnz,
        patch.record.numel,
        0,
        0,
    )


def _rows(layers: Sequence[Layer]) -> list[Row]:
    """Rows with what layers save, and their strengths as the bits of a float32."""
    strengths = {
        strength: int(np.float32(strength).view(np.int32)) for strength in {layer.strength for layer in layers}
    }
    return [(*layer.patch.data.fused.row[:-2], layer.saved.data_ptr(), strengths[layer.strength]) for layer in layers]


def _groups(keys: Sequence[Any], items: Sequence[Item]) -> dict[Any, list[Item]]:
    """Key -> its items."""
    groups: dict[Any, list[Item]] = {}
    for key, item in zip(keys, items, strict=True):
        groups.setdefault(key, []).append(item)
    return groups


def _is_rice(tensor: StoredTensor) -> bool:
    return tensor.record.index_codec is IndexCodec.RICE


def _crc_is_right(source: bytes, section: Section) -> bool:
    return crc32(np.frombuffer(source, np.uint8, section.stored, section.offset)) == section.crc


def _frame_is_sound(index: Bytes, record: Record) -> bool:
    """What of FORMAT.md, 4.2, can be seen without decoding: head, size, unused bits, slack."""
    k, unary_bits = wire.RICE_HEAD.unpack_from(index.data)
    if k > wire.MAX_RICE_K or index[1:8].any() or section_size(record.nnz, record.numel, k, unary_bits) != index.size:
        return False
    words = index[: index.size - wire.SLACK].view("<u4")
    unary = index.size // 4 - wire.SLACK // 4 - -(-unary_bits // 32)
    unused_low, unused_unary = record.nnz * k % 32, unary_bits % 32
    return not (
        (unused_low and words[unary - 1] >> unused_low)
        or (unused_unary and words[-1] >> unused_unary)
        or index[-wire.SLACK :].any()
    )
