"""--target-size and --target-error: the file keeps what was wished, and wastes little of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import save_file
from shiradelta.converters.aim import most_bytes
from shiradelta.converters.conversion import Conversion

import shiradelta
from shiradelta.cli import main
from shiradelta.converters import convert
from shiradelta.errors import DeltaError, SourceError
from shiradelta.io.writer import weighing
from shiradelta.select.spectrum import Spectrum
from shiradelta.util.arrays import distinct
from shiradelta.util.text import parse_size
from tests.conftest import random_tensors, write_model
from tests.pairs import pairs


@pytest.fixture(scope="module")
def diff(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tensors of very different sizes and magnitudes, heavy tails, clustered columns."""
    generator = np.random.default_rng(0)
    tensors = {}
    for i, (shape, scale) in enumerate([((400, 500), 1.0), ((100, 300), 0.1), ((700, 200), 3.0), ((64,), 0.5)]):
        tail = generator.standard_normal(shape) ** 3
        tensors[f"t{i}.diff"] = (scale * tail * np.exp(generator.standard_normal(shape[-1]))).astype(np.float32)
    path = tmp_path_factory.mktemp("diff") / "d.safetensors"
    save_file(tensors, path)
    return path


def error_of(source: Path, file: Path) -> float:
    """Relative error of the delta, by other code."""
    from safetensors.numpy import load_file

    wrong = total = 0.0
    with shiradelta.open_delta(file) as delta:
        for key, dense in load_file(source).items():
            name = key.removesuffix(".diff") + ".weight"
            held = delta[name].to_dense() if name in delta else 0
            wrong += float(((held - dense).astype("f8") ** 2).sum())
            total += float((dense.astype("f8") ** 2).sum())
    return float((wrong / total) ** 0.5)


@pairs(
    scope=["tensor", "model"],
    values=["int4", "f32", "sign"],
    size=["3KB", *(pytest.param(size, marks=pytest.mark.slow) for size in (20_000, "100 kB", "0.2MiB"))],
)
def test_a_file_is_at_most_as_large_as_wished_and_nearly_that(
    diff: Path, tmp_path: Path, size: str | int, values: str, scope: str
):
    out = tmp_path / "a.shd"
    report = convert(diff, out, target_size=size, values=values, scope=scope)
    wished = parse_size(size)
    assert out.stat().st_size == report.file_bytes <= wished
    # Sections are padded to 64 bytes; and all positions together take no byte, so that every weight may fit.
    assert report.sparsity == 1 or report.file_bytes >= min(0.995 * wished, wished - 64 * 4)
    with shiradelta.open_delta(out) as delta:
        assert float(delta.metadata["sparsity"]) == pytest.approx(report.sparsity, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize(
    ("values", "error"),
    [
        ("int4", 0.7),
        ("int8", 0.1),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in (("int4", 0.25), ("int8", 0.5), ("f32", 0.1), ("f32", 0.01))
        ),
    ],
)
def test_an_error_is_kept_with_as_few_weights_as_possible(
    diff: Path, tmp_path: Path, error: float, values: str, scope: str
):
    out = tmp_path / "a.shd"
    report = convert(diff, out, target_error=error, values=values, scope=scope)
    assert report.error <= error
    assert report.error == pytest.approx(error_of(diff, out), rel=1e-3)
    fewer = convert(diff, tmp_path / "b.shd", 0.98 * report.sparsity, values=values, scope=scope)
    assert fewer.error > error


