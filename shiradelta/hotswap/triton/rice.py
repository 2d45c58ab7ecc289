"""RICE made on a device by kernels: a program for each 1,024 nonzeros of a tensor (FORMAT.md, 4.2)."""

# mypy: ignore-errors

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from shiradelta.hotswap.bits_there import owners, sent
from shiradelta.hotswap.rice_there import RicePlaces, TorchRice
from shiradelta.hotswap.triton.counted import launch
from shiradelta.util.arrays import exclusive

Tensor = torch.Tensor
#: Nonzeros of a program.
BLOCK = 1024
#: The columns of a tensor's row, all int64.
_START = tl.constexpr(0)  # its first nonzero
_STOP = tl.constexpr(1)
_PROGRAM = tl.constexpr(2)  # number of the program of its first nonzeros
_K = tl.constexpr(3)
_LOW = tl.constexpr(4)  # bit of its first low field in all words
_UNARY = tl.constexpr(5)  # bit of its first unary bit, less one, and less what tensors before it have
_WIDTH = tl.constexpr(6)


@triton.jit
def _gaps(table, tensor_of, positions, BLOCK: tl.constexpr):
    """(row of a tensor, numbers of nonzeros, which of them there are, their gaps)."""
    row = table + tl.load(tensor_of + tl.program_id(0)).to(tl.int64) * _WIDTH
    start = tl.load(row + _START)
    number = start + (tl.program_id(0) - tl.load(row + _PROGRAM)) * BLOCK + tl.arange(0, BLOCK)
    inside = number < tl.load(row + _STOP)
    position = tl.load(positions + number, mask=inside, other=0)
    before = tl.load(positions + number - 1, mask=inside & (number > start), other=-1)
    return row, number, inside, position - before - 1


@triton.jit
def length_kernel(table, tensor_of, positions, lengths, BLOCK: tl.constexpr):
    """Unary bits of each nonzero, int32."""
    row, number, inside, gap = _gaps(table, tensor_of, positions, BLOCK)
    tl.store(lengths + number, ((gap >> tl.load(row + _K).to(gap.dtype)) + 1).to(tl.int32), mask=inside)


@triton.jit
def put_kernel(table, tensor_of, positions, ends, words, BLOCK: tl.constexpr):
    """Sets low fields and unary bits in words that are zero; `ends` is the bits up to each nonzero's."""
    row, number, inside, gap = _gaps(table, tensor_of, positions, BLOCK)
    k = tl.load(row + _K)
    low = gap.to(tl.int64) & ((tl.full([1], 1, tl.int64) << k) - 1)
    at = tl.load(row + _LOW) + (number - tl.load(row + _START)) * k
    both = low << (at & 31)
    tl.atomic_or(words + (at >> 5), both.to(tl.int32), mask=inside & (both.to(tl.int32) != 0))
    tl.atomic_or(words + (at >> 5) + 1, (both >> 32).to(tl.int32), mask=inside & ((both >> 32) != 0))
    bit = tl.load(row + _UNARY) + tl.load(ends + number, mask=inside, other=0)
    one = (tl.full(bit.shape, 1, tl.int64) << (bit & 31)).to(tl.int32)
    tl.atomic_or(words + (bit >> 5), one, mask=inside)


class TritonRice(TorchRice):
    """Encodes positions with two kernels."""

    def __init__(self, positions: Tensor, counts, ks) -> None:
        super().__init__(positions, counts, ks)
        sizes = np.array(counts)
        programs = -(-sizes // BLOCK)
        self._tensor_of = owners(programs, positions.device)
        starts = exclusive(sizes)
        self._rows = np.stack((starts, starts + sizes, exclusive(programs), np.array(ks)))

    def _run(self, kernel, rows, *arguments) -> None:
        table = sent(np.ascontiguousarray(np.concatenate(rows).T), self.positions.device)
        launch(
            kernel,
            self._tensor_of.numel(),
            self.positions.device,
            table,
            self._tensor_of,
            self.positions,
            *arguments,
            BLOCK=BLOCK,
        )

    def ends(self) -> Tensor:
        lengths = torch.empty(self.positions.numel(), dtype=torch.int32, device=self.positions.device)
        self._run(length_kernel, (self._rows, np.zeros_like(self._rows[:2])), lengths)
        return lengths.cumsum(0)

    def put(self, words: Tensor, places: RicePlaces, ends: Tensor, before) -> None:
        low, unary = 32 * np.array(places.low), 32 * np.array(places.unary) - np.array(before) - 1
        self._run(put_kernel, (self._rows, [low, unary]), ends, words)
