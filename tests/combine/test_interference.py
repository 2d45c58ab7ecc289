"""Interference: every figure against its definition on dense arrays, and what is refused or warned of."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import shiradelta
from shiradelta import TensorDelta
from shiradelta.combine import products
from shiradelta.combine.interference import Meeting, measure, pooled
from shiradelta.errors import BaseMismatchError, DeltaError
from shiradelta.models.names import in_model_order

SHAPES = {
    "layers.0.up.weight": (48, 40),
    "layers.0.norm.weight": (40,),
    "layers.10.conv.weight": (12, 5, 3, 3),
    "layers.10.experts": (3, 12, 40),
    "layers.10.kernel.weight": (20, 10, 7),
}


def save(path: Path, tensors: dict[str, TensorDelta], **metadata: str) -> Path:
    shiradelta.save_delta(path, tensors, values="f32", metadata=metadata)
    return path


def random_delta(path: Path, seed: int, density: float = 0.2, scale: float = 1.0) -> Path:
    generator = np.random.default_rng(seed)
    tensors = {}
    for name, shape in SHAPES.items():
        positions = np.flatnonzero(generator.random(np.prod(shape)) < density)
        values = scale * generator.standard_normal(positions.size)
        tensors[name] = TensorDelta(shape, positions, values)
    return save(path, tensors)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    # Changes as small as 1e-25: their products' squares are far below the smallest float32.
    return [
        random_delta(tmp_path / f"d{seed}.shd", seed, scale=scale) for seed, scale in ((0, 1.0), (1, 1e-25), (2, 3.0))
    ]


@pytest.mark.parametrize("full", [0, 8, 1 << 40], ids=["sparse", "as it comes", "arrays"])
def test_every_figure_is_that_of_dense_arrays(files: list[Path], full: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(products, "_FULL", full)
    strengths = [0.5, -2.0, 1.0]
    found = measure(dict(zip(files, strengths, strict=True)))
    assert found.labels == ("d0", "d1", "d2")
    assert list(found.pairs) == [(0, 1), (0, 2), (1, 2)]
    deltas = [shiradelta.open_delta(file) for file in files]
    for i, j in combinations(range(3), 2):
        norms = []
        for name, shape in SHAPES.items():
            met = found.pairs[i, j][name]
            a, b = (np.float64(strengths[k]) * deltas[k][name].to_dense() for k in (i, j))
            both = (a != 0) & (b != 0)
            assert met.nnz == (np.count_nonzero(a), np.count_nonzero(b))
            assert met.shared == np.count_nonzero(both)
            assert met.shares == (met.shared / met.nnz[0], met.shared / met.nnz[1])
            assert met.jaccard == met.shared / np.count_nonzero((a != 0) | (b != 0))
            assert met.opposed == np.count_nonzero(np.sign(a) * np.sign(b) == -1)
            assert met.chance == pytest.approx(met.nnz[0] * met.nnz[1] / a.size)
            assert met.cosine == pytest.approx((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-5)
            if name.endswith("experts"):
                stacked = list(zip(a, b, strict=True))
            else:
                stacked = [tuple(x.reshape(shape[0] if len(shape) > 1 else 1, -1) for x in (a, b))]
            norms.append(max(np.linalg.norm(a.T @ b, 2) for a, b in stacked))
            assert met.awom == pytest.approx(norms[-1], rel=1e-5)
            supports = np.array([(a != 0).T.astype(int) @ (b != 0).astype(int) for a, b in stacked])
            assert met.awor == 1 - np.count_nonzero(supports) / supports.size
            assert not met.estimated
        total = found.total((i, j))
        assert total.awom == pytest.approx(max(norms), rel=1e-5)
        a, b = (
            np.concatenate([strengths[k] * deltas[k][n].to_dense().ravel().astype(float) for n in SHAPES])
            for k in (i, j)
        )
        assert total.cosine == pytest.approx((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-5)


@pytest.mark.parametrize("small", [0.0, 1e-38])
def test_a_product_of_next_to_nothing(tmp_path: Path, small: float):
    """Rows 0 and 1 of both are listed, but one of them changes row 0 alone, the other row 1: Lanczos finds nothing."""
    one = TensorDelta((40, 50), [3, 60], np.float32([1, small]))
    other = TensorDelta((40, 50), [11, 90], np.float32([small, 1]))
    paths = [save(tmp_path / f"{name}.shd", {"w": t}) for name, t in (("a", one), ("b", other))]
    assert measure(dict.fromkeys(paths, 1.0)).total((0, 1)).awom == pytest.approx(small, rel=1e-5)


def test_layers_are_in_the_order_of_the_model(files: list[Path]):
    found = measure(dict.fromkeys(files[:2], 1.0))
    assert list(found.layers((0, 1))) == ["layers.0", "layers.10"]
    assert sum(m.shared for m in found.layers((0, 1)).values()) == found.total((0, 1)).shared
    names = ["h.10.w", "h.2.w", "head", "unet/h.1.w"]
    assert in_model_order(reversed(names)) == ["h.2.w", "h.10.w", "head", "unet/h.1.w"]


def test_large_products_are_estimated_within_a_few_percent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    generator = np.random.default_rng(0)
    for seed in range(2):
        # Uneven columns, which a sample has to catch.
        density = np.tile(np.linspace(0, 0.04, 900), (300, 1))
        positions = np.flatnonzero(generator.random((300, 900)) < density)
        save(tmp_path / f"{seed}.shd", {"w": TensorDelta((300, 900), positions, np.ones(positions.size))})
    files = {tmp_path / "0.shd": 1.0, tmp_path / "1.shd": 1.0}
    exact = measure(files).total((0, 1))
    monkeypatch.setattr(products, "_COUNTED", 1000)
    estimate = measure(files).total((0, 1))
    assert (exact.estimated, estimate.estimated) == (False, True)
    assert estimate.product == pytest.approx(exact.product, rel=0.05)
    assert estimate.product == measure(files).total((0, 1)).product


def test_a_tensor_that_one_of_them_changes_counts_in_the_shares_alone(tmp_path: Path):
    a = save(tmp_path / "a.shd", {"w": TensorDelta((9,), [1, 2], [1.0, 2.0]), "v": TensorDelta((9,), [3], [2.0])})
    b = save(tmp_path / "b.shd", {"w": TensorDelta((9,), [2, 5], [-1.0, 2.0])})
    found = measure({a: 1.0, b: 1.0})
    total = found.total((0, 1))
    assert (total.nnz, total.shared, total.opposed) == ((3, 2), 1, 1)
    assert total.squares == (9.0, 5.0)
    assert total.cosine == pytest.approx(-2 / np.sqrt(45))
    assert total.product_size == 81
    assert total.awom == pytest.approx(5)  # |(1, 2)| * |(-1, 2)|: rows of one are outer products


def test_what_is_set_has_supports_but_no_direction(tmp_path: Path):
    def setting(*at: int) -> TensorDelta:
        return TensorDelta((4, 4), list(at), np.full(len(at), 7, np.uint16), dtype="bfloat16", op="set")

    a = save(tmp_path / "a.shd", {"w": setting(1, 3), "v": TensorDelta((9,), [1], [1.0])})
    b = save(tmp_path / "b.shd", {"w": setting(3, 5), "v": TensorDelta((9,), [2], [1.0])})
    c = save(tmp_path / "c.shd", {"w": TensorDelta((4, 4), [3, 4], [1.0, 1.0])})
    found = measure({a: 1.0, b: 1.0, c: 1.0})
    both, mixed = found.total((0, 1)), found.total((0, 2))
    assert (both.shared, both.clashes, both.opposed_share) == (1, 1, None)
    assert found.pairs[0, 1]["w"].awom is None
    assert found.pairs[0, 1]["w"].awor == 1 - 2 / 16
    assert (mixed.shared, mixed.clashes, mixed.cosine) == (1, 1, None)
    assert "is set in a and add in c; they cannot be fused" in " ".join(found.warnings)
    with pytest.raises(DeltaError, match="strength 1 only"):
        measure({a: 0.5, b: 1.0})


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (TensorDelta((3, 3), [1], [1.0]), "shapes"),
        (TensorDelta((9,), [1], [1.0], dtype="float32"), "bfloat16 and float32"),
        (TensorDelta((9,), [1], [1.0], dtype="bfloat16", base_bits=np.ones(1, np.uint16)), "different bases"),
    ],
)
def test_different_bases_are_refused(tmp_path: Path, other: TensorDelta, message: str):
    a = save(
        tmp_path / "a.shd", {"w": TensorDelta((9,), [1], [2.0], dtype="bfloat16", base_bits=np.zeros(1, np.uint16))}
    )
    with pytest.raises(BaseMismatchError, match=message):
        measure({a: 1.0, save(tmp_path / "b.shd", {"w": other}): 1.0})


def test_what_looks_wrong_is_said(files: list[Path], tmp_path: Path):
    a = save(tmp_path / "a.shd", {"w": TensorDelta((9,), [1], [2.0])}, base="llama")
    b = save(tmp_path / "b.shd", {"model.w": TensorDelta((9,), [1], [2.0])}, base="qwen")
    warnings = measure({a: 1.0, b: 1.0}).warnings
    assert "different bases (llama, qwen)" in warnings[0]
    assert "no tensor in common" in warnings[1]
    copy = tmp_path / "copy.shd"
    copy.write_bytes(files[0].read_bytes())
    with pytest.raises(DeltaError, match="same delta"):
        measure({files[0]: 1.0, files[1]: 1.0, copy: 1.0})


def test_nothing_at_all(tmp_path: Path):
    a = save(tmp_path / "a.shd", {"w": TensorDelta((0, 4), [], []), "v": TensorDelta((), [0], [0.0])})
    b = save(tmp_path / "b.shd", {"w": TensorDelta((0, 4), [], []), "v": TensorDelta((), [], [])})
    total = measure({a: 1.0, b: 1.0}).total((0, 1))
    assert (total.nnz, total.shared, total.cosine, total.awom) == ((1, 0), 0, None, 0.0)
    assert measure({a: 1.0}).pairs == {}


@given(
    st.lists(
        st.builds(Meeting, nnz=st.tuples(st.integers(1, 9), st.integers(1, 9)), shared=st.integers(0, 1)), min_size=1
    )
)
def test_pooling_is_adding(meetings: list[Meeting]):
    total = pooled(meetings)
    assert total.nnz == tuple(sum(m.nnz[k] for m in meetings) for k in (0, 1))
    assert total.shared == sum(m.shared for m in meetings)
    assert total.awom is None
