"""Sections that several processes read together: each byte is checked, and no process reads all of them."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import shiradelta as sd
from shiradelta import HotSwap
from shiradelta.errors import FormatError
from shiradelta.format import container
from shiradelta.format.codecs import VALUE_CODECS
from shiradelta.format.header import crc32
from shiradelta.hotswap.sections import CHUNK, Chunks, Reading, _joined, check_together, read_shared
from shiradelta.models.sharded import Rows
from tests import BRIEF
from tests.hotswap.test_ranks import bytes_read, refusal_of
from tests.ranks import run
from tests.swapping import bits, random_delta

#: Rows are not divided by the numbers of processes.
SHAPE = (1030, 1024)
BACKENDS = ["auto", "numpy"]


@pytest.mark.parametrize("size", [1, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK + 7])
def test_checksums_of_chunks_give_that_of_the_section(size: int):
    content = np.random.default_rng(size).integers(0, 256, size).astype(np.uint8).tobytes()
    sums = [zlib.crc32(content[at : at + CHUNK]) for at in range(0, size, CHUNK)]
    every = Chunks(np.arange(len(sums)), np.array(sums, np.uint32))
    some = [Chunks(every.numbers[part], every.checksums[part]) for part in (slice(0, 3), slice(2, None))]
    assert _joined(size, [every]) == _joined(size, some) == zlib.crc32(content)
    assert _joined(size, [Chunks(every.numbers[1:], every.checksums[1:])]) is None
    other = Chunks(every.numbers[-1:], every.checksums[-1:] ^ np.uint32(1))
    assert _joined(size, [*some, other]) is None
    assert _joined(size, [Chunks(every.numbers, every.checksums ^ np.uint32(1))]) != zlib.crc32(content)


@pytest.mark.parametrize("values", ["f32", "f16", "bf16", "int8", "int4", "sign"])
def test_values_are_decoded_from_their_spans(values: str, tmp_path: Path):
    sd.save_delta(tmp_path / "a.shd", {"w": random_delta((64, 64), 1001, 1, "float32")}, values=values)
    with sd.open_delta(tmp_path / "a.shd") as delta:
        record = delta["w"].record
        content = np.array(delta["w"].section(record.values))
    codec = VALUE_CODECS.by_id[record.value_codec]
    for start, stop in [(0, 0), (0, 1), (1, 1001), (127, 129), (500, 501), (333, 1001)]:
        spans = codec.spans(1001, 4, start, stop)
        assert spans is not None
        needed = np.zeros_like(content)
        for a, b in spans:
            needed[a:b] = content[a:b]
        given, part = (codec.decode(data, 1001, 4, start, stop) for data in (content, needed))
        assert np.array_equal(bits(given), bits(part))


def model_of(kind: str) -> dict[str, Any]:
    """A tensor whose rows, or columns, are spread over the processes, and one that is whole."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    count = dist.get_world_size()
    mesh = init_device_mesh("cpu", (2, count // 2) if kind == "copies" else (count,))
    placements = {"rows": [Shard(0)], "columns": [Shard(1)], "copies": [Replicate(), Shard(0)]}[kind]
    return {"w": distribute_tensor(torch.zeros(SHAPE), mesh, placements), "norm": torch.zeros(64)}


def reads(rank: int, kind: str, path: Path, given: Any, backend: str) -> tuple[int, bool]:
    model = model_of(kind)
    swap = HotSwap(model, backend=backend, timeout=30)
    swap.load("warm", path)
    before = bytes_read()
    swap.load("a", given[rank] if isinstance(given, list) else path)
    read = bytes_read() - before
    swap.switch("a")
    with sd.open_delta(path) as delta:
        same = np.array_equal(model["w"].full_tensor().numpy(), delta["w"].to_dense())
        same &= np.array_equal(model["norm"].numpy(), delta["norm"].to_dense())
    swap.revert()
    assert not model["w"].to_local().any()
    return read, same


def written(path: Path, values: str = "f32", nnz: int = 40_000) -> Path:
    deltas = {"w": random_delta(SHAPE, nnz, 1, "float32"), "norm": random_delta((64,), 9, 2, "float32")}
    sd.save_delta(path, deltas, values=values)
    return path


slow = pytest.mark.slow
io = pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the system does not tell what was read")


@slow
@io
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kind", "count"), [("rows", 2), ("rows", 4), ("copies", 4), ("columns", 2)])
def test_a_process_reads_its_rows(kind: str, count: int, backend: str, tmp_path: Path):
    path = written(tmp_path / "a.shd")
    parts = {"rows": count, "copies": count // 2, "columns": 1}[kind]
    for read, same in run(reads, count, tmp_path, kind, path, None, backend):
        assert same
        assert read < path.stat().st_size / parts + 8 * CHUNK + 2000
        assert read > 0.9 * path.stat().st_size / parts


@slow
@io
@pytest.mark.parametrize("values", ["int8", "int4"])
def test_values_in_groups(values: str, tmp_path: Path):
    path = written(tmp_path / "a.shd", values, 300_000)
    for read, same in run(reads, 4, tmp_path, "rows", path, None, "auto"):
        assert same
        assert read < path.stat().st_size / 2


@slow
def test_a_process_that_is_given_bytes(tmp_path: Path):
    path = written(tmp_path / "a.shd")
    for _, same in run(reads, 2, tmp_path, "rows", path, [path.read_bytes(), path], "auto"):
        assert same


def damages(rank: int, path: Path, backend: str, seed: int) -> list[tuple[bool, str]]:
    """Flips a byte of a section of the file of all processes, or of the last one's alone."""
    model = model_of("rows")
    swap = HotSwap(model, backend=backend, timeout=30)
    chance = np.random.default_rng(seed)
    with sd.open_delta(path) as delta:
        record = delta["w"].record
        sections = record.index, record.values
        dense = delta["w"].to_dense()
    said = []
    for number in range(12 if BRIEF else 40):
        section = sections[number % 2]
        content = bytearray(path.read_bytes())
        at = section.offset + int(chance.integers(section.stored))
        content[at] ^= 1 << int(chance.integers(8))
        mine = path.parent / f"{rank}.shd"
        is_everywhere = number % 3 > 0
        mine.write_bytes(content if is_everywhere or rank + 1 == dist.get_world_size() else path.read_bytes())
        try:
            swap.load("a", mine)
        except sd.ShiraDeltaError as error:
            said.append((is_everywhere, f"{type(error).__name__}: {error}"))
            assert swap.loaded == {}
        else:
            assert not is_everywhere
            swap.switch("a")
            said.append((is_everywhere, str(np.array_equal(model["w"].full_tensor().numpy(), dense))))
            swap.revert()
            swap.unload("a")
    assert not model["w"].to_local().any()
    return said


@slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_damage_anywhere_is_noticed(backend: str, tmp_path: Path):
    """Damage of one process's file is no harm where it reads another part: what it uses is checked."""
    path = written(tmp_path / "a.shd")
    every = run(damages, 3, tmp_path, path, backend, 1)
    for same_call in zip(*every, strict=True):
        outcomes = {what == "True" for _, what in same_call}
        assert len(outcomes) == 1
        for is_everywhere, what in same_call:
            assert what == "True" or what.startswith(("FormatError: ", "TargetError: rank"))
            assert not is_everywhere or what != "True"
    assert any(what == "True" for _, what in every[0])
    assert any("section_checksum" in what for _, what in every[0])


def lies(rank: int, path: Path, backend: str) -> str:
    return refusal_of(HotSwap(model_of("rows"), backend=backend, timeout=30).load, "a", path)


@slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("entry", ["base", "rank"])
def test_a_directory_that_lies_is_refused(entry: str, backend: str, tmp_path: Path):
    """Its checksum is right, and a process decodes the blocks before the wrong entry only, or those behind it."""
    path = written(tmp_path / "a.shd")
    content = bytearray(path.read_bytes())
    with sd.open_delta(path) as delta:
        record = delta["w"].record
    blocks = int.from_bytes(content[record.index.offset + 8 : record.index.offset + 16], "little") // 2048 + 1
    at = record.index.offset + 16 + 8 * (blocks // 2) + (0 if entry == "base" else 4)
    content[at : at + 4] = (int.from_bytes(content[at : at + 4], "little") + 1).to_bytes(4, "little")
    with pytest.raises(FormatError, match="section_checksum"):
        sd.open_delta(bytes(content))["w"].positions()
    path.write_bytes(sealed(path, bytes(content)))
    with pytest.raises(FormatError, match="bad_directory"):
        sd.open_delta(path)["w"].positions()
    for said in run(lies, 2, tmp_path, path, backend):
        assert "bad_directory" in said or "bad_index" in said, said


def sealed(path: Path, content: bytes) -> bytes:
    """The content of a file whose index of the tensor `w` is another one, with its checksum made right."""
    with sd.open_delta(path) as delta:
        records = [tensor.record for tensor in delta.values()]
        index = delta["w"].record.index
        right = index._replace(crc=crc32(content[index.offset : index.offset + index.stored]))
        changed = [one._replace(index=right) if one.name == "w" else one for one in records]
        front = container.build(changed, delta.metadata, bytes.fromhex(delta.digest), len(content))
    return front + content[len(front) :]


def test_blocks_that_nobody_decodes_are_noticed(tmp_path: Path):
    path = written(tmp_path / "a.shd")
    content = np.fromfile(path, np.uint8)
    with sd.open_delta(path) as delta:
        table, record = delta.table, delta["w"].record

    def readings(*bounds: tuple[int, int]) -> list[dict[str, Reading]]:
        rows = [Rows(start, stop, number, len(bounds)) for number, (start, stop) in enumerate(bounds)]
        return [read_shared({"w": (record, one)}, content, lambda spans: None) for one in rows]

    half, numel = record.numel // 2, record.numel
    check_together("a", readings((0, half), (half, numel)), table)
    check_together("a", readings((half, numel), (0, 0), (0, half)), table)
    with pytest.raises(FormatError, match="bad_directory"):
        check_together("a", readings((0, half - 100_000), (half, numel)), table)
    with pytest.raises(FormatError, match="bad_directory"):
        check_together("a", readings((0, half), (half, numel - 100_000)), table)
    with pytest.raises(FormatError, match="section_checksum"):
        check_together("a", readings((0, half), (half, numel))[:1], table)
