"""What should a RICE block be?  The measurement behind FORMAT.md, "RICE".

Times one fused launch (decode, dequantise int8, add to bf16, save the old value) over the linear tensors
of a Llama-2-7B (random weights, independent positions, 224 tensors) for two families of layout:

* ``bits B``:  a block is B unary bits; one ``k`` a tensor; 8-byte directory entries (base, rank).
* ``count N/L``: a block is N nonzeros; its own ``k``, raised until its unary part fits in L bits;
  16-byte directory entries (base, unary word, low word, k).

Needs a GPU and Triton.  Run: ``python benchmarks/block_layout.py [--density 0.01] [--layers 32]``.
"""

# mypy: ignore-errors

from __future__ import annotations

import argparse
import math
import statistics

import torch
import triton
import triton.language as tl

SHAPES = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]


@triton.jit
def _add(lane, bit, low_value, base, rank0, k, values, scales, weight, saved, numel):
    """Positions from one block's lanes, then save, add and store.  Returns nothing."""
    ones = tl.cumsum(bit, 0)
    rank = ones - 1
    position = base + ((lane - rank) << k) + low_value + rank
    active = (bit == 1) & (position >= 0) & (position < numel)
    index = rank0 + rank
    code = tl.load(values + index, mask=active, other=0).to(tl.float32)
    scale = tl.load(scales + (index >> 7), mask=active, other=0.0).to(tl.float32)
    old = tl.load(weight + position, mask=active, other=0.0)
    tl.store(saved + index, old, mask=active)
    tl.store(weight + position, (old.to(tl.float32) + scale * code).to(tl.bfloat16), mask=active)


@triton.jit
def _low(low, index, k, bit):
    """The k low bits of the nonzeros `index`, and their running sum over the set lanes."""
    start = index.to(tl.int64) * k
    word = (start >> 5).to(tl.int32)
    shift = (start & 31).to(tl.uint32)
    first = tl.load(low + word, mask=bit == 1, other=0).to(tl.uint32, bitcast=True)
    second = tl.load(low + word + 1, mask=bit == 1, other=0).to(tl.uint32, bitcast=True)
    pair = first.to(tl.uint64) | (second.to(tl.uint64) << 32)
    value = (pair >> shift.to(tl.uint64)).to(tl.int32) & ((1 << k) - 1)
    return tl.cumsum(tl.where(bit == 1, value, 0), 0)


