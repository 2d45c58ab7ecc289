"""Files that are read with their base only, decoded and encoded anew where the weights are, without the plain form."""

from __future__ import annotations

import io
import json
import struct
import zlib

import numpy as np
import pytest
import torch

import shiradelta as sd
from shiradelta.backends.choose import choose
from shiradelta.errors import FormatError
from shiradelta.format import registry
from shiradelta.format.codecs import FROM_BASE, ULP_FROM_BASE
from shiradelta.format.codecs.rice import Rice
from shiradelta.format.digest import tensor_digest
from shiradelta.hotswap import on_base
from shiradelta.hotswap.choose import LIVE_BACKENDS
from shiradelta.hotswap.heads import ClassedSections
from shiradelta.hotswap.pool import Pool
from shiradelta.hotswap.rice_there import encode_there
from shiradelta.hotswap.shifts_there import ShiftsThere, SortedClasses
from shiradelta.hotswap.torch import TorchBackend
from shiradelta.io.context import write_plain
from shiradelta.io.writer import writing_to
from shiradelta.util.arrays import exclusive
from tests.fuzz import is_packed, layout, number, with_header_crc
from tests.hotswap.test_from_base import Weights, check_same, in_strides, step, weights_of
from tests.reference import WITH_BASE, base_of, records_of
from tests.swapping import DEVICE, adapter, bits, why_not

THERE = [
    pytest.param(name, marks=pytest.mark.skipif(bool(why_not(LIVE_BACKENDS[name])), reason="not here"))
    for name in ("torch", "triton")
]
REFUSED = json.loads((WITH_BASE / "reasons.json").read_text(encoding="utf-8"))
FLAGS, FINGERPRINT, TABLE_CRC, HAS_BASE = 11, 24, 64, 1


@pytest.fixture(autouse=True)
def no_plain_form(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """No test makes the plain form, but those that say so."""
    if "by_digest" not in request.node.name:
        monkeypatch.setattr(on_base, "write_plain", None)


def there(values: np.ndarray) -> torch.Tensor:
    size = values.itemsize
    return torch.from_numpy(values.view(f"<i{size}" if size > 1 else "u1").copy()).to(DEVICE)


def positions_of(rng: np.random.Generator, numel: int, share: float) -> np.ndarray:
    found = np.flatnonzero(rng.random(numel) < share)
    return found if found.size else np.array([numel - 1])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_rice_sections_are_valid_and_hold_the_positions(dtype: torch.dtype):
    rng, rice = np.random.default_rng(0), Rice()
    cases = [(numel, positions_of(rng, numel, share)) for numel in (1, 31, 70_000) for share in (0, 0.003, 0.6, 1)]
    if dtype == torch.int64:
        cases += [(numel, np.unique(rng.integers(0, numel, 5000))) for numel in (1 << 31, (1 << 32) - 1, 1 << 33)]
        cases.append((1 << 33, np.array([(1 << 33) - 1])))
    alone = [encode_there(there(at).to(dtype), [at.size], [numel], [0])[0] for numel, at in cases]
    together = encode_there(
        torch.cat([there(at).to(dtype) for _, at in cases]),
        [at.size for _, at in cases],
        [numel for numel, _ in cases],
        [100] * len(cases),
    )
    for (numel, at), *both in zip(cases, alone, together, strict=True):
        for made in both:
            section = made.whole[made.start : made.stop].cpu().numpy()
            assert rice.decode(section, at.size, (numel,)).tolist() == at.tolist()
            assert section.size <= 1.1 * len(rice.encode(at, (numel,))) + 16


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_shifts_are_read_and_refused_as_by_numpy(size: int):
    """Several blocks, alone and together, and damaged ones: whatever is not read there is not sound."""
    rng, bases, sections, shifts = np.random.default_rng(size), [], [], []
    for count in 1, 100, 8192, 20_000:
        base = rng.integers(0, 256, count * size, np.uint8).view(f"<u{size}")
        large = rng.integers(1, min(1 << (8 * size - 1), 1 << 40), count) >> rng.integers(0, 40, count)
        magnitudes = np.where(rng.random(count) < (0 if count == 100 else 0.2), np.maximum(large, 1), 1)
        shifts.append((magnitudes * rng.choice([-1, 1], count)).astype(f"<i{size}"))
        sections.append(np.frombuffer(ULP_FROM_BASE.encode_on(shifts[-1].view(f"<u{size}"), base), np.uint8))
        bases.append(base)

    def decoded(sections: list[np.ndarray], bases: list[np.ndarray]) -> list[int] | None:
        (pool, starts), counts = Pool.of(sections), np.array([base.size for base in bases])
        parts = ClassedSections.of(pool, starts, np.array([section.size for section in sections]), counts)
        if parts is None:
            return None
        at, buffer = there(np.concatenate(bases)), there(np.concatenate(sections))
        begins = exclusive(np.array([section.size for section in sections]))
        found, sound = ShiftsThere.of(parts, buffer, begins).decode(SortedClasses(parts, at), at.dtype)
        return found.cpu().numpy().view(f"<i{size}").tolist() if sound else None

    for one in zip(sections, bases, shifts, strict=True):
        assert decoded([one[0]], [one[1]]) == one[2].tolist()
    assert decoded(sections, bases) == np.concatenate(shifts).tolist()
    refused = 0
    for _ in range(100):
        damaged = sections[3].copy()
        at = rng.integers(200) if rng.random() < 0.5 else rng.integers(damaged.size)
        damaged[at] ^= 1 << rng.integers(8)
        try:
            right = ULP_FROM_BASE.decode_on(damaged, 20_000, size, bases[3]).view(f"<i{size}").tolist()
        except FormatError as error:
            right = error.reason
        assert decoded([damaged], [bases[3]]) == (None if isinstance(right, str) else right)
        refused += isinstance(right, str)
    assert refused > 5


@pytest.mark.parametrize("backend", THERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e4m3fn, torch.float64])
@pytest.mark.parametrize("op", ["ulp", "set"])
@pytest.mark.parametrize("form", [torch.clone, in_strides])
def test_the_same_bits_as_the_plain_form(backend: str, dtype: torch.dtype, op: str, form):
    model = weights_of(dtype, form)
    plain, small = step(model, op)
    check_same(sd.HotSwap(model, backend=backend), model, plain, small)


