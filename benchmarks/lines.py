"""What a switch costs at least: the memory's lines that hold a nonzero, touched once each in the order of addresses.

`python -m benchmarks.lines` on a GPU, in one run: a copy of the weights in one piece; known positions read, written and
both; whole sectors (32 bytes) and lines (64, 128 bytes) that hold one, written and both; and `HotSwap`.  Linear layers
in the shapes of Llama-2-7B, bf16, independent positions at 1 %.
"""

# mypy: ignore-errors

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch.profiler import ProfilerActivity, profile

import shiradelta as sd
from benchmarks.switch import Stage, for_all_layers, one_layer
from benchmarks.table import print_table

DENSITY = 0.01
#: Positions of a program, and its warps: of those tried, the fastest where both read and written.
BLOCK, WARPS = 1024, 8
#: Sectors or lines of a program.
ROWS = 128


@triton.jit
def elements_kernel(weight, positions, count, BLOCK: tl.constexpr, READ: tl.constexpr, WRITE: tl.constexpr):
    """Reads or writes single elements, or adds 1 to them."""
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    active = lane < count
    at = weight + tl.load(positions + lane, mask=active, other=0)
    value = tl.full([BLOCK], 1, tl.int16)
    if READ:
        value += tl.load(at, mask=active, other=0)
    if WRITE:
        tl.store(at, value, mask=active)
    else:
        tl.store(at, value, mask=active & (value == 0))  # never, which the compiler cannot know


@triton.jit
def lines_kernel(words, lines, count, ROWS: tl.constexpr, WIDTH: tl.constexpr, READ: tl.constexpr):
    """Writes whole lines of WIDTH words, or adds 1 to each word."""
    lane = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    active = (lane < count)[:, None]
    line = tl.load(lines + lane, mask=lane < count, other=0).to(tl.int64)
    at = words + line[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    value = tl.full([ROWS, WIDTH], 1, tl.int32)
    if READ:
        value += tl.load(at, mask=active, other=0)
    tl.store(at, value, mask=active)


def milliseconds(work: Callable[[], object], repeats: int) -> float:
    """Median, by the device's clock."""
    for _ in range(2):
        work()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def positions_of(numel: int, device: str) -> torch.Tensor:
    """Independent positions, int64, in increasing order."""
    gaps = torch.empty(round(numel * DENSITY), device=device).geometric_(DENSITY).long()
    positions = gaps.cumsum(0) - 1
    return positions[positions < numel]


def touches(weight: torch.Tensor, positions: torch.Tensor) -> dict[str, Callable[[], object]]:
    """What is measured on a tensor of int16, by name."""

    def elements(read: bool, write: bool) -> Callable[[], object]:
        grid = (triton.cdiv(len(positions), BLOCK),)
        arguments = weight, positions, len(positions)
        return lambda: elements_kernel[grid](*arguments, BLOCK=BLOCK, READ=read, WRITE=write, num_warps=WARPS)

    def lines(size: int, read: bool) -> Callable[[], object]:
        found = torch.unique_consecutive(positions // (size // 2)).int()
        grid = (triton.cdiv(len(found), ROWS),)
        arguments = weight.view(torch.int32), found, len(found)
        return lambda: lines_kernel[grid](*arguments, ROWS=ROWS, WIDTH=size // 4, READ=read)

    return {
        "elements read": elements(True, False),
        "elements written": elements(False, True),
        "elements read and written": elements(True, True),
        **{f"whole lines of {size} bytes written": lines(size, False) for size in (32, 64, 128)},
        **{f"whole lines of {size} bytes read and written": lines(size, True) for size in (32, 64, 128)},
    }


def switches(stage: Stage) -> Iterator[tuple[str, float]]:
    """Milliseconds of one adapter's switch and revert: of the kernel alone, and as the caller waits for them."""
    swap = sd.HotSwap(stage.model, backend="triton")
    swap.load("adapter", for_all_layers(one_layer(stage, DENSITY, 0), stage.layers))
    apply = partial(swap.switch, "adapter")
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(stage.repeats):
            apply()
            swap.revert()
        stage.wait()
    kernels = {event.key: event.device_time / 1e3 for event in found.key_averages()}
    yield "HotSwap's kernel: apply", kernels["apply_kernel"]
    yield "HotSwap's kernel: revert", kernels["restore_kernel"]
    yield "HotSwap: apply", 1e3 * stage.seconds(apply, swap.revert)
    apply()
    yield "HotSwap: revert", 1e3 * stage.seconds(swap.revert, apply)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    stage = Stage("cuda", options.layers, options.repeats)
    numel = sum(weight.numel() for weight in stage.weights())
    weight = torch.zeros(numel, dtype=torch.int16, device="cuda")
    copy = milliseconds(partial(torch.empty_like(weight).copy_, weight), options.repeats)
    works = touches(weight, positions_of(numel, "cuda"))
    found = {name: milliseconds(work, options.repeats) for name, work in works.items()} | dict(switches(stage))
    rows = [["", "ms", "x a copy"]]
    rows += [[name, f"{ms:.2f}", f"{ms / copy:.3f}"] for name, ms in ({"a copy in one piece": copy} | found).items()]
    card = torch.cuda.get_device_name()
    print_table(f"lines that hold 1 % of {numel / 1e9:.2f} G elements of bf16, {card}, torch {torch.__version__}", rows)


if __name__ == "__main__":
    main()
