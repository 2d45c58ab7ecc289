"""A deterministic fuzzer of the format: mutated vectors, read by both backends of the package and by the decoder.

    python -m tests.fuzz --count 100000 --seed 1          the full job
    python -m tests.fuzz --seconds 60 --seed 1            as much of it as that time allows
    python -m tests.fuzz --seed 1 --only 4711 --keep DIR  one case again, its file kept

Every file must be read completely or be refused with a reason, all readers must say the same, and both backends must
make the same of the same weights.  Anything else is a finding: another exception, contents that break an invariant, a
crash, a file that takes seconds or much memory.
Case i of a seed is the same file on every machine, as long as the vectors are the same.
"""

from __future__ import annotations

import random
import struct
import sys
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

import shiradelta as sd
from shiradelta.backends.choose import FILE_BACKENDS
from shiradelta.errors import FormatError
from shiradelta.format.delta import matrix_shape
from shiradelta.format.registry import DTYPE_OF_NAME
from tests.fuzzing import Case, Report, judged, main
from tests.reference import (
    INVALID,
    VALID,
    Outcome,
    by_decoder,
    contents,
    decoder,
    is_available,
    knows_base,
    make_vectors,
    names_base_codec,
    unzstd,
)

SECONDS_PER_FILE = 5.0
#: Larger tensors are decoded, but not applied.
MOST_WEIGHTS = 1 << 14

# --- the mutations ---

#: (offset, size) of the fields of FORMAT.md, 2.1: major to extension_size, digest, the zeros behind it.
HEADER_FIELDS = [(8, 2), (10, 2), (12, 4), *((at, 8) for at in range(16, 64, 8)), (80, 4), (112, 4)]
#: Those of a record (section 3), without its checksums.  First the small ones: rank, ids, flags.
SMALL_FIELDS = [(at, 1) for at in range(6, 12)]
LARGE_FIELDS = [(0, 4), (4, 2), (12, 4), *((at, 8) for at in (*range(16, 88, 8), *range(96, 160, 8)))]
PACKED_FIELDS = ("offset", "stored", "decoded", "crc")
RECORD_SIZE = 160

Random = random.Random


@dataclass
class Layout:
    """Where the parts of a file seem to be: (start, end), within the file."""

    table: tuple[int, int]
    names: tuple[int, int]
    metadata: tuple[int, int]
    extension: tuple[int, int]
    records: list[int]
    sections: list[tuple[int, int]]  # INDEX 0, VALUES 0, INDEX 1, ...


def number(data: bytes, at: int, size: int) -> int:
    return int.from_bytes(data[at : at + size], "little")