@pytest.mark.parametrize("backend", THERE)
@pytest.mark.parametrize("check", [True, False])
def test_other_weights_are_refused_before_anything_is_written(backend: str, check: bool):
    model = weights_of(torch.bfloat16, torch.clone)
    _, small = step(model, "ulp")
    changed = [("flat", model["flat"].clone())]
    model["flat"][model["flat"].float().abs().argmin()] = 3.0
    swap = sd.HotSwap(model, backend=backend)
    before = {name: bits(tensor) for name, tensor in model.items()}
    with pytest.raises(FormatError, match="take out the adapters") as caught:
        swap.load("step", small, check=check)
    assert (caught.value.reason, caught.value.tensor, caught.value.file) == ("wrong_base", "flat", "delta")
    assert all(np.array_equal(bits(tensor), before[name]) for name, tensor in model.items())
    for name, right in changed:
        model[name].copy_(right)
    swap = sd.HotSwap(model, backend=backend)
    swap.load("step", small, check=check)


@pytest.mark.parametrize("backend", THERE)
def test_the_weights_are_not_read_while_others_are_on_them(backend: str):
    model = weights_of(torch.bfloat16, torch.clone)
    plain, small = step(model, "ulp")
    swap = sd.HotSwap(model, backend=backend)
    swap.load("other", plain)
    with swap.applied("other"):
        loading = swap.load_async("step", small)
        with pytest.raises(TimeoutError):
            loading.result(0.3)
    assert loading.result().nonzeros == swap.loaded["other"].nonzeros


@pytest.mark.parametrize("backend", THERE)
def test_only_the_named_tensors_are_read(backend: str):
    model = weights_of(torch.bfloat16, torch.clone)
    plain, small = step(model, "ulp")
    model["flat"][:] = 3.0
    found = []
    for data in plain, small:
        swap = sd.HotSwap(model, backend=backend)
        swap.load("step", data, only=["tall"])
        swap.switch("step")
        found.append(bits(model["tall"]))
        swap.revert()
    assert np.array_equal(*found)


