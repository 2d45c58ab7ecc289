"""libshd against its peers: decoding positions, patching a layer, encoding.  All in one run, on one machine.

Peers that are not installed are left out with a word: `pip install libstreamvbyte pyroaring`.
"""

from __future__ import annotations

import importlib
import tempfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from ctypes import byref, c_uint64
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import shiradelta
from benchmarks import models
from benchmarks.table import print_table, seconds
from shiradelta.backends.choose import choose
from shiradelta.backends.libshd.decoder import LoadedTensor, NativeDecoder, apply_sum
from shiradelta.backends.libshd.library import library
from shiradelta.format.arithmetic import Array
from shiradelta.format.registry import IndexId, ValueId
from shiradelta.util import threads as machine

DENSITY = 0.01
RANK = 16
REPEATS = 9
#: Numbers of enum shd_check.
CHECK_ALL, SCALAR = 2, 16


def peer(name: str) -> Any | None:
    """A module, if it is installed."""
    with suppress(ImportError):
        return importlib.import_module(name)
    return None


def random_delta(shape: tuple[int, int], seed: int = 0) -> shiradelta.TensorDelta:
    """Independent positions and normal values, for bf16 weights."""
    generator = np.random.default_rng(seed)
    positions = np.flatnonzero(generator.random(shape[0] * shape[1], dtype=np.float32) < DENSITY)
    values = generator.standard_normal(positions.size).astype(np.float32) / 500
    return shiradelta.TensorDelta(shape, positions, values, "bfloat16")


@contextmanager
def loaded(tensors: dict[str, shiradelta.TensorDelta], check: int = CHECK_ALL) -> Iterator[list[LoadedTensor]]:
    """Tensors as the library has them once they are checked."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "delta.shd"
        shiradelta.save_delta(path, tensors, values="int8")
        with shiradelta.open_delta(path, backend="libshd") as delta:
            decoder = delta.decoder
            assert isinstance(decoder, NativeDecoder)
            yield [LoadedTensor(decoder, tensor.record, check) for tensor in delta.values()]


def rate(work: Callable[[], object], nonzeros: int) -> float:
    """G nonzeros a second, on this thread."""
    return nonzeros / seconds(work, REPEATS) * 1e-9


def decode(tensor: LoadedTensor, positions: Array) -> None:
    """All positions, into a buffer that is there."""
    tensor._call(
        library().shd_positions,
        tensor.address,
        0,
        tensor.blocks,
        positions.ctypes.data,
        positions.size,
        byref(c_uint64()),
    )


def decoding(delta: shiradelta.TensorDelta) -> list[list[str]]:
    """Positions of one tensor, from memory to memory, by one thread."""
    positions = delta.positions()
    result = np.empty_like(positions)
    rows = [["positions, 1 thread", "G nonzeros/s", "bits each", "bar"]]
    for name, check, bar in (("AVX2 or NEON", CHECK_ALL, "1.0"), ("scalar", CHECK_ALL | SCALAR, "0.4")):
        with loaded({"w": delta}, check) as (tensor,):
            speed = rate(lambda t=tensor: decode(t, result), positions.size)  # type: ignore[misc]
            bits = 8 * tensor.record.index.stored / positions.size
        assert np.array_equal(result, positions)
        rows.append([f"libshd, {name}", f"{speed:.2f}", f"{bits:.2f}", bar])
    if svb := peer("libstreamvbyte"):
        gaps = np.diff(positions, prepend=0).astype(np.uint32)
        packed = svb.encode(gaps)
        packed_bits = f"{8 * packed.nbytes / gaps.size:.2f}"
        speed = rate(lambda: svb.decode(packed, gaps.size), gaps.size)
        rows.append(["streamvbyte, gaps alone", f"{speed:.2f}", packed_bits, ""])
        speed = rate(lambda: np.cumsum(svb.decode(packed, gaps.size), out=result), gaps.size)
        assert np.array_equal(result, positions)
        rows.append(["streamvbyte and cumsum", f"{speed:.2f}", packed_bits, ""])
    else:
        rows.append(["streamvbyte", "not installed", "", ""])
    if roaring := peer("pyroaring"):
        bitmap = roaring.BitMap(positions)
        bitmap.run_optimize()
        assert np.array_equal(bitmap.to_array(), positions)
        speed = rate(bitmap.to_array, positions.size)
        rows.append(["pyroaring", f"{speed:.2f}", f"{8 * len(bitmap.serialize()) / positions.size:.2f}", ""])
    else:
        rows.append(["pyroaring", "not installed", "", ""])
    return rows


def encoding(delta: shiradelta.TensorDelta) -> list[list[str]]:
    """Canonical sections, made by one thread."""
    backend, positions, values = choose("libshd"), delta.positions(), delta.values()
    index = backend.index_codecs[IndexId.RICE]
    rows = [["encode, 1 thread", "G nonzeros/s", "bar"]]
    speed = rate(lambda: index.encode(positions, delta.shape), positions.size)
    rows.append(["positions (RICE)", f"{speed:.2f}", "0.1"])
    for id in (ValueId.I8, ValueId.I4):
        speed = rate(lambda codec=backend.value_codecs[id]: codec.encode(values), positions.size)  # type: ignore[misc]
        rows.append([f"values ({id.name})", f"{speed:.2f}", "0.1"])
    return rows


def copy_in_threads(pool: ThreadPoolExecutor, source: Array, target: Array) -> None:
    """By two halves."""
    middle = source.size // 2
    halves = [(target[:middle], source[:middle]), (target[middle:], source[middle:])]
    list(pool.map(lambda pair: np.copyto(*pair), halves))


def merge(weights: list[torch.Tensor], factors: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """What PEFT's LoRA merge computes: float32 factors, the product scaled and rounded, added to bf16 weights."""
    for weight, (b, a) in zip(weights, factors, strict=True):
        weight += ((b @ a) * 2.0).to(weight.dtype)


