"""The fused backend: every tensor of a device in one launch.

What one adapter alone does to a contiguous tensor goes through the kernels; tensors that several adapters change
together, and strided ones, take the way of plain torch operations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

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

#: Warps of a program, whose lanes are 2,048.  More hide more of the scattered writes; of those measured the fastest.
_WARPS = 8
_BIG = 1 << 31

#: Of the kernels' table.
Row = tuple[int, ...]
Item = TypeVar("Item")
_UNARY_BITS, _SAVED, _STRENGTH = (kernels.COLUMNS.index(name) for name in ("unary_bits", "saved", "strength"))
_serials = count()


@dataclass(frozen=True, eq=False)
class _Grid:
    """What is the same in all launches over some patches: their rows, and which program has which patch."""

    rows: NDArray[np.int64]
    owner: torch.Tensor  # int32 [programs]
    first: torch.Tensor  # int64 [patches]: its first program


@dataclass(frozen=True, eq=False)
class _Held(Sections):
    """Sections, and what a launch needs to know of them: looked up once, for a switch is short.

    `values` is (value codec, dtype); `elements` is (bytes of one, bytes of a directory's word, whether positions
    pass 2^31).
    """

    row: Row
    fused: bool  # else plain torch has to do it
    kind: tuple[int, str]
    elements: tuple[int, int, bool]
    serial: int = field(default_factory=lambda: next(_serials))
    grids: dict[tuple[int, ...], _Grid] = field(default_factory=dict)  # of patches that start with this one

    @classmethod
    def beside(cls, patch: Patch) -> _Held:
        """Of a patch with nothing but its sections."""
        record = patch.record
        return cls(
            **vars(patch.data),
            row=_row(patch),
            fused=record.nnz > 0 and bool(patch.target.tensor.is_contiguous()),
            kind=(int(record.value_codec), patch.dtype),
            elements=(
                wire.DTYPE_OF_NAME[patch.dtype].size,
                wire.word_size(record.numel),
                record.numel >= _BIG,
            ),
        )


class TritonBackend(TorchBackend):
    """A CUDA or ROCm device (or, in Triton's interpreter, the CPU)."""

    name = "triton"

    # --------------------------------------------------------------------------------------- loading

    def hold(self, source: Bytes, tensors: Sequence[tuple[StoredTensor, Target, str]]) -> list[Patch]:
        """The index's structure is checked on the device that decodes it; checksums and values on the host."""
        patches = [replace(patch, data=_Held.beside(patch)) for patch in super().hold(source, tensors)]
        mine = [i for i, (tensor, _, _) in enumerate(tensors) if _is_rice(tensor)]
        with self.ordered(None):
            wrong = self._sums(
                [patches[i] for i in mine],
                [(patches[i].data.elements[1],) for i in mine],
                lambda group, sums, word: self._launch(kernels.check_kernel, group, sums, WORD=word),
            )
        for i, blocks in zip(mine, wrong, strict=True):
            if blocks:
                tensors[i][0].positions()  # says what is wrong
                raise FormatError("bad_directory", tensor=tensors[i][0].record.name)
        return patches

    def _checked(self, source: Bytes, tensor: StoredTensor) -> tuple[Bytes, Bytes]:
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
            plain,
            [patch.data.elements for patch in plain],
            lambda group, sums, size, word, big: self._launch(
                kernels.fingerprint_kernel, group, sums, SIZE=size, WORD=word, BIG=big
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
        keys = [(*layer.patch.data.kind, *layer.patch.data.elements) for layer in fused]
        for (codec, dtype, size, word, big), layers in _groups(keys, fused).items():
            self._launch_on(layers, kernels.apply_kernel, CODEC=codec, DTYPE=dtype, SIZE=size, WORD=word, BIG=big)
            for layer in layers:
                layer.filled = True
        super().apply([stack for stack in stacks if len(stack) > 1 or not stack[0].patch.data.fused])
        self._used(fused)

    def restore(self, layers: Sequence[Layer]) -> None:
        """Likewise."""
        fused = [layer for layer in layers if layer.patch.data.fused]
        keys = [layer.patch.data.elements for layer in fused]
        for (size, word, big), group in _groups(keys, fused).items():
            self._launch_on(group, kernels.restore_kernel, SIZE=size, WORD=word, BIG=big)
        super().restore([layer for layer in layers if not layer.patch.data.fused])
        self._used(fused)

    # -------------------------------------------------------------------------------------- launching

    def _launch_on(self, layers: Sequence[Layer], kernel: Any, **kind: Any) -> None:
        """With what layers save, and their strengths as the bits of a float32."""
        saved = [layer.saved.data_ptr() for layer in layers]
        strengths = np.array([layer.strength for layer in layers], np.float32).view(np.int32)
        self._launch(kernel, [layer.patch for layer in layers], columns={_SAVED: saved, _STRENGTH: strengths}, **kind)

    def _launch(
        self,
        kernel: Any,
        patches: Sequence[Patch],
        *sums: torch.Tensor,
        columns: Mapping[int, Any] = MappingProxyType({}),
        **kind: Any,
    ) -> None:
        """A program for each block of each patch."""
        grid = self._grid(patches)
        rows = grid.rows.copy()
        for column, content in columns.items():
            rows[:, column] = content
        table = self._uploaded(torch.from_numpy(rows))
        kernel[(grid.owner.numel(),)](
            table, grid.owner, grid.first, *sums, **kind, num_warps=_WARPS, enable_fp_fusion=False
        )

    def _grid(self, patches: Sequence[Patch]) -> _Grid:
        """Made once for the same patches, and gone with the first of them."""
        grids: dict[tuple[int, ...], _Grid] = patches[0].data.grids
        key = tuple(patch.data.serial for patch in patches)
        if key not in grids:
            rows = np.array([patch.data.row for patch in patches], np.int64)
            blocks = -(-rows[:, _UNARY_BITS] // wire.BLOCK_BITS)
            owner = torch.from_numpy(np.repeat(np.arange(len(rows), dtype=np.int32), blocks))
            first = torch.from_numpy(np.cumsum(blocks) - blocks)
            grids.clear()  # the last use is the likeliest to come again
            grids[key] = _Grid(rows, owner.to(self.device), first.to(self.device))
        return grids[key]

    def _uploaded(self, tensor: torch.Tensor) -> torch.Tensor:
        """On the device, without waiting for it."""
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def _sums(self, patches: Sequence[Patch], keys: Sequence[Any], launch: Callable[..., None]) -> list[int]:
        """What a kernel adds up for each patch."""
        found: dict[Patch, int] = {}
        for key, group in _groups(keys, patches).items():
            sums = torch.zeros(len(group), dtype=torch.int64, device=self.device)
            launch(group, sums, *key)
            found |= zip(group, sums.tolist(), strict=True)
        return [found[patch] for patch in patches]


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


def _groups(keys: Sequence[Any], items: Sequence[Item]) -> dict[Any, list[Item]]:
    """Key -> its items."""
    groups: dict[Any, list[Item]] = {}
    for key, item in zip(keys, items, strict=True):
        groups.setdefault(key, []).append(item)
    return groups


def _is_rice(tensor: StoredTensor) -> bool:
    return tensor.record.index_codec is IndexCodec.RICE


def _crc_is_right(source: Bytes, section: Section) -> bool:
    return crc32(source[section.offset : section.offset + section.stored]) == section.crc


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