@pytest.mark.parametrize("backend", THERE)
@pytest.mark.parametrize("which", [0, 1])
def test_damaged_sections_are_refused(backend: str, which: int):
    model = weights_of(torch.bfloat16, torch.clone)
    _, small = step(model, "ulp")
    with sd.open_delta(small) as delta:
        data = bytearray(small if delta.unpacked is None else delta.unpacked.tobytes())
        record = delta["square"].record
    section = (record.index, record.values)[which]
    data[section.offset + section.stored // 2] ^= 4
    with pytest.raises(FormatError) as caught:
        sd.HotSwap(model, backend=backend).load("step", bytes(data))
    assert (caught.value.reason, caught.value.tensor) == ("section_checksum", "square")
    assert caught.value.offset == section.offset


def with_fingerprints(data: bytes, right: dict[str, int] | None) -> bytes:
    """A file whose nonzeros have base fingerprints: the given ones, or one that is wrong for sure; None for none."""
    found, changed = layout(data), bytearray(data)
    assert found is not None
    for at, record in zip(found.records, records_of(data), strict=True):
        if record.nnz:
            known = None if right is None else right.get(record.tensor.name, 12345)
            changed[at + FLAGS] = changed[at + FLAGS] & ~HAS_BASE | (HAS_BASE if known is not None else 0)
            changed[at + FINGERPRINT : at + FINGERPRINT + 8] = struct.pack("<Q", known or 0)
    table = changed[slice(*found.table)]
    changed[TABLE_CRC : TABLE_CRC + 4] = struct.pack("<I", zlib.crc32(table))
    return with_header_crc(changed)


@pytest.mark.parametrize("backend", THERE)
def test_by_digest_where_a_tensor_has_no_fingerprint(backend: str):
    model = weights_of(torch.bfloat16, torch.clone)
    _, small = step(model, "ulp")
    with sd.open_delta(small) as delta:
        data = with_fingerprints(small if delta.unpacked is None else delta.unpacked.tobytes(), None)
    sd.HotSwap(model, backend=backend).load("step", data)
    model["flat"][model["flat"].float().abs().argmin()] = 3.0
    with pytest.raises(FormatError, match="another base"):
        sd.HotSwap(model, backend=backend).load("step", data)


def model_of(data: bytes, elements: bytes) -> dict[str, torch.Tensor]:
    """The base of a vector, on the device."""
    model = {}
    for record, own in zip(records_of(data), base_of(data, elements).values(), strict=True):
        dtype = record.tensor.dtype
        dtype = getattr(torch, f"{dtype}fn" if dtype.endswith("e4m3") else dtype)
        flat = torch.frombuffer(bytearray(own), dtype=dtype) if own else torch.zeros(0, dtype=dtype)
        model[record.tensor.name] = flat.reshape(record.tensor.shape).to(DEVICE)
    return model


@pytest.mark.parametrize("backend", THERE)
def test_vectors_are_read_and_refused_alike(backend: str):
    """Files of the corpus, with a fingerprint of the base in each record."""
    wrong, files = {}, [path for path in sorted(WITH_BASE.glob("*.shd")) if not is_packed(path.read_bytes())]
    assert len(files) > 130
    for path in files:
        data, right = path.read_bytes(), {}
        model = model_of(data, path.with_suffix(".base").read_bytes())
        if path.stem not in REFUSED:
            for tensor in json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["tensors"]:
                positions = np.array(tensor["positions"], np.int64)
                right[tensor["name"]] = choose().fingerprint(positions, bits(model[tensor["name"]])[positions])
        try:
            sd.HotSwap(model, backend=backend).load("vector", with_fingerprints(data, right))
            found = None
        except FormatError as error:
            found = error.reason
        if found != REFUSED.get(path.stem):
            wrong[path.stem] = found
    assert wrong == {}


SHAPES = {"one": (1,), "rows": (160, 60), "tall": (3000, 3), "dense": (40, 30), "none": (7, 7), "flat": (1000,)}
LIKELY = {"one": 1.0, "dense": 0.9, "none": 0.0}


def in_small_tiles(tensors: dict[str, sd.TensorDelta], base: dict[str, np.ndarray]) -> bytes:
    """A file that is read with its base, whose tensors have many tiles."""
    output = io.BytesIO()
    with (
        sd.open_delta(adapter(tensors)) as delta,
        writing_to(output, "f32") as writer,
        pytest.MonkeyPatch.context() as m,
    ):
        m.setattr(registry, "MAX_BASE_TILE", 1 << 10)
        for name, stored in delta.items():
            record, sections = stored.record, (b"", b"")
            if record.nnz:
                positions = stored.positions()
                values = ULP_FROM_BASE.encode_on(stored.bits(), base[name][positions])
                sections = FROM_BASE.encode_on(positions, record.shape, base[name]) or b"", values
                record = record._replace(index_codec=FROM_BASE.id, value_codec=ULP_FROM_BASE.id)
            writer.add_sections(record, tensor_digest(stored), *sections, compress=name == "flat")
    return output.getvalue()


def many_tensors(dtype: torch.dtype) -> tuple[Weights, dict[str, sd.TensorDelta]]:
    """A model and a step: one element, many tiles, classes of rows, dense ones, and one without nonzeros."""
    rng, model, tensors = np.random.default_rng(0), {}, {}
    torch.manual_seed(0)
    for name, shape in SHAPES.items():
        model[name] = (torch.randn(shape) * 0.02).to(dtype).to(DEVICE)
        there, small = bits(model[name]), np.abs(model[name].float().cpu().numpy().reshape(-1))
        of_rows = np.resize([1, 0.05], small.size) if name == "rows" else 1
        likely = LIKELY.get(name, np.where(small < np.median(small), 0.2, 0.01) * of_rows)
        positions = np.flatnonzero(rng.random(small.size) < likely)
        shifts = rng.choice([-3, -1, 1, 2], positions.size)
        known = str(dtype).removeprefix("torch.")
        tensors[name] = sd.TensorDelta(shape, positions, shifts, known, "ulp", there[positions])
    return model, tensors


def refusal(model: Weights, backend: str, data: bytes) -> tuple[str, str | None]:
    """(reason, tensor) of a file; a digest names no tensor."""
    with pytest.raises(FormatError) as caught:
        sd.HotSwap(model, backend=backend).load("step", data)
    return caught.value.reason, caught.value.tensor if caught.value.reason != "wrong_base" else None


@pytest.mark.parametrize("backend", THERE)
def test_damaged_positions_are_refused_as_by_numpy(monkeypatch: pytest.MonkeyPatch, backend: str):
    """Checksums are right, so that decoders see what is wrong, or the fingerprint does."""
    model, tensors = many_tensors(torch.bfloat16)
    host = {name: tensor.cpu() for name, tensor in model.items()}
    data = in_small_tiles(tensors, {name: bits(tensor) for name, tensor in model.items()})
    with sd.open_delta(data) as delta:
        section = delta["rows"].record.index
    where = layout(data)
    assert where is not None
    at = next(at for at in where.records if number(data, at + 40, 8) == section.offset)
    rng, seen = np.random.default_rng(0), set()
    for _ in range(12):
        damaged = bytearray(data)
        damaged[section.offset + rng.integers(rng.choice([60, section.stored]))] ^= 1 << rng.integers(8)
        crc = zlib.crc32(damaged[section.offset : section.offset + section.stored])
        damaged[at + 88 : at + 92] = struct.pack("<I", crc)
        damaged[TABLE_CRC : TABLE_CRC + 4] = struct.pack("<I", zlib.crc32(damaged[slice(*where.table)]))
        monkeypatch.setattr(on_base, "write_plain", write_plain)
        right = refusal(host, "numpy", with_header_crc(damaged))
        monkeypatch.setattr(on_base, "write_plain", None)
        assert refusal(model, backend, with_header_crc(damaged)) == right
        seen.add(right)
    assert len(seen) > 2


@pytest.mark.skipif(bool(why_not(LIVE_BACKENDS["triton"])), reason="not here")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e5m2, torch.float64])
@pytest.mark.parametrize("most", [1 << 30, 50_000])
def test_many_tensors_are_read_together(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, most: int):
    from shiradelta.hotswap.triton import batches

    model, tensors = many_tensors(dtype)
    before = {name: bits(tensor) for name, tensor in model.items()}
    on_base = in_small_tiles(tensors, before)
    monkeypatch.setattr(batches, "_room", lambda device: most)
    monkeypatch.setattr(TorchBackend, "read_on_base", None)  # what reads them one by one
    check_same(sd.HotSwap(model, backend="triton"), model, adapter(tensors), on_base)
