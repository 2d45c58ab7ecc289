"""Where the sections of patches are on a device, and in them their parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from numpy.typing import NDArray

from shiradelta.format import registry
from shiradelta.format.codecs.base import TorchDecoder
from shiradelta.format.codecs.packing import field_words
from shiradelta.format.registry import word_size
from shiradelta.hotswap.resident import Residents


class Sections(NamedTuple):
    """A patch's sections on the device.

    Attributes:
        buffer: uint8, with the sections of all patches of a delta.
        codec: that of the values; it differs from the file's if the device cannot decode that.
        index_at: where the index is in the buffer.
        index_size: its bytes.
        values_at: where the values are.
        values_size: their bytes.
        k: RICE's.
        unary_bits: RICE's.
        low: the offset of the low bits in the index.
        unary: the offset of the unary part in the index.
        codes: the offset of the codes in the values.
    """

    buffer: torch.Tensor
    codec: TorchDecoder
    index_at: int
    index_size: int
    values_at: int
    values_size: int
    k: int
    unary_bits: int
    low: int
    unary: int
    codes: int

    @property
    def index_bytes(self) -> torch.Tensor:
        """uint8."""
        return self.buffer[self.index_at : self.index_at + self.index_size]

    @property
    def values_bytes(self) -> torch.Tensor:
        """uint8."""
        return self.buffer[self.values_at : self.values_at + self.values_size]


class SectionTable(Sequence[Sections]):
    """The sections of patches on the device, as columns.

    Args:
        buffer: uint8, with all of them.
        every: where they came from.
        starts: where each part starts in the buffer, int64 [2 n].
        nnz: nonzeros of each patch, int64 [n].
        numel: elements of each patch's tensor, int64 [n].
        codecs: that of each one's values [n].

    Attributes:
        buffer: as it was given.
        codecs: as it was given.
        columns: the other fields of `Sections`, int64 [n] each.
    """

    def __init__(
        self,
        buffer: torch.Tensor,
        every: Residents,
        starts: NDArray[np.int64],
        nnz: Any,
        numel: Any,
        codecs: Sequence[TorchDecoder],
    ) -> None:
        self.buffer, self.codecs = buffer, codecs
        sizes: Any = every.parts.stops - every.parts.starts
        k: Any = every.k  # functions of one number take a column
        low = registry.RICE_HEAD.size + -(-every.unary_bits // registry.BLOCK_BITS) * 2 * word_size(numel)
        codes = np.zeros_like(nnz)
        for codec in set(codecs):
            own = np.array([one is codec for one in codecs], np.bool_)
            codes[own] = codec.codes_at(nnz[own])
        self.columns: dict[str, NDArray[np.int64]] = {
            "index_at": starts[::2],
            "index_size": sizes[::2],
            "values_at": starts[1::2],
            "values_size": sizes[1::2],
            "k": k,
            "unary_bits": every.unary_bits,
            "low": low,
            "unary": low + 4 * field_words(nnz, k),
            "codes": codes,
        }

    def __len__(self) -> int:
        return len(self.codecs)

    @overload
    def __getitem__(self, number: int) -> Sections: ...
    @overload
    def __getitem__(self, number: slice) -> list[Sections]: ...
    def __getitem__(self, number: int | slice) -> Sections | list[Sections]:
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        fields = {name: int(column[number]) for name, column in self.columns.items()}
        return Sections(self.buffer, self.codecs[number], **fields)