def layout(data: bytes) -> Layout | None:
    """None where the header is too short; otherwise a guess that never leaves the file."""
    if len(data) < 128:
        return None
    count = number(data, 12, 4)
    parts, at = [], 128
    for size in (RECORD_SIZE * count, *(number(data, 40 + 8 * i, 8) for i in range(3))):
        parts.append((min(at, len(data)), min(at + size, len(data))))
        at = -(-(at + size) // 64) * 64
    records = list(range(128, parts[0][1] - RECORD_SIZE + 1, RECORD_SIZE))
    sections = []
    for record in records:
        for place in 40, 64:
            start, size = number(data, record + place, 8), number(data, record + place + 8, 8)
            sections.append((min(start, len(data)), min(start + size, len(data))))
    return Layout(*parts, records, sections)


def repaired(data: bytes) -> bytes:
    """The file with all checksums made right, and the digest too if the contents can be decoded."""
    found = layout(data)
    if found is None:
        return data
    fixed = bytearray(data)
    if is_packed(data):
        rest = min(128 + number(data, 112, 4), len(data))
        fixed[64:72] = struct.pack("<II", zlib.crc32(data[128:rest]), zlib.crc32(data[rest:]))
        return with_header_crc(fixed)
    for i, (start, end) in enumerate(found.sections):
        place = found.records[i // 2] + 88 + 4 * (i % 2)
        fixed[place : place + 4] = struct.pack("<I", zlib.crc32(data[start:end]))
    for i, (start, end) in enumerate((found.table, found.names, found.metadata, found.extension)):
        fixed[64 + 4 * i : 68 + 4 * i] = struct.pack("<I", zlib.crc32(fixed[start:end]))
    with suppress(decoder.Refused):
        fixed[80:112] = digest_of(with_header_crc(fixed))
    return with_header_crc(fixed)


def is_packed(data: bytes) -> bool:
    return bool(number(data, 16, 8) & decoder.FEATURE_PACKED)


def with_header_crc(data: bytes | bytearray) -> bytes:
    return bytes(data[:124]) + struct.pack("<I", zlib.crc32(data[:124])) + bytes(data[128:])


def digest_of(data: bytes) -> bytes:
    """The content digest of a file whose own may be wrong."""
    header = decoder.read_header(data)
    offsets, end = decoder.read_file_sections(data, header)
    decoder.read_metadata(data, offsets[2], header.sizes[2])
    whole = decoder.hashlib.sha256(b"shiradelta 1" + struct.pack("<I", header.tensor_count))
    for record in decoder.read_table(data, header, offsets, end):
        decoder.decode_tensor(data, record, unzstd)
        whole.update(struct.pack("<H", len(record.raw_name)) + record.raw_name + decoder.tensor_digest(record))
    return whole.digest()


INTERESTING = [
    *(0, 1, 2, 3, 7, 8, 31, 32, 63, 64, 127, 128, 255, 256, 1024, 1025, 2047, 2048, 2049, 65535, 65536),
    *((1 << power) + delta for power in (20, 24, 26, 31, 32, 33, 48, 53, 56, 62, 63) for delta in (-1, 0, 1)),
    *((1 << 64) - 1, (1 << 64) - 8, (1 << 64) - 64),
]


def other_number(rng: Random, old: int, size: int) -> int:
    """A number that is likely to be wrong in an interesting way."""
    near = old + rng.choice((-64, -8, -4, -1, 1, 4, 8, 64))
    new = rng.choice((near, rng.choice(INTERESTING), old ^ 1 << rng.randrange(8 * size), old * 2, old // 2))
    return new % (1 << 8 * size)


def put(data: bytes, at: int, size: int, new: int) -> bytes:
    return data[:at] + new.to_bytes(size, "little") + data[at + size :]


def change_number(rng: Random, data: bytes, at: int, size: int) -> bytes:
    if at + size > len(data):
        return data
    return put(data, at, size, other_number(rng, number(data, at, size), size))


def flip_bits(rng: Random, data: bytes) -> bytes:
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at = rng.randrange(len(data))
        data = put(data, at, 1, data[at] ^ 1 << rng.randrange(8))
    return data


def change_bytes(rng: Random, data: bytes) -> bytes:
    at = rng.randrange(len(data))
    size = min(rng.choice((1, 2, 4, 8, 16)), len(data) - at)
    return data[:at] + rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size))) + data[at + size :]


def cut(rng: Random, data: bytes) -> bytes:
    return data[: rng.choice((rng.randrange(len(data) + 1), len(data) - 1, len(data) - 64, len(data) // 128 * 64))]


def resize(rng: Random, data: bytes) -> bytes:
    """Bytes put in or taken out, the header's file_size made right."""
    at = rng.randrange(len(data) + 1)
    size = rng.choice((1, 4, 8, 64, 128))
    data = data[:at] + rng.choice((b"", bytes(size))) + data[at + rng.choice((0, size)) :]
    return put(data, 32, 8, len(data)) if len(data) >= 128 else data


def change_header(rng: Random, data: bytes) -> bytes:
    return change_number(rng, data, *rng.choice(HEADER_FIELDS))


def change_record(rng: Random, data: bytes) -> bytes:
    found = layout(data)
    if found is None or not found.records:
        return data
    record = rng.choice(found.records)
    for _ in range(rng.choice((1, 1, 2))):
        at, size = rng.choice(SMALL_FIELDS + LARGE_FIELDS)
        data = change_number(rng, data, record + at, size)
    return data


def change_record_id(rng: Random, data: bytes) -> bytes:
    """Ids, flags, counts and dims among the values that mean something."""
    found = layout(data)
    if found is None or not found.records:
        return data
    at, size = rng.choice([*SMALL_FIELDS, (16, 8), (96, 8), (104, 8)])  # nnz, the first two dims
    return put(data, rng.choice(found.records) + at, size, rng.randrange(21))


def change_section(rng: Random, data: bytes) -> bytes:
    """A word of an INDEX or VALUES section, or of names, metadata or extension."""
    found = layout(data)
    if found is None:
        return data
    parts = [*found.sections, *found.sections, found.names, found.metadata, found.extension]
    start, end = rng.choice([part for part in parts if part[0] < part[1]] or [(0, len(data))])
    size = rng.choice((1, 1, 2, 4, 8))
    head = min(end, start + 64) if rng.random() < 0.5 else end
    at = start + rng.randrange(max(1, (head - start) // size)) * size
    return change_number(rng, data, at, size)


def swap_sections(rng: Random, data: bytes) -> bytes:
    """One section's bytes written over another's, as far as they fit."""
    found = layout(data)
    if found is None or len(found.sections) < 2:
        return data
    (a, b), (c, d) = rng.sample(found.sections, 2)
    size = min(b - a, d - c)
    return data[:c] + data[a : a + size] + data[c + size :]


def splice(rng: Random, data: bytes, other: bytes) -> bytes:
    """The start of one file and the end of another, at a multiple of 64."""
    at = rng.randrange(1, max(2, min(len(data), len(other)) // 64)) * 64
    joined = data[:at] + other[at:]
    return put(joined, 32, 8, len(joined)) if rng.random() < 0.5 and len(joined) >= 128 else joined


def packed(rng: Random, data: bytes) -> bytes:
    """The packed file that stands for one, with a change in what only such files have."""
    found = layout(data)
    if found is None or is_packed(data) or len(found.records) != number(data, 12, 4):
        return data
    leads = [rng.choice((0, rng.randrange(max(end - start - 7, 1)))) for start, end in found.sections]
    record: dict[str, int | bytes] = {}
    if rng.random() < 0.5:
        name = rng.choice(("name_offset", *(f"{a}_{b}" for a in ("index", "values") for b in PACKED_FIELDS)))
        size = 4 if name.endswith("crc") or name == "name_offset" else 8
        record = {name: other_number(rng, rng.choice((0, 8, 16, 40)), size)}
    other = make_vectors.Control({rng.randrange(max(len(found.records), 1)): record})
    try:
        data = make_vectors.packed(data, leads, other)
    except struct.error:  # what is cut off
        return data
    mutate = rng.choice((lambda _, data: data, flip_bits, change_bytes, change_header, cut))
    return repaired(mutate(rng, data)) if rng.random() < 0.8 else mutate(rng, data)


MUTATIONS: tuple[Callable[[Random, bytes], bytes], ...] = (
    *(flip_bits, change_bytes, cut, resize, change_header, change_record, change_record, change_record_id),
    *(change_record_id, change_section, change_section, change_section, change_section, swap_sections),
)


def corpus() -> list[bytes]:
    """What is mutated: all vectors; the valid ones are taken more often."""
    valid = [path.read_bytes() for path in sorted(VALID.glob("*.shd"))]
    invalid = [path.read_bytes() for path in sorted(INVALID.glob("*.shd"))]
    return 4 * valid + [data for data in invalid if len(data) >= 128]


def case(files: Sequence[bytes], seed: int, i: int) -> bytes:
    """File i of a seed."""
    rng = Random(f"{seed} {i}")
    data = rng.choice(files)
    if rng.random() < 0.1:
        data = splice(rng, data, rng.choice(files))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if data:
            data = rng.choice(MUTATIONS)(rng, data)
    data = repaired(data) if i % 2 else data
    return packed(rng, data) if rng.random() < 0.2 else data


# --- one file, read and judged ---


def check_invariants(tensor: sd.TensorDelta) -> None:
    """What every accepted tensor keeps."""
    positions, bits = tensor.positions(), tensor.bits()
    assert positions.size == bits.size == tensor.nnz <= tensor.numel
    assert np.all(positions[1:] > positions[:-1])
    assert not positions.size or 0 <= positions[0] <= positions[-1] < tensor.numel
    assert tensor.op != "add" or np.all(np.isfinite(tensor.values()))


def check_rows(tensor: sd.TensorDelta, rng: Random, accepted: bool) -> None:
    """A part may be refused only where the whole is, and never leaves its range."""
    count, columns = matrix_shape(tensor.shape)
    start, stop = sorted(rng.randint(0, count) for _ in range(2))
    try:
        positions, values = tensor.rows(start, stop)
    except FormatError:
        assert not accepted, "rows() refused a valid file"
        return
    assert positions.size == values.size
    assert np.all(positions[1:] > positions[:-1])
    assert not positions.size or start * columns <= positions[0] <= positions[-1] < stop * columns
    if accepted:
        whole = tensor.positions()
        inside = (whole >= start * columns) & (whole < stop * columns)
        assert np.array_equal(positions, whole[inside])
        assert np.array_equal(values.view(f"u{values.itemsize}"), tensor.bits()[inside])


def weights_for(tensor: sd.TensorDelta, rng: Random) -> tuple[np.ndarray, str, float]:
    """Weights of any bits, NaN and infinity among them, their dtype, and a strength."""
    dtype = rng.choice(("float32", "float16", "bfloat16")) if tensor.dtype == "unspecified" else tensor.dtype
    bits = np.frombuffer(rng.randbytes(tensor.numel * DTYPE_OF_NAME[dtype].size), f"<u{DTYPE_OF_NAME[dtype].size}")
    return bits.copy(), dtype, rng.choice((1.0, -1.0, 0.1, 1e-30, 1e30)) if tensor.op == "add" else 1.0


def patched(delta: sd.Delta, rng: Random) -> list[bytes]:
    """What the tensors make of weights; the same for the same `rng`."""
    results = []
    for tensor in delta.values():
        if tensor.op in ("add", "set") and tensor.numel <= MOST_WEIGHTS:
            weights, dtype, strength = weights_for(tensor, rng)
            tensor.patch(weights, dtype, strength)
            results.append(weights.tobytes())
    return results


def by_package(data: bytes, seed: int, backend: str) -> tuple[Outcome, list[bytes]]:
    """Contents or reason, after every check that the package's own results have to pass; and what it patches."""
    rng = Random(seed)
    try:
        delta = sd.open_delta(data, backend=backend)
    except FormatError as error:
        return error.reason, []
    outcome: Outcome
    try:
        delta.verify()
        outcome = contents(delta)
    except FormatError as error:
        outcome = error.reason
    for tensor in delta.values():
        if not isinstance(outcome, str):
            check_invariants(tensor)
        check_rows(tensor, rng, not isinstance(outcome, str))
    return outcome, [] if isinstance(outcome, str) else patched(delta, Random(seed))


#: The package's, as far as they are there; the first decides what a file is counted as.
BACKENDS = [name for name in reversed([*FILE_BACKENDS]) if is_available(name)]


def difference_in(data: bytes, seed: int) -> tuple[str, str | None]:
    """(what the readers said, what is wrong with it)."""
    backends = [name for name in BACKENDS if knows_base(name) or not names_base_codec(data)]
    results = {name: by_package(data, seed, name) for name in backends}
    outcomes = {name: outcome for name, (outcome, _) in results.items()} | {"decoder": by_decoder(data)}
    said = {name: outcome if isinstance(outcome, str) else "accepted" for name, outcome in outcomes.items()}
    first = outcomes[backends[0]]
    if any(outcome != first for outcome in outcomes.values()):
        what = ", ".join(f"{name}: {outcome}" for name, outcome in said.items())
        return "difference", what + (", other contents" if len(set(said.values())) == 1 else "")
    if any(result != results[backends[0]][1] for _, result in results.values()):
        return "difference", "the backends patch differently"
    return said[backends[0]], None


def run_case(files: Sequence[bytes], seed: int, i: int) -> Report:
    """One case, in this process."""
    data = case(files, seed, i)
    return judged(i, partial(difference_in, data, i), SECONDS_PER_FILE)


def start() -> Case:
    """The fuzzer; see `tests.fuzzing`."""
    return partial(run_case, corpus())


def keep(seed: int, i: int, folder: Path) -> None:
    """Writes a case's file."""
    (folder / f"{seed}-{i}.shd").write_bytes(case(corpus(), seed, i))


if __name__ == "__main__":
    # By the module's own name: the child process imports `start` from it.
    from tests import fuzz

    sys.exit(main(sys.argv[1:], "Reads mutated vectors with all readers.", 100_000, fuzz.start, keep))