def applying() -> list[list[str]]:
    """The seven linear layers of a Llama-2-7B block.  Weights are copied before each run, so caches are cold."""
    shapes = models.LLAMA_7B_LAYER
    everything = torch.empty(sum(a * b for a, b in shapes.values()), dtype=torch.bfloat16).normal_(std=0.02)
    bits = everything.view(torch.uint16).numpy()
    ends = np.cumsum([a * b for a, b in shapes.values()])
    parts = dict(zip(shapes, np.split(bits, ends[:-1]), strict=True))
    copy = np.empty_like(bits)

    def refresh() -> None:
        np.copyto(copy, bits)

    refresh()
    least = seconds(refresh, REPEATS)
    rows = [["apply to a layer, saving", "time", "x memcpy", "bar", "merge / time", "bar"]]
    with ThreadPoolExecutor(2) as pool:
        copied = seconds(lambda: copy_in_threads(pool, bits, copy), REPEATS)
    torch_weights = [
        everything[end - a * b : end].view(a, b) for (a, b), end in zip(shapes.values(), ends, strict=True)
    ]
    factors = [(torch.randn(a, RANK) / 100, torch.randn(RANK, b) / 100) for a, b in shapes.values()]
    merged = seconds(lambda: merge(torch_weights, factors), 3, refresh)

    def row(name: str, spent: float, bar: str = "", merge_bar: str = "") -> None:
        rows.append([name, f"{spent * 1e3:.0f} ms", f"{spent / least:.2f}", bar, f"{merged / spent:.1f}", merge_bar])

    row("memcpy, 1 thread", least)
    row("memcpy, 2 threads", copied)
    row(f"PEFT's merge, torch, {torch.get_num_threads()} threads", merged)
    deltas = {name: random_delta(shape, i) for i, (name, shape) in enumerate(shapes.items())}
    with loaded(deltas) as tensors:
        saved = [np.empty(tensor.record.nnz, np.uint16) for tensor in tensors]

        def apply() -> None:
            for tensor, old in zip(tensors, saved, strict=True):
                tensor.apply(parts[tensor.record.name], "bfloat16", 1.0, old)

        def revert() -> None:
            for tensor, old in zip(tensors, saved, strict=True):
                tensor.revert(parts[tensor.record.name], "bfloat16", old)

        def take_back() -> None:
            revert()
            refresh()

        before = zlib.crc32(bits.data)
        apply()
        usual = machine.THREADS
        for threads, bar, merge_bar in ((1, "", ""), (2, "1.0", "12")):
            machine.THREADS = threads
            said = f"{threads} thread{'s'[: threads - 1]}"
            row(f"libshd, apply, {said}", seconds(apply, REPEATS, take_back), bar, merge_bar)
            row(f"libshd, revert, {said}", seconds(revert, REPEATS, refresh))
            assert zlib.crc32(bits.data) == before
        machine.THREADS = usual
    return rows


def summing(counts: tuple[int, ...] = (1, 2, 4, 8)) -> list[list[str]]:
    """Several adapters on one tensor in one pass, against each of them alone; other strengths, against a way back."""
    shape = (11008, 4096)
    bits = torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02).view(torch.uint16).numpy().reshape(-1)
    copy = np.empty_like(bits)
    rows = [["adapters", "apply", "x as many alone", "bar", "other strengths", "x revert and apply"]]
    with ExitStack() as stack:
        tensors = [stack.enter_context(loaded({"w": random_delta(shape, i)}))[0] for i in range(max(counts))]
        saved = [np.empty(tensor.record.nnz, np.uint16) for tensor in tensors]

        def refresh() -> None:  # so that caches are cold
            np.copyto(copy, bits)

        def alone() -> None:
            tensors[0].apply(bits, "bfloat16", 1.0, saved[0])

        def revert(count: int) -> None:
            for tensor, old in zip(tensors[:count], saved, strict=False):
                tensor.revert(bits, "bfloat16", old)

        def add_up(count: int, from_saved: bool = False) -> None:
            addends = list(zip(tensors, [1.0] * count, saved, strict=False))
            apply_sum(addends, bits, "bfloat16", from_saved)

        def start_again(count: int) -> None:
            revert(count)
            refresh()

        before = zlib.crc32(bits.data)
        for count in counts:
            alone()
            one = seconds(alone, REPEATS, lambda: start_again(1))
            revert(1)
            add_up(count)
            several = seconds(partial(add_up, count), REPEATS, partial(start_again, count))
            again = seconds(partial(add_up, count, from_saved=True), REPEATS, refresh)
            back = seconds(partial(revert, count), REPEATS, refresh)
            assert zlib.crc32(bits.data) == before
            times = f"{several * 1e3:.1f} ms", f"{several / one / count:.2f}", "1.5" if count > 1 else ""
            rows.append([str(count), *times, f"{again * 1e3:.1f} ms", f"{again / (back + several):.2f}"])
    return rows


def main() -> None:
    """Prints the tables."""
    delta = random_delta((11008, 4096))
    title = f"[11008, 4096], {DENSITY:.0%}: {delta.nnz:,} nonzeros"
    print_table(title, decoding(delta))
    print_table(title, encoding(delta))
    print_table(f"{title} in each of several adapters, {machine.THREADS} threads", summing())
    print_table(f"Llama-2-7B layer, random bf16 weights, {DENSITY:.0%}, int8, r = {RANK}", applying())


if __name__ == "__main__":
    main()
