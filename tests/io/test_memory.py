"""The memory that a stranger's file takes: by its own size, not by the numbers in it (docs/limits.md)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

import shiradelta as sd
from shiradelta.cli import main
from shiradelta.combine.report import report
from shiradelta.io.reader import default_limit
from tests.reference import make_vectors

#: Reads the most memory that the process ever had, in bytes; it starts from what the imports took.
PEAK = """
import sys
import shiradelta as sd
from shiradelta.combine.report import report
import scipy.sparse.linalg  # the report's, loaded before anything is measured

def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) << 10

file, other, *folder = sys.argv[1:]
before = peak()
{action}
print(peak() - before)
"""
ACTIONS = {
    "verify": "sd.open_delta(file).verify()",
    "verify, NumPy": "sd.open_delta(file, backend='numpy').verify()",
    "report": "report({file: 1.0})",
    "compare": "report({file: 1.0, other: 1.0})",
    "apply": "sd.apply(*folder, file)",
    "verify what is applied": "assert sd.verify(*folder, file).state == 'patched'",
    "revert": "sd.revert(*folder)",
    "fuse": "sd.fuse({file: 1.0, other: 1.0}, file + '.fused')",
}


def peak_of(action: str, *files: Path) -> int:
    """The bytes that an action adds to the memory of a process."""
    code = PEAK.format(action=ACTIONS[action])
    done = subprocess.run([sys.executable, "-c", code, *map(str, files)], check=True, capture_output=True, text=True)
    return int(done.stdout)


@pytest.fixture(scope="module")
def bomb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of which each byte is 350 nonzeros: a bit for each, in zstd, with all positions in no bytes."""
    path = tmp_path_factory.mktemp("bomb") / "a.shd"
    values = np.ones(6 << 20, np.float32)
    noise = np.random.default_rng(0).random(values.size // 52) < 0.5
    values[: noise.size][noise] = -1
    sd.save_delta(path, {"w": sd.TensorDelta((3 << 10, 2 << 10), None, values)}, values="sign", zstd=True)
    assert path.stat().st_size * 350 < values.size
    return path


needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the peak")


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("action", ["verify", "verify, NumPy", "report"])
def test_what_reads_in_windows_takes_little(bomb: Path, action: str):
    """The positions alone would be 48 MB; NumPy has a few arrays of a window at a time, some MB."""
    assert peak_of(action, bomb, bomb) < 24 << 20


@needs_proc
@pytest.mark.slow
def test_folders_are_changed_and_verified_in_windows(bomb: Path, tmp_path: Path):
    """Weights and undo delta, which are mapped, have 13 MB each; positions and values together would be 75 MB."""
    save_file({"w": np.ones((3 << 10, 2 << 10), np.float16)}, tmp_path / "model.safetensors")
    for action in ("apply", "verify what is applied", "revert"):
        assert peak_of(action, bomb, bomb, tmp_path) < 64 << 20


@needs_proc
@pytest.mark.slow
def test_fuse_takes_no_more_than_its_limit_counts(bomb: Path, tmp_path: Path):
    values = -np.ones(6 << 20, np.float32)
    sd.save_delta(tmp_path / "b.shd", {"w": sd.TensorDelta((3 << 10, 2 << 10), None, values)}, values="sign", zstd=True)
    limit = values.size * 48
    with pytest.raises(sd.LimitError, match="tensor 'w', fused, takes 30"):
        sd.fuse({bomb: 1.0, tmp_path / "b.shd": 1.0}, tmp_path / "f.shd", limit=limit)
    assert peak_of("fuse", bomb, tmp_path / "b.shd") < limit


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("action", ["report", "compare", "fuse"])
def test_a_huge_shape_takes_nothing(tmp_path: Path, action: str):
    files = tmp_path / "a.shd", tmp_path / "b.shd"
    for number, file in enumerate(files):
        delta = sd.TensorDelta((1 << 28, 1 << 28), [5, 1 << 30, (1 << 50) + number], [1.0, 2.0, 3.0])
        sd.save_delta(file, {"w": delta}, values="f32")
        assert file.stat().st_size == 512
    assert peak_of(action, *files) < 48 << 20


def test_what_takes_more_than_the_limit_is_refused_before_it_is_decoded(bomb: Path):
    with sd.open_delta(bomb, limit=10 << 20) as delta:
        delta.verify()
        tensor = delta["w"]
        for decode in (tensor.positions, tensor.bits, tensor.values, tensor.to_dense, lambda: tensor.rows(0, 1000)):
            with pytest.raises(sd.LimitError, match=r"tensor 'w' takes .* MB of memory .* over the limit of 10\.49 MB"):
                decode()
        assert tensor.rows(0, 10)[0].size == 20 << 10
    with sd.open_delta(bomb, limit=100 << 10) as delta, pytest.raises(sd.LimitError):
        delta.verify()
    with pytest.raises(sd.ArgumentError, match="limit 0"):
        sd.open_delta(bomb, limit=0)


def test_a_packed_file_is_not_unpacked_beyond_the_limit():
    """A file that stands for 17 times its size: empty tensors."""
    file = make_vectors.File(tuple(make_vectors.Tensor((4, 4), name=f"{i:04}") for i in range(1000)))
    data = make_vectors.packed(make_vectors.build(file).data, (0, 0) * 1000)
    size = len(make_vectors.build(file).data)
    assert size > 17 * len(data)
    with sd.open_delta(data) as delta:
        assert delta.packed
        assert delta.sizes["file"] == len(data)
    with pytest.raises(sd.LimitError, match="when it is unpacked, over the limit"):
        sd.open_delta(data, limit=size)


def test_the_limit_is_a_gibibyte_or_the_size_that_zstd_may_unpack_to():
    assert default_limit(512) == 1 << 30
    assert default_limit(1 << 30) == 64 << 30


@pytest.mark.slow
def test_every_reader_takes_a_limit(bomb: Path, tmp_path: Path):
    model = {"w": np.zeros((3 << 10, 2 << 10), np.float32)}
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(model, folder / "model.safetensors")
    other = tmp_path / "b.shd"
    sd.save_delta(other, {"w": sd.TensorDelta((3 << 10, 2 << 10), [0], [1.0])})
    for read in (
        lambda: sd.HotSwap(model).load("a", bomb, limit=100 << 10),
        lambda: sd.apply(folder, bomb, limit=100 << 10),
        lambda: sd.verify(folder, bomb, limit=100 << 10),
        lambda: sd.fuse({bomb: 1.0}, tmp_path / "f.shd", limit=10 << 20),
        lambda: report({bomb: 1.0, other: 1.0}, limit=10 << 20),
    ):
        with pytest.raises(sd.LimitError):
            read()
    assert not any(model["w"].reshape(-1))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["b.shd", "model"]


@pytest.mark.parametrize("size", ["10MB", "10 mb", "0.01GB", "10000000"])
def test_commands_take_a_size(bomb: Path, size: str):
    done = CliRunner().invoke(main, ["fuse", str(bomb), "-o", str(bomb) + ".f", "--max-memory", size])
    assert done.exit_code == 1
    assert "over the limit of 10.00 MB" in done.stderr


@pytest.mark.parametrize("size", ["much", "5 XB", "-1", "0"])
def test_sizes_that_are_none_are_refused(bomb: Path, size: str):
    done = CliRunner().invoke(main, ["info", str(bomb), f"--max-memory={size}"])
    assert done.exit_code == 2
    assert "give a" in done.stderr
