"""Ways to store a step: this package's, and those that need no other package than zstandard."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import zstandard
from safetensors.torch import save_file

import shiradelta as sd
from benchmarks.lossless.steps import State, bits
from shiradelta.format.arithmetic import Array
from shiradelta.io.context import plain_delta

#: Names of this package's forms, as rows have them.
PLAIN, ON_BASE = "shd", "shd, base as context"


class Clock(NamedTuple):
    """Seconds of one run."""

    wall: float
    processor: float

    @classmethod
    def of(cls, work: Callable[[], Any]) -> tuple[Clock, Any]:
        """(what some work takes, its result)."""
        wall, processor = time.perf_counter(), time.process_time()
        result = work()
        return cls(time.perf_counter() - wall, time.process_time() - processor), result


class Way(NamedTuple):
    """A way to store a step.

    Attributes:
        name: what it is called in the table.
        encode: stores it.
        size: the bytes of what `encode` returned.
        decode: the step from that.
    """

    name: str
    encode: Callable[[], Any]
    size: Callable[[Any], int]
    decode: Callable[[Any], State]


class Row(NamedTuple):
    """What a way took, the least of several runs each."""

    size: int
    encode: Clock
    decode: Clock


def compared(ways: list[Way], tuned: State, repeats: int) -> Iterator[tuple[str, Row]]:
    """The row of each way, in rounds, so that all see the same load.

    Raises:
        AssertionError: one does not give the step back.
    """
    runs: list[list[Row]] = [[] for _ in ways]
    for _ in range(repeats):
        for way, rows in zip(ways, runs, strict=True):
            encode, stored = Clock.of(way.encode)
            decode, found = Clock.of(partial(way.decode, stored))
            wrong = sum(int((bits(found[key]) != bits(tensor)).sum()) for key, tensor in tuned.items())
            assert not wrong, f"{way.name}: {wrong} elements differ"
            rows.append(Row(way.size(stored), encode, decode))
    for way, rows in zip(ways, runs, strict=True):
        encode, decode = (Clock(*map(min, zip(*each, strict=True))) for each in list(zip(*rows, strict=True))[1:])
        yield way.name, Row(min(each.size for each in rows), encode, decode)


def write_both(base: State, tuned: State, folder: Path) -> None:
    """The two checkpoints as folders `base` and `tuned`."""
    for name, state in ("base", base), ("tuned", tuned):
        (folder / name).mkdir()
        save_file(dict(state), folder / name / "model.safetensors", metadata={"format": "pt"})


def ours(base: State, folder: Path, name: str, **options: Any) -> Way:
    """`convert --lossless` from folder to folder, and the delta on the base's weights in memory."""
    path = folder / f"{name}.shd"

    def encode() -> Path:
        sd.convert(folder / "tuned", path, base=folder / "base", lossless=True, **options)
        return path

    return Way(name, encode, os.path.getsize, partial(patched, base))


def patched(base: State, file: Path) -> State:
    """Copies of the base's weights with a file's delta on them."""
    state = _copies(base)
    with ExitStack() as stack:
        delta = stack.enter_context(sd.open_delta(file))
        if delta.needs_base:
            delta = stack.enter_context(plain_delta(delta, lambda record: bits(base[record.name])))
        for name, tensor in delta.items():
            tensor.patch(bits(state[name]), "bfloat16")
    return state


def whole(tuned: State) -> Way:
    """The weights themselves.  What their copy takes to decode is in what every way takes, which gives new tensors."""
    size = sum(tensor.nbytes for tensor in tuned.values())
    return Way("all weights", lambda: tuned, lambda state: size, _copies)


def _copies(state: State) -> State:
    return {name: tensor.clone() for name, tensor in state.items()}


def of_floats(base: State, tuned: State, folder: Path) -> Way:
    """What `convert --sparsity 1 --values f32 --zstd` stored: float32 differences."""
    path = folder / "f32.shd"

    def encode() -> Path:
        deltas = {}
        for name, tensor in base.items():
            at = np.flatnonzero(bits(tensor) != bits(tuned[name]))
            values = (tuned[name].float() - tensor.float()).view(-1).numpy()[at]
            if at.size:
                deltas[name] = sd.TensorDelta(tuple(tensor.shape), at, values, "bfloat16")
        sd.save_delta(path, deltas, values="f32", zstd=True)
        return path

    return Way("shd of float32, zstd", encode, os.path.getsize, partial(patched, base))


def of_xor(
    name: str, base: State, tuned: State, encode: Callable[[Array], bytes], decode: Callable[[bytes], Array]
) -> Way:
    """Something that compresses the XOR of both, uint16."""
    old = np.concatenate([bits(tensor) for tensor in base.values()])

    def encode_all() -> bytes:
        return encode(old ^ np.concatenate([bits(tuned[key]) for key in base]))

    return Way(name, encode_all, len, lambda stored: split(decode(stored) ^ old, base))


def split(joined: Array, base: State) -> State:
    """All tensors' elements, one tensor after the other in the base's order, as tensors."""
    parts = torch.split(torch.from_numpy(joined.view(np.int16)), [tensor.numel() for tensor in base.values()])
    return {key: part.view(torch.bfloat16).view(base[key].shape) for key, part in zip(base, parts, strict=True)}


def zstd(mixed: Array) -> bytes:
    """Level 19."""
    return bytes(zstandard.ZstdCompressor(level=19).compress(mixed.tobytes()))


def unzstd(stored: bytes) -> Array:
    """The inverse."""
    return np.frombuffer(zstandard.ZstdDecompressor().decompress(stored), np.uint16)


def zstd_planes(mixed: Array) -> bytes:
    """Level 19 of all low bytes, then all high ones."""
    return zstd(np.ascontiguousarray(mixed.view(np.uint8).reshape(-1, 2).T))


def unzstd_planes(stored: bytes) -> Array:
    """The inverse."""
    planes = unzstd(stored).view(np.uint8).reshape(2, -1)
    return np.ascontiguousarray(planes.T).view(np.uint16).reshape(-1)


def own(base: State, folder: Path) -> list[Way]:
    """The two forms of a lossless file."""
    return [ours(base, folder, PLAIN), ours(base, folder, ON_BASE, context="base")]


def others(base: State, tuned: State, folder: Path) -> list[Way]:
    """Further ways without a peer."""
    return [
        ours(base, folder, "shd, zstd", zstd=True),
        of_floats(base, tuned, folder),
        of_xor("zstd-19 of the XOR", base, tuned, zstd, unzstd),
        of_xor("zstd-19 of the XOR's byte planes", base, tuned, zstd_planes, unzstd_planes),
    ]


def sections(file: Path, least: int) -> int:
    """Bytes of the INDEX and VALUES of tensors of more elements, as an unpacked file has them."""
    with sd.open_delta(file) as delta:
        records = [tensor.record for tensor in delta.values() if tensor.numel > least]
        return sum(record.index.stored + record.values.stored for record in records)