@pytest.mark.slow
def test_few_trials_are_enough(diff: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tried: list[float] = []
    weigh = Conversion._weigh
    monkeypatch.setattr(
        Conversion, "_weigh", lambda self, share, kept: (tried.append(share), weigh(self, share, kept))[1]
    )
    for wish in ({"target_size": "30KB"}, {"target_error": 0.3}, {"target_error": 0.9, "scope": "model"}):
        tried.clear()
        convert(diff, tmp_path / "a.shd", **wish)
        assert len(tried) <= 5


def test_no_error_takes_every_change(diff: Path, tmp_path: Path):
    report = convert(diff, tmp_path / "a.shd", target_error=0, values="f32")
    assert (report.error, report.sparsity) == (0, 1)


@pytest.mark.slow
def test_small_errors_are_told_from_none(tmp_path: Path):
    """Also where sums of squares differ in their last digits."""
    change = np.random.default_rng(0).standard_normal((512, 2048)).astype(np.float32)
    change.reshape(-1)[::4096] *= 1e-3
    save_file({"w.diff": change}, tmp_path / "d.safetensors")
    assert convert(tmp_path / "d.safetensors", target_error=0, values="f32").error == 0
    report = convert(tmp_path / "d.safetensors", target_error=1e-5, values="f32")
    left_out = np.sort(np.abs(change.astype("f8")), axis=None)[: change.size - report.nnz]
    assert left_out.size > 10
    assert report.error == pytest.approx(np.linalg.norm(left_out) / np.linalg.norm(change.astype("f8")), rel=1e-2)


def test_a_sparse_change_goes_in_whole(tmp_path: Path):
    """Where few weights changed, more sparsity adds nothing; the file is what it is."""
    base = random_tensors(torch.float32)
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    for tensor in tuned.values():
        tensor.view(-1)[::50] += 0.5
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "tuned", tuned)
    report = convert(tmp_path / "tuned", tmp_path / "a.shd", base=tmp_path / "base", target_size="1MB", values="f32")
    assert report.error < 1e-3  # float32's own
    assert report.nnz == sum(-(-tensor.numel() // 50) for tensor in base.values())


@pytest.mark.parametrize(
    ("wishes", "error", "message"),
    [
        ({"target_size": 1000}, SourceError, r"file of 1,000 bytes is too small: one weight in each tensor takes"),
        ({"target_size": 0}, SourceError, "too small"),
        ({"target_size": "much"}, DeltaError, "size 'much' is unknown; give .* such as 900KB"),
        ({"target_size": "-3MB"}, DeltaError, "is unknown"),
        ({"target_size": "9" * 400 + "GB"}, DeltaError, "is unknown"),
        (
            {"target_error": 0},
            SourceError,
            "error of 0 cannot be reached with int4 values, which leave 0.1.* at best; take --values f32",
        ),
        ({"target_error": 0.01, "values": "sign"}, SourceError, "cannot be reached with sign values"),
        ({"target_error": 1}, DeltaError, "out of range"),
        ({"target_error": float("nan")}, DeltaError, "out of range"),
        ({"target_error": 0.1, "target_size": 10_000}, DeltaError, "exclude each other"),
        ({"target_error": 0.1, "sparsity": 0.01}, DeltaError, "exclude each other"),
    ],
    ids=str,
)
def test_impossible_wishes(diff: Path, tmp_path: Path, wishes: dict[str, object], error: type, message: str):
    with pytest.raises(error, match=message):
        convert(diff, tmp_path / "a.shd", **wishes)
    assert not list(tmp_path.iterdir())


def test_a_spectrum_tells_what_is_beyond():
    dense = np.random.default_rng(0).standard_normal((300, 200)).astype(np.float32)
    dense[:10] = 0
    spectrum = Spectrum.of(lambda a, b: dense[a:b], dense.shape)
    assert (spectrum.nonzero, spectrum.numel) == (58_000, 60_000)
    ordered = np.sort(np.square(dense, dtype="f8").reshape(-1))
    for k in (0, 1, 600, 30_000, 57_999):
        assert spectrum.energy_beyond(k) == pytest.approx(ordered[: ordered.size - k].sum(), rel=0.01)
    assert spectrum.energy_beyond(58_000) == 0


@pytest.mark.parametrize("layout", ["even", "front", "runs", "random"])
@pytest.mark.parametrize("count", [1, 7, 500, 40_000])
def test_no_positions_take_more_than_the_bound(layout: str, count: int):
    numel, generator = 100_000, np.random.default_rng(0)
    positions = {
        "even": np.arange(count) * (numel // count),
        "front": np.arange(count),
        "runs": distinct(generator.integers(0, numel // 50, count)) * 50,
        "random": np.sort(generator.choice(numel, count, replace=False)),
    }[layout]
    for codec in ("int4", "f32", "sign"):
        writer = weighing(codec)
        empty = writer.size
        tensor = shiradelta.TensorDelta((numel,), positions, generator.standard_normal(positions.size))
        writer.add("a", tensor)
        record = 192 + 64  # a record and a name, aligned
        assert writer.size - empty <= most_bytes(numel, positions.size, codec) + record


@pytest.mark.parametrize(
    ("text", "size"), [("2MB", 2_000_000), ("2 mib", 2 << 20), ("900k", 900_000), ("1.5GiB", 3 << 29), (77, 77)]
)
def test_sizes(text: str | int, size: int):
    assert parse_size(text) == size


def test_from_the_command_line(diff: Path, tmp_path: Path):
    out = tmp_path / "a.shd"
    result = CliRunner().invoke(main, ["convert", str(diff), "--target-size", "50KB", "-o", str(out)])
    assert result.exit_code == 0, result.output
    assert out.stat().st_size <= 50_000
    assert "relative error 0." in result.stdout
    both = CliRunner().invoke(main, ["convert", str(diff), "--target-size", "50KB", "--sparsity", "0.1"])
    assert both.exit_code == 2
    assert "exclude each other" in both.stderr
