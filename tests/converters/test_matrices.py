"""Sparse matrices of differences: SciPy's files and torch.sparse tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch

import shiradelta
from shiradelta.errors import SourceError
from tests.conftest import SHAPES, random_tensors, write_model

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_model(tmp_path / "base", random_tensors(torch.bfloat16))


def change() -> np.ndarray[Any, Any]:
    rows, columns = SHAPES[UP]
    made = np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)
    made[np.random.default_rng(1).random((rows, columns)) < 0.8] = 0
    return made


def changed(source: Path, base: Path | None) -> np.ndarray[Any, Any]:
    shiradelta.convert(source, source.parent / "x.shd", 1.0, base, "f32")
    with shiradelta.open_delta(source.parent / "x.shd") as delta:
        assert list(delta) == [UP]
        assert (delta[UP].base_fingerprint is None) == (base is None)
        return np.asarray(delta[UP].to_dense())


@pytest.mark.filterwarnings("ignore:Constructing a DIA matrix")
@pytest.mark.parametrize("layout", ["csr", "csc", "coo", "bsr", "dia"])
@pytest.mark.parametrize("array", [True, False])
def test_layouts_of_scipy(tmp_path: Path, base: Path, layout: str, array: bool):
    of = scipy.sparse.coo_array if array else scipy.sparse.coo_matrix
    made = of(change()).asformat(layout)
    (tmp_path / "diffs").mkdir()
    scipy.sparse.save_npz(tmp_path / "diffs" / f"{UP}.npz", made)
    for source in (tmp_path / "diffs", tmp_path / "diffs" / f"{UP}.npz"):
        np.testing.assert_array_equal(changed(source, base), change())
    np.testing.assert_array_equal(changed(tmp_path / "diffs", None), change())


@pytest.mark.filterwarnings("ignore:Sparse .* support is in beta state")
@pytest.mark.parametrize("layout", ["coo", "csr", "csc", "bsr", "bsc"])
def test_layouts_of_torch(tmp_path: Path, base: Path, layout: str):
    dense = torch.from_numpy(change())
    blocks = {"blocksize": (2, 2)} if layout[0] == "b" else {}
    made = dense.to_sparse(layout=getattr(torch, f"sparse_{layout}"), **blocks)
    torch.save({UP: made}, tmp_path / "diffs.pt")
    np.testing.assert_array_equal(changed(tmp_path / "diffs.pt", base), change())


def test_elements_that_are_listed_twice_add_up(tmp_path: Path, base: Path):
    made = scipy.sparse.coo_array(([1.0, 2.0, 4.0], ([0, 0, 1], [3, 3, 0])), shape=SHAPES[UP])
    scipy.sparse.save_npz(tmp_path / f"{UP}.npz", made)
    found = changed(tmp_path / f"{UP}.npz", base)
    assert (found[0, 3], found[1, 0], np.count_nonzero(found)) == (3.0, 4.0, 2)


@pytest.mark.parametrize(
    ("put", "message"),
    [
        ({"indices": np.array([99_999], np.int32)}, "has indices that do not fit its shape"),
        ({"indices": np.array([-1], np.int32)}, "has indices that do not fit its shape"),
        ({"indices": np.array([0.5])}, "indices that are no integers"),
        ({"indptr": np.array([0, 5], np.int32)}, "has indices that do not fit its shape"),
        ({"data": np.array([np.nan])}, "has NaN or infinity"),
        ({"data": np.array([1j])}, "is of complex128"),
        ({"format": np.array(b"xyz")}, "is in layout 'xyz', none of coo, csr"),
        ({"shape": np.array([3, 3])}, r"its shape is \[3, 3\], the base's"),
        ({"format": np.array(1.5)}, "is damaged"),
    ],
)
def test_damaged_matrices(tmp_path: Path, base: Path, put: dict[str, Any], message: str):
    pointers = np.zeros(SHAPES[UP][0] + 1, np.int32)
    pointers[1:] = 1
    parts = {
        "indices": np.array([2], np.int32),
        "indptr": pointers,
        "data": np.array([1.0]),
        "format": np.array(b"csr"),
    }
    np.savez(tmp_path / f"{UP}.npz", **{**parts, "shape": np.array(SHAPES[UP]), **put})
    with pytest.raises(SourceError, match=message) as caught:
        changed(tmp_path / f"{UP}.npz", base)
    assert "\n" not in str(caught.value)


def test_a_file_that_unpacks_to_too_much(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shiradelta.converters.npz._MOST", 1000)
    made = scipy.sparse.csr_array((np.ones(100_000), np.arange(100_000), [0, 100_000]), shape=(1, 100_000))
    scipy.sparse.save_npz(tmp_path / f"{UP}.npz", made)
    monkeypatch.setattr("shiradelta.converters.npz._TIMES", 1)
    with pytest.raises(SourceError, match="more than arrays of its size"):
        changed(tmp_path / f"{UP}.npz", base)


def test_dense_tensors_beside_sparse_ones(tmp_path: Path, base: Path):
    torch.save({UP: torch.eye(3).to_sparse(), "other": torch.ones(2)}, tmp_path / "x.pt")
    with pytest.raises(SourceError, match=r"'other' is dense|its shape is|has no such tensor"):
        changed(tmp_path / "x.pt", base)


@pytest.mark.parametrize("at", [40, 300, -30])
def test_bytes_that_are_wrong(tmp_path: Path, base: Path, at: int):
    """Compressed data, headers of entries, the archive's list of them."""
    scipy.sparse.save_npz(tmp_path / f"{UP}.npz", scipy.sparse.csr_array(change()))
    held = bytearray((tmp_path / f"{UP}.npz").read_bytes())
    for value in (0, 255, held[at] ^ 16):
        held[at] = value
        (tmp_path / f"{UP}.npz").write_bytes(held)
        with pytest.raises(shiradelta.ShiraDeltaError) as caught:
            changed(tmp_path / f"{UP}.npz", base)
        assert "\n" not in str(caught.value)


def test_an_archive_of_a_later_version(tmp_path: Path, base: Path):
    scipy.sparse.save_npz(tmp_path / f"{UP}.npz", scipy.sparse.csr_array(change()))
    held = bytearray((tmp_path / f"{UP}.npz").read_bytes())
    held[held.index(b"PK\x01\x02") + 6] = 255
    for name in (f"{UP}.npz", "x.pt"):
        (tmp_path / name).write_bytes(held)
        with pytest.raises(shiradelta.ShiraDeltaError):
            changed(tmp_path / name, base)
