"""Damages GGUF, `.npz` and pickles: what they hold, their counts and lengths, and the program of a pickle."""

from __future__ import annotations

import copy
import struct
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from random import Random
from typing import Any

from tests.source_containers import Gguf, Npz, Pickle, Tar
from tests.source_files import Made

#: Changes one of the tensors, in place.
ChangeTensor = Callable[[Random, dict[str, Made], str], None]
#: Changes JSON somewhere inside.
ChangeValue = Callable[[Random, Any], Any]
#: Counts and lengths: none, one, some, and so many that nothing has them.
COUNTS = [0, 1, 2, 3, 4, 8, 255, 1 << 16, 1 << 24, 1 << 31, (1 << 32) - 1, 1 << 33, 1 << 40, 1 << 62, (1 << 64) - 1]
#: What parts of an archive begin with, and how long their fixed parts are.
_MARKS = {b"PK\x01\x02": 46, b"PK\x03\x04": 30, b"PK\x05\x06": 22, b"PK\x06\x06": 56}


def damaged_container(
    rng: Random, made: Gguf | Npz | Pickle | Tar, change_tensor: ChangeTensor, change_value: ChangeValue
) -> Gguf | Npz | Pickle | Tar:
    """A copy with a change."""
    made = replace(made, tensors=dict(made.tensors))
    action = rng.random()
    if action < 0.4:
        for _ in range(rng.choice((1, 1, 2))):
            if made.tensors:
                change_tensor(rng, made.tensors, rng.choice([*made.tensors]))
    elif isinstance(made, Gguf):
        if action < 0.6:
            found = change_value(rng, copy.deepcopy(made.values))
            made.values = {str(key): value for key, value in found.items()} if isinstance(found, dict) else {}
        elif action < 0.7 and made.tensors:
            made.kinds = {**made.kinds, rng.choice([*made.tensors]): rng.choice((0, 1, 2, 8, 30, 99))}
        else:
            made.damage = [(rng.random(), _count(rng)) for _ in range(rng.choice((1, 1, 2)))]
    elif isinstance(made, Tar):
        made.damage = [partial(_odd_tar, rng.random()) for _ in range(rng.choice((1, 1, 2)))]
    elif action < 0.6:
        made.after = partial(_odd_archive, rng.random())
    elif isinstance(made, Npz) and action < 0.8:
        made.damage = [partial(_odd_header, rng.random(), change_value)]
    elif isinstance(made, Npz):
        made.compressed, made.after = True, partial(_odd_bytes, rng.random())
    elif action < 0.9:
        made.damage = [partial(_odd_entry, rng.random())]
    else:
        made.layout = rng.choice(("strided", "coo", "csr", "csc"))
    return made


def _count(rng: Random) -> bytes:
    return struct.pack("<Q", rng.choice(COUNTS))


def _odd_archive(seed: float, data: bytes) -> bytes:
    """An archive with other fields: sizes, offsets, methods, flags."""
    rng = Random(seed)
    places = [(at, size) for mark, size in _MARKS.items() for at in _occurrences(data, mark)]
    for _ in range(rng.choice((1, 1, 2))):
        if places:
            at, size = rng.choice(places)
            start, width = at + rng.randrange(4, size, 2), rng.choice((2, 4))
            data = data[:start] + _count(rng)[:width] + data[start + width :]
    return data


def _odd_tar(seed: float, entries: list[tuple[str, bytes, dict[str, Any]]]) -> None:
    """Entries of other kinds, sizes and names, some of them twice, or none."""
    rng = Random(seed)
    at = rng.randrange(len(entries))
    name, data, about = entries[at]
    action = rng.random()
    if action < 0.3:
        about = {
            **about,
            "type": rng.choice(b"0123456757xgLKSV").to_bytes(1, "big"),
            "linkname": rng.choice((name, "/etc", "..")),
        }
    elif action < 0.5:
        about = {**about, "size": rng.choice(COUNTS)}
    elif action < 0.7:
        name = rng.choice(
            ("../" + name, "/" + name, name * 200, "mp_rank_00/model_weights.ckpt", "model_config.yaml", "")
        )
    elif action < 0.8:
        about = {
            **about,
            "pax_headers": {rng.choice(("size", "path", "GNU.sparse.size", "a")): rng.choice(("-1", "9" * 99, "x"))},
        }
    elif action < 0.9:
        data = data[: rng.randrange(len(data) + 1)] + bytes(rng.choice((0, 7, 5000)))
    else:
        entries.insert(rng.randrange(len(entries)), entries[at])
    entries[at] = name, data, about


def _occurrences(data: bytes, mark: bytes) -> list[int]:
    found, at = [], data.find(mark)
    while at >= 0:
        found.append(at)
        at = data.find(mark, at + 1)
    return found


def _odd_header(seed: float, change_value: ChangeValue, header: Any) -> Any:
    """An array's header that says another shape or type."""
    rng = Random(seed)
    action = rng.random()
    if action < 0.4:
        sizes = [*header["shape"], 1]
        sizes[rng.randrange(len(sizes))] = rng.choice((*COUNTS, -1))
        return {**header, "shape": tuple(sizes if rng.random() < 0.5 else sizes[:-1])}
    if action < 0.7:
        descr = rng.choice(
            ("|O", "<f8", ">f4", "<U9999999", "|V0", "|S0", "<M8[ns]", "<c16", [("a", "<f4")], "x", "<f2")
        )
        return {**header, "descr": descr}
    return change_value(rng, copy.deepcopy(header))


def _odd_bytes(seed: float, data: bytes) -> bytes:
    rng = Random(seed)
    for _ in range(rng.choice((1, 3))):
        at = rng.randrange(len(data))
        data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
    return data


def _odd_entry(seed: float, name: str, content: bytes) -> bytes:
    """Another program of a pickle, or other contents of one of its storages."""
    rng = Random(f"{seed} {name}")
    if not content or rng.random() < (0.2 if name.endswith("data.pkl") else 0.8):
        return content
    at, action = rng.randrange(len(content)), rng.random()
    if action < 0.2:
        return content[:at]
    if action < 0.6:
        put = rng.choice(
            (bytes([rng.randrange(256)]), b"K\xff", b"J\xff\xff\xff\x7f", b"2", b"0", b".", b"t", b"R", b"}")
        )
        return content[:at] + put + content[at + rng.choice((0, 1)) :]
    width = rng.choice((1, 4, 8))
    return content[:at] + (_count(rng)[:width] if rng.random() < 0.5 else b"\xff" * width) + content[at + width :]
