"""Fusion: the sum is what applying together does, nothing depends on the order, and what cannot be fused is said."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import shiradelta
from shiradelta import TensorDelta
from shiradelta.cli import main
from shiradelta.combine.interference import measure
from shiradelta.combine.methods import METHODS, disjoint, largest, mean, methods_with, ties, weighted_sum
from shiradelta.combine.overlay import Overlay, overlay
from shiradelta.errors import BaseMismatchError, DeltaError, TargetError
from shiradelta.format import arithmetic
from shiradelta.format.arithmetic import Float32
from shiradelta.util.arrays import WINDOW
from shiradelta.util.version import made_by
from tests.conftest import write_model

SHAPE = (40, 50)


def sparse(seed: int, density: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    positions = np.flatnonzero(generator.random(2000) < density)
    return positions, generator.standard_normal(positions.size).astype(np.float32)


@pytest.fixture
def three(tmp_path: Path) -> dict[Path, float]:
    files = {}
    base = np.random.default_rng(9).integers(0x3C00, 0x4000, 2000).astype(np.uint16)
    for seed, strength in enumerate((0.7, -1.3, 1.0)):
        positions, values = sparse(seed)
        tensors = {
            "shared": TensorDelta(SHAPE, positions, values, dtype="bfloat16", base_bits=base[positions]),
            f"own{seed}": TensorDelta(SHAPE, positions, values, dtype="bfloat16", base_bits=base[positions]),
        }
        shiradelta.save_delta(
            tmp_path / f"{seed}.shd", tensors, metadata={"base": "b", "base_revision": "1"}, values="int8"
        )
        files[tmp_path / f"{seed}.shd"] = strength
    return files


def together(files: dict[Path, float], name: str, weight: np.ndarray) -> np.ndarray:
    """FORMAT.md, 6.2, element by element."""
    result = weight.copy()
    opened = sorted(((shiradelta.open_delta(f), s) for f, s in files.items()), key=lambda pair: pair[0].digest)
    sums: dict[int, np.float32] = {}
    for delta, strength in opened:
        if name in delta:
            for position, value in zip(delta[name].positions(), delta[name].values(), strict=True):
                s = np.float32(strength) * value
                sums[int(position)] = sums[int(position)] + s if int(position) in sums else s
    at = np.array(sorted(sums))
    result[at] = arithmetic.add(weight[at], "bfloat16", np.array([sums[p] for p in at], np.float32))
    return result


def test_fused_then_applied_is_applied_together_in_whatever_order(three: dict[Path, float], tmp_path: Path):
    weight = np.random.default_rng(5).integers(0, 1 << 16, 2000).astype(np.uint16)
    written = set()
    for order in permutations(three.items()):
        report = shiradelta.fuse(dict(order), tmp_path / "out.shd")
        written.add((tmp_path / "out.shd").read_bytes())
    assert len(written) == 1
    assert report.conflicts > 0
    with shiradelta.open_delta(tmp_path / "out.shd") as fused:
        assert list(fused) == ["own0", "own1", "own2", "shared"]
        assert fused.metadata["base"] == "b"
        assert fused.metadata["base_revision"] == "1"
        assert fused.metadata["created_by"] == made_by()
        assert "seed" not in fused.metadata
        for name in fused:
            patched = weight.copy()
            fused[name].patch(patched, "bfloat16")
            assert np.array_equal(patched, together(three, name, weight))


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 30), st.sampled_from([-2.0, -1.0, 1.0, 3.0])), max_size=12),
        min_size=1,
        max_size=4,
    )
)
def test_methods_against_a_plain_loop(parts: list[list[tuple[int, float]]]):
    unique = [dict(part) for part in parts]
    arrays = [
        (np.array(sorted(part), np.int64), np.array([part[p] for p in sorted(part)], np.float32)) for part in unique
    ]
    merged = overlay(arrays)
    elements = sorted({p for part in unique for p in part})
    assert merged.positions.tolist() == elements
    columns = [[part[p] for part in unique if p in part] for p in elements]
    assert weighted_sum(merged).tolist() == [sum(c) for c in columns]
    assert mean(merged).tolist() == pytest.approx([sum(c) / len(parts) for c in columns])
    assert largest(merged).tolist() == [max(c, key=abs) for c in columns]
    expected = []
    for c in columns:
        agreeing = [v for v in c if np.sign(v) == np.sign(sum(c))]
        expected.append(sum(agreeing) / max(len(agreeing), 1))
    assert ties(merged).tolist() == pytest.approx(expected)
    assert all(value in column for value, column in zip(disjoint(merged).tolist(), columns, strict=True))


def test_an_input_is_not_replaced(three: dict[Path, float], tmp_path: Path):
    first = next(iter(three))
    before = first.read_bytes()
    with pytest.raises(DeltaError, match="is one of the files to fuse"):
        shiradelta.fuse(three, tmp_path / ".." / tmp_path.name / first.name)
    assert first.read_bytes() == before


def test_the_mean_is_over_all_inputs(tmp_path: Path):
    """Those that do not have a tensor, too."""
    here = TensorDelta((4,), [0, 2], np.float32([4, -0.0]))
    files = {
        save(tmp_path / "a.shd", w=here, q=here): 1.0,
        save(tmp_path / "b.shd", w=TensorDelta((4,), [1], np.float32([2]))): 1.0,
    }
    shiradelta.fuse(files, tmp_path / "c.shd", "mean")
    with shiradelta.open_delta(tmp_path / "c.shd") as fused:
        assert fused["q"].values().tolist() == [2, 0]
        assert fused["w"].values().tolist() == [2, 1, 0]


def test_a_delta_of_any_dtype_does_not_hide_that_others_differ(tmp_path: Path):
    """Whatever stands first."""
    dtypes = ("unspecified", "bfloat16", "float32")
    paths = [
        save(tmp_path / f"{dtype}.shd", w=TensorDelta((9,), [number], np.float32([1]), dtype))
        for number, dtype in enumerate(dtypes)
    ]
    for order in permutations(paths):
        for work in (lambda files: shiradelta.fuse(files, tmp_path / "x.shd"), measure):
            with pytest.raises(BaseMismatchError, match=r"made against (bfloat16|float32) and"):
                work(dict.fromkeys(order, 1.0))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_changes_that_overflow_are_refused(tmp_path: Path, method: str):
    files = [save(tmp_path / f"{sign}.shd", w=TensorDelta((9,), [1], np.float32([sign * 1e38]))) for sign in (1, -1)]
    with pytest.raises(DeltaError, match="larger than float32 holds"):
        shiradelta.fuse(dict.fromkeys(files, 100.0), tmp_path / "x.shd", method)


def test_slerp_keeps_the_angle_between_two_deltas(tmp_path: Path):
    for name, at, value in (("a", [0, 1], [3.0, 0.0]), ("b", [1, 2], [3.0, 0.0])):
        tensors = {"both": TensorDelta((4,), at, value), name: TensorDelta((4,), [0], [6.0])}
        shiradelta.save_delta(tmp_path / f"{name}.shd", tensors, values="f32")
    shiradelta.fuse({tmp_path / "a.shd": 2.0, tmp_path / "b.shd": 1.0}, tmp_path / "c.shd", method="slerp")
    with shiradelta.open_delta(tmp_path / "c.shd") as delta:
        expected = [3 * np.cos(np.pi / 6), 3 * np.sin(np.pi / 6), 0, 0]
        assert np.allclose(delta["both"].to_dense(), expected)
        assert delta["a"].values() == pytest.approx([4.0])
        assert delta["b"].values() == pytest.approx([2.0])
    for strengths in ({"a": 1.0}, {"a": 1.0, "b": -1.0}):
        with pytest.raises(DeltaError, match="slerp takes two deltas"):
            shiradelta.fuse(
                {tmp_path / f"{name}.shd": s for name, s in strengths.items()}, tmp_path / "d.shd", method="slerp"
            )


def test_disjoint_lets_all_give_up_alike():
    positions = np.arange(1000)
    merged = overlay([(positions, np.full(1000, 1, np.float32)), (positions, np.full(1000, 2, np.float32))])
    assert np.count_nonzero(disjoint(merged) == 1) == 500


@pytest.mark.parametrize("method", methods_with("seed"))
def test_dropping_is_seeded_unbiased_and_independent_of_order(three: dict[Path, float], tmp_path: Path, method: str):
    one = {next(iter(three)): 1.0}
    shiradelta.fuse(one, tmp_path / "a.shd", method, drop=0.6)
    shiradelta.fuse(one, tmp_path / "b.shd", method, drop=0.6)
    shiradelta.fuse(one, tmp_path / "c.shd", method, drop=0.6, seed=1)
    a, b, c = ((tmp_path / f"{n}.shd").read_bytes() for n in "abc")
    assert a == b
    with shiradelta.open_delta(a) as first, shiradelta.open_delta(c) as other:
        assert first.digest != other.digest
        assert (first.metadata["seed"], other.metadata["seed"]) == ("0", "1")
    with shiradelta.open_delta(next(iter(one))) as before, shiradelta.open_delta(tmp_path / "a.shd") as after:
        assert 0.3 < after["shared"].nnz / before["shared"].nnz < 0.5
        share = np.abs(after["shared"].values()).sum() / np.abs(before["shared"].values()).sum()
        assert share == pytest.approx(1, abs=0.15)
    shiradelta.fuse(three, tmp_path / "x.shd", method)
    shiradelta.fuse(dict(reversed(three.items())), tmp_path / "y.shd", method)
    assert (tmp_path / "x.shd").read_bytes() == (tmp_path / "y.shd").read_bytes()


def test_fingerprints_follow_where_they_can(three: dict[Path, float], tmp_path: Path):
    shiradelta.fuse(three, tmp_path / "out.shd")
    with shiradelta.open_delta(tmp_path / "out.shd") as fused, shiradelta.open_delta(next(iter(three))) as one:
        assert fused["own0"].base_fingerprint == one["own0"].base_fingerprint
        assert fused["shared"].base_fingerprint is None
    halves = {}
    for half, positions in enumerate((np.arange(0, 100), np.arange(100, 300))):
        tensor = TensorDelta(
            SHAPE, positions, np.ones(positions.size), "bfloat16", base_bits=np.arange(2000, dtype=np.uint16)[positions]
        )
        shiradelta.save_delta(tmp_path / f"h{half}.shd", {"w": tensor})
        halves[tmp_path / f"h{half}.shd"] = 1.0
    shiradelta.fuse(halves, tmp_path / "whole.shd")
    with shiradelta.open_delta(tmp_path / "whole.shd") as whole:
        expected = arithmetic.fingerprint(np.arange(300), np.arange(300, dtype=np.uint16))
        assert whole["w"].base_fingerprint == expected


def save(path: Path, **tensors: TensorDelta) -> Path:
    shiradelta.save_delta(path, tensors, values="f32")
    return path


def test_sets_are_joined_but_never_mixed(tmp_path: Path):
    def setting(*at: int) -> TensorDelta:
        return TensorDelta((9,), list(at), np.full(len(at), 7, np.uint16), dtype="bfloat16", op="set")

    a, b = save(tmp_path / "a.shd", w=setting(1, 3)), save(tmp_path / "b.shd", w=setting(2))
    shiradelta.fuse({a: 1.0, b: 1.0}, tmp_path / "ab.shd")
    with shiradelta.open_delta(tmp_path / "ab.shd") as fused:
        assert (fused["w"].op, fused["w"].positions().tolist()) == ("set", [1, 2, 3])
    with pytest.raises(DeltaError, match="strength 1"):
        shiradelta.fuse({a: 0.5}, tmp_path / "x.shd")
    c = save(tmp_path / "c.shd", w=setting(2, 5))
    with pytest.raises(DeltaError, match="element 2 is set by two"):
        shiradelta.fuse({b: 1.0, c: 1.0}, tmp_path / "x.shd")
    d = save(tmp_path / "d.shd", w=TensorDelta((9,), [4], [1.0]))
    with pytest.raises(DeltaError, match="one by one"):
        shiradelta.fuse({a: 1.0, d: 1.0}, tmp_path / "x.shd")
    assert not (tmp_path / "x.shd").exists()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (TensorDelta((3, 3), [1], [1.0]), "shapes"),
        (TensorDelta((9,), [1], [1.0], dtype="float32"), "bfloat16|float32"),
        (TensorDelta((9,), [1], [1.0], dtype="bfloat16", base_bits=np.ones(1, np.uint16)), "different bases"),
    ],
)
def test_different_bases_are_refused(tmp_path: Path, other: TensorDelta, message: str):
    a = save(tmp_path / "a.shd", w=TensorDelta((9,), [1], [2.0], dtype="bfloat16", base_bits=np.zeros(1, np.uint16)))
    with pytest.raises(BaseMismatchError, match=message):
        shiradelta.fuse({a: 1.0, save(tmp_path / "b.shd", w=other): 1.0}, tmp_path / "x.shd")


def test_the_base_gives_the_dtype_that_no_input_has(tmp_path: Path):
    base = write_model(tmp_path / "base", {"w": torch.arange(9, dtype=torch.bfloat16)})
    parts = [TensorDelta((9,), [at], np.float32([1]), "unspecified") for at in (1, 4)]
    files = {save(tmp_path / f"{number}.shd", w=part): 1.0 for number, part in enumerate(parts)}
    shiradelta.fuse(files, tmp_path / "out.shd", base=base)
    with shiradelta.open_delta(tmp_path / "out.shd") as fused:
        assert fused["w"].dtype == "bfloat16"
        assert fused["w"].base_fingerprint is not None
    other = write_model(tmp_path / "other", {"w": torch.arange(8, dtype=torch.bfloat16)})
    with pytest.raises(BaseMismatchError, match="missing or of another shape or dtype"):
        shiradelta.fuse(files, tmp_path / "out.shd", base=other)


def test_bad_arguments(three: dict[Path, float], tmp_path: Path):
    for arguments, message in (
        ({"method": "median"}, "method"),
        ({"drop": 1.0, "method": "dare"}, "drop"),
    ):
        with pytest.raises(DeltaError, match=message):
            shiradelta.fuse(three, tmp_path / "x.shd", **arguments)
    with pytest.raises(DeltaError, match="nothing to fuse"):
        shiradelta.fuse({}, tmp_path / "x.shd")
    for look in (measure, partial(shiradelta.fuse, out=tmp_path / "x.shd")):
        with pytest.raises(
            DeltaError, match=r"tensor '.*': the changes become larger than float32 holds; take smaller"
        ):
            look(dict.fromkeys(three, 3e38))
    assert not (tmp_path / "x.shd").exists()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(TargetError, match=r"is not a \.shd file, so it is not replaced"):
        shiradelta.fuse(three, tmp_path / "notes.txt")
    copy = tmp_path / "copy.shd"
    copy.write_bytes(next(iter(three)).read_bytes())
    with pytest.raises(DeltaError, match="same delta"):
        shiradelta.fuse({**three, copy: 1.0}, tmp_path / "x.shd")


@pytest.mark.parametrize("method", METHODS)
def test_command_line(three: dict[Path, float], tmp_path: Path, method: str):
    if method == "slerp":
        three = {path: abs(strength) for path, strength in list(three.items())[:2]}
    arguments = [f"{path}:{strength}" for path, strength in three.items()]
    result = CliRunner().invoke(main, ["fuse", *arguments, "-o", str(tmp_path / "out.shd"), "--method", method])
    assert result.exit_code == 0, result.stderr
    assert "nonzeros" in result.stdout
    shiradelta.open_delta(tmp_path / "out.shd").verify()


def test_options_of_other_methods_are_refused(three: dict[Path, float], tmp_path: Path):
    outcome = CliRunner().invoke(main, ["fuse", *map(str, three), "-o", str(tmp_path / "x.shd"), "--drop", "0.3"])
    assert outcome.exit_code == 2
    assert "--drop is an option of dare and della" in outcome.stderr


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, float]:
    """Inputs with windows at different places, one of which ends long before the other."""
    folder, numel, files = tmp_path_factory.mktemp("large"), 3 * WINDOW, {}
    for seed, (density, stop) in enumerate([(0.9, numel), (0.5, numel // 3), (0.02, numel)]):
        generator = np.random.default_rng(seed)
        positions = np.flatnonzero(generator.random(stop) < density)
        values = generator.standard_normal(positions.size).astype(np.float32)
        files[folder / f"{seed}.shd"] = seed - 0.4
        shiradelta.save_delta(folder / f"{seed}.shd", {"w": TensorDelta((numel,), positions, values)}, values="f32")
    return files


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(name, marks=[] if name in ("sum", "ties") else pytest.mark.slow)
        for name, row in METHODS.items()
        if row.by_position
    ],
)
def test_windows_give_what_the_whole_tensor_gives(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, large: dict[Path, float], method: str
):
    reports, calls, row = [], [], METHODS[method]

    def counted(together: Overlay) -> Float32:
        calls.append(together)
        return row.merge(together)

    for by_position in (True, False):
        monkeypatch.setitem(METHODS._rows, method, replace(row, merge=counted, by_position=by_position))
        report = shiradelta.fuse(large, tmp_path / f"{by_position}.fused", method)
        reports.append(replace(report, out=""))
    assert len(calls) > 4
    assert reports[0] == reports[1]
    assert (tmp_path / "True.fused").read_bytes() == (tmp_path / "False.fused").read_bytes()