@triton.jit
def by_bits(table, block_tensor, block_first, BITS: tl.constexpr):
    program = tl.program_id(0)
    tensor = tl.load(block_tensor + program)
    block = program - tl.load(block_first + tensor)
    row = table + tensor * 9
    directory = tl.load(row + 0).to(tl.pointer_type(tl.int32))
    low = tl.load(row + 1).to(tl.pointer_type(tl.int32))
    unary = tl.load(row + 2).to(tl.pointer_type(tl.int32))
    values = tl.load(row + 3).to(tl.pointer_type(tl.int8))
    scales = tl.load(row + 4).to(tl.pointer_type(tl.bfloat16))
    weight = tl.load(row + 5).to(tl.pointer_type(tl.bfloat16))
    saved = tl.load(row + 6).to(tl.pointer_type(tl.bfloat16))
    k = tl.load(row + 7).to(tl.int32)
    numel = tl.load(row + 8).to(tl.int32)
    base = tl.load(directory + 2 * block)
    rank0 = tl.load(directory + 2 * block + 1)
    lane = tl.arange(0, BITS)
    word = tl.load(unary + block * (BITS // 32) + (lane >> 5))
    bit = (word >> (lane & 31)) & 1
    rank = tl.cumsum(bit, 0) - 1
    low_value = _low(low, rank0 + rank, k, bit)
    _add(lane, bit, low_value, base, rank0, k, values, scales, weight, saved, numel)


@triton.jit
def by_count(table, block_tensor, block_first, COUNT: tl.constexpr, LANES: tl.constexpr):
    program = tl.program_id(0)
    tensor = tl.load(block_tensor + program)
    block = program - tl.load(block_first + tensor)
    row = table + tensor * 9
    directory = tl.load(row + 0).to(tl.pointer_type(tl.int32))
    values = tl.load(row + 3).to(tl.pointer_type(tl.int8))
    scales = tl.load(row + 4).to(tl.pointer_type(tl.bfloat16))
    weight = tl.load(row + 5).to(tl.pointer_type(tl.bfloat16))
    saved = tl.load(row + 6).to(tl.pointer_type(tl.bfloat16))
    nnz = tl.load(row + 7).to(tl.int32)
    numel = tl.load(row + 8).to(tl.int32)
    base = tl.load(directory + 4 * block)
    unary = tl.load(row + 2).to(tl.pointer_type(tl.int32)) + tl.load(directory + 4 * block + 1)
    low = tl.load(row + 1).to(tl.pointer_type(tl.int32)) + tl.load(directory + 4 * block + 2)
    k = tl.load(directory + 4 * block + 3)
    rank0 = block * COUNT
    count = tl.minimum(nnz - rank0, COUNT)
    lane = tl.arange(0, LANES)
    word = tl.load(unary + (lane >> 5))
    bit = (word >> (lane & 31)) & 1
    rank = tl.cumsum(bit, 0) - 1
    bit = tl.where(rank < count, bit, 0)
    low_value = _low(low, rank, k, bit)
    _add(lane, bit, low_value, base, rank0, k, values, scales, weight, saved, numel)


@triton.jit
def strided(table, block_tensor, block_first, LANES: tl.constexpr, STRIDE: tl.constexpr):
    """The floor: as many read-save-writes at a fixed stride, nothing decoded."""
    program = tl.program_id(0)
    tensor = tl.load(block_tensor + program)
    block = program - tl.load(block_first + tensor)
    row = table + tensor * 9
    weight = tl.load(row + 5).to(tl.pointer_type(tl.bfloat16))
    saved = tl.load(row + 6).to(tl.pointer_type(tl.bfloat16))
    numel = tl.load(row + 8).to(tl.int32)
    index = block * LANES + tl.arange(0, LANES)
    position = index * STRIDE
    active = position < numel
    old = tl.load(weight + position, mask=active, other=0.0)
    tl.store(saved + index, old, mask=active)
    tl.store(weight + position, (old.to(tl.float32) + 0.01).to(tl.bfloat16), mask=active)


def pack_words(bit_offset: torch.Tensor, value: torch.Tensor, total_bits: int) -> torch.Tensor:
    """int32 words with value[i] laid at bit_offset[i] (values below 2^31, fields do not overlap)."""
    words = torch.zeros(total_bits // 32 + 4, dtype=torch.int64, device=value.device)
    wide = value << (bit_offset & 31)
    words.scatter_add_(0, bit_offset >> 5, wide & 0xFFFFFFFF)
    words.scatter_add_(0, (bit_offset >> 5) + 1, wide >> 32)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def best_k(gap_mean: float) -> int:
    p = 1 / gap_mean
    cost = [k + 1 + (1 - p) ** (2**k) / (1 - (1 - p) ** (2**k)) for k in range(24)]
    return cost.index(min(cost))


def encode_bits(gaps: torch.Tensor, k: int, block_bits: int):
    """(directory, low, unary, blocks, index bits) of the layout `bits`."""
    nnz = gaps.numel()
    q, r = gaps >> k, gaps & ((1 << k) - 1)
    stop = torch.cumsum(q + 1, 0) - 1  # unary index of each one
    position = torch.cumsum(gaps + 1, 0) - 1
    bits = int(stop[-1]) + 1
    blocks = math.ceil(bits / block_bits)
    edge = torch.arange(blocks, device=gaps.device) * block_bits
    rank = torch.searchsorted(stop, edge)
    before = torch.where(rank > 0, position[(rank - 1).clamp(min=0)], -1) + 1
    passed = edge - torch.where(rank > 0, stop[(rank - 1).clamp(min=0)] + 1, 0)
    base = before + (passed << k)
    directory = torch.stack([base, rank], 1).to(torch.int32).contiguous()
    low = pack_words(torch.arange(nnz, device=gaps.device) * k, r, nnz * k)
    unary = pack_words(stop, torch.ones_like(stop), blocks * block_bits)
    return directory, low, unary, blocks, nnz * k + bits + 64 * blocks


def encode_count(gaps: torch.Tensor, k: int, count: int, lanes: int):
    """(directory, low, unary, blocks, index bits) of the layout `count`; k rises where a block is too long."""
    nnz, device = gaps.numel(), gaps.device
    blocks = math.ceil(nnz / count)
    padded = torch.zeros(blocks * count, dtype=torch.int64, device=device)
    padded[:nnz] = gaps
    grid = padded.view(blocks, count)
    ks = torch.full((blocks,), k, dtype=torch.int64, device=device)
    while True:
        length = (grid >> ks[:, None]).sum(1) + count
        too_long = length > lanes
        if not bool(too_long.any()):
            break
        ks += too_long.long()
    q, r = grid >> ks[:, None], grid & ((1 << ks[:, None]) - 1)
    unary_words = (length + 31) // 32
    low_words = (count * ks + 31) // 32
    unary_first = torch.cumsum(unary_words, 0) - unary_words
    low_first = torch.cumsum(low_words, 0) - low_words
    stop = torch.cumsum(q + 1, 1) - 1 + unary_first[:, None] * 32
    slot = torch.arange(count, device=device)[None, :] * ks[:, None] + low_first[:, None] * 32
    unary = pack_words(stop.flatten(), torch.ones_like(padded), int(unary_words.sum()) * 32 + lanes)
    low = pack_words(slot.flatten(), r.flatten(), int(low_words.sum()) * 32)
    position = torch.cumsum(gaps + 1, 0) - 1
    base = torch.zeros(blocks, dtype=torch.int64, device=device)
    base[1:] = position[count - 1 : nnz - 1 : count][: blocks - 1] + 1
    directory = torch.stack([base, unary_first, low_first, ks], 1).to(torch.int32).contiguous()
    bits = int(unary_words.sum() + low_words.sum()) * 32 + 128 * blocks
    return directory, low, unary, blocks, bits


def milliseconds(call, repeats: int = 15) -> float:
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--layers", type=int, default=32)
    options = parser.parse_args()
    device = torch.device("cuda")
    torch.manual_seed(0)
    shapes = SHAPES * options.layers
    weights = [torch.randn(s, device=device).to(torch.bfloat16) for s in shapes]
    copy = [torch.empty_like(w) for w in weights]
    gaps = []
    for w in weights:
        g = torch.empty(int(w.numel() * options.density * 1.2) + 64, device=device)
        g.geometric_(options.density)
        g = g.long() - 1
        gaps.append(g[: int(torch.searchsorted(torch.cumsum(g + 1, 0), w.numel()))])
    nnz = sum(g.numel() for g in gaps)
    values = [torch.randint(-127, 128, (g.numel() + 8,), device=device).to(torch.int8) for g in gaps]
    scales = [torch.rand(g.numel() // 128 + 2, device=device).mul(1e-4).to(torch.bfloat16) for g in gaps]
    saved = [torch.empty(g.numel() + 4096, dtype=torch.bfloat16, device=device) for g in gaps]
    k = best_k(1 / options.density)

    def launch(kernel, parts, blocks, column7, **meta):
        rows = [
            [
                *(p.data_ptr() for p in parts[i]),
                values[i].data_ptr(),
                scales[i].data_ptr(),
                weights[i].data_ptr(),
                saved[i].data_ptr(),
                column7[i],
                weights[i].numel(),
            ]
            for i in range(len(shapes))
        ]
        table = torch.tensor(rows, dtype=torch.int64, device=device)
        owner = torch.repeat_interleave(torch.arange(len(blocks)), torch.tensor(blocks)).int().to(device)
        first = (torch.cumsum(torch.tensor(blocks), 0) - torch.tensor(blocks)).int().to(device)
        return lambda: kernel[(sum(blocks),)](table, owner, first, enable_fp_fusion=False, **meta)

    def check(call) -> None:
        tensor = 0
        position = torch.cumsum(gaps[tensor] + 1, 0) - 1
        before = weights[tensor].flatten()[position].clone()
        index = torch.arange(position.numel(), device=device)
        add = scales[tensor][index >> 7].float() * values[tensor][index].float()
        call()
        torch.cuda.synchronize()
        assert torch.equal(saved[tensor][: position.numel()], before), "saved values differ"
        after = weights[tensor].flatten()[position]
        assert torch.equal(after, (before.float() + add).to(torch.bfloat16)), "results differ"

    entropy = -(math.log2(options.density) + (1 / options.density - 1) * math.log2(1 - options.density))
    copy_ms = milliseconds(lambda: torch._foreach_copy_(copy, weights))
    print(
        f"{torch.cuda.get_device_name()}, {len(shapes)} tensors, {nnz / 1e6:.1f} M nonzeros of "
        f"{sum(w.numel() for w in weights) / 1e9:.2f} G ({options.density:.2%}), k={k}, "
        f"entropy {entropy:.3f} bits"
    )
    print(f"{'layout':>20} {'warps':>5} {'bits/nnz':>8} {'x entropy':>9} {'ms':>7} {'x copy':>7}")
    print(f"{'copy of the weights':>20} {'':>5} {'':>8} {'':>9} {copy_ms:7.2f} {1:7.2f}")

    def row(name, call, bits, warps):
        ms = milliseconds(call)
        size = f"{bits / nnz:8.3f} {bits / nnz / entropy:9.4f}" if bits else f"{'':>8} {'':>9}"
        print(f"{name:>20} {warps:>5} {size} {ms:7.2f} {ms / copy_ms:7.2f}", flush=True)

    blocks = [math.ceil(g.numel() / 512) for g in gaps]
    call = launch(
        strided,
        [(w, w, w) for w in weights],
        blocks,
        [0] * len(shapes),
        LANES=512,
        STRIDE=int(1 / options.density),
        num_warps=4,
    )
    row("stride, no decoding", call, 0, 4)
    for block_bits in (512, 1024, 2048, 4096):
        encoded = [encode_bits(g, k, block_bits) for g in gaps]
        for warps in (2, 4, 8):
            call = launch(
                by_bits,
                [e[:3] for e in encoded],
                [e[3] for e in encoded],
                [k] * len(shapes),
                BITS=block_bits,
                num_warps=warps,
            )
            if warps == 4:
                check(call)
            row(f"bits {block_bits}", call, sum(e[4] for e in encoded), warps)
        del encoded, call
    for count, lanes in ((448, 1024), (512, 1024), (512, 2048), (896, 2048), (1024, 2048), (1024, 4096)):
        encoded = [encode_count(g, k, count, lanes) for g in gaps]
        for warps in (4, 8):
            call = launch(
                by_count,
                [e[:3] for e in encoded],
                [e[3] for e in encoded],
                [g.numel() for g in gaps],
                COUNT=count,
                LANES=lanes,
                num_warps=warps,
            )
            if warps == 4:
                check(call)
            row(f"count {count}/{lanes}", call, sum(e[4] for e in encoded), warps)
        del encoded, call


if __name__ == "__main__":
    main()
