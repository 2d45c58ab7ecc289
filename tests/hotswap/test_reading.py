"""A file that is read while its tables are looked at is refused as the same bytes in memory are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

import shiradelta as sd
from shiradelta import HotSwap, TensorDelta
from shiradelta.errors import FormatError, ShiraDeltaError
from shiradelta.hotswap import reading
from tests.reference import INVALID, VALID

BACKENDS = ["libshd", "numpy"]
SHAPE = (64, 64)
Refused = tuple[type[ShiraDeltaError], str | None]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    tensors = {
        name: TensorDelta(SHAPE, np.arange(0, 4096, 33), rng.standard_normal(125).astype(np.float32))
        for name in ("a", "b")
    }
    sd.save_delta(tmp_path / "d.shd", tensors, values="int8")
    return tmp_path / "d.shd"


def model(names: Iterable[str] = ("a", "b")) -> dict[str, np.ndarray]:
    return {name: np.zeros(SHAPE, np.float32) for name in names}


def refusal(load: Callable[[], object]) -> Refused:
    with pytest.raises(ShiraDeltaError) as caught:
        load()
    return type(caught.value), getattr(caught.value, "reason", None)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_file_is_loaded_as_its_bytes_are(adapter: Path, backend: str):
    results = []
    for source in (adapter, adapter.read_bytes()):
        weights = model()
        swap = HotSwap(weights, backend=backend)
        swap.load("a", source)
        swap.switch("a")
        results.append({name: weight.copy() for name, weight in weights.items()})
    assert all(np.array_equal(results[0][name], results[1][name]) for name in results[0])
    assert results[0]["a"].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("folder", [INVALID, VALID])
def test_vectors_are_refused_as_their_bytes_are(backend: str, folder: Path):
    for path in sorted(folder.glob("*.shd")):
        swap = HotSwap(model(["w"]), backend=backend)
        expected = refusal(lambda: swap.load("a", path.read_bytes()))  # noqa: B023
        found = refusal(lambda: swap.load("a", path))  # noqa: B023
        assert found == expected, path


@pytest.mark.parametrize("backend", BACKENDS)
def test_bytes_behind_sections_are_checked(adapter: Path, backend: str):
    data = bytearray(adapter.read_bytes())
    with sd.open_delta(bytes(data)) as delta:
        sections = [section for one in delta.values() for section in (one.record.index, one.record.values)]
    ends = [section.offset + section.stored for section in sections if section.end > section.offset + section.stored]
    assert ends
    for end in ends:
        changed = bytearray(data)
        changed[end] = 1
        adapter.write_bytes(changed)
        with pytest.raises(FormatError, match="padding_not_zero") as caught:
            HotSwap(model(), backend=backend).load("a", adapter)
        assert caught.value.file == str(adapter)
        assert caught.value.tensor in ("a", "b")


def test_a_file_that_ends_early_is_refused(adapter: Path, monkeypatch: pytest.MonkeyPatch):
    whole = reading._read_at

    def shorter(stream: object, path: Path, data: np.ndarray, start: int, end: int) -> int:
        return whole(stream, path, data, start, end) - (start > 0 and end == data.size)

    monkeypatch.setattr(reading, "_read_at", shorter)
    with pytest.raises(ShiraDeltaError, match=r"d\.shd: was cut short while it was read; try again"):
        HotSwap(model()).load("a", adapter)


def test_a_system_without_preadv_reads_the_same(adapter: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr("os.preadv")
    swap = HotSwap(model())
    assert swap.load("a", adapter).nonzeros == 250
