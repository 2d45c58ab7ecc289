"""A value codec that is added from outside the package, as docs/extend/value-codec.md shows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import shiradelta as sd
from shiradelta.backends.choose import FILE_BACKENDS, choose
from shiradelta.cli import main
from shiradelta.errors import ArgumentError, FormatError
from shiradelta.fit.quantise import Quantiser
from shiradelta.format.codecs import INDEX_CODECS, VALUE_CODECS, VALUE_OPTIONS
from shiradelta.format.codecs.base import TorchDecoder
from shiradelta.hotswap.session import HotSwap
from tests.conftest import read
from tests.swapping import BACKENDS, BACKENDS_IN_TIME, DEVICE, GPU, bits, formula, random_delta, weights

ROOT = Path(__file__).parent.parent.parent
SHAPE = (40, 50)


def example() -> str:
    """The example of the page."""
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/extend/value-codec.md").read_text(), re.DOTALL)
    return str(block)


@pytest.fixture
def log8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The codec of the page, registered; its file is log8.shd in the working directory."""
    monkeypatch.chdir(tmp_path)
    exec(compile(example(), "value-codec.md", "exec"), {})
    yield VALUE_CODECS["LOG8"]
    VALUE_CODECS.remove("LOG8")


def adapter(dtype: str, seed: int = 0) -> bytes:
    path = Path(f"{dtype}-{seed}.shd")
    sd.save_delta(path, {"w": random_delta(SHAPE, 300, seed, dtype)}, values="log8")
    return path.read_bytes()


def test_the_example_is_short():
    assert len(example().splitlines()) <= 40


@pytest.mark.parametrize("backend", ["auto", "numpy"])
def test_a_file_is_read_and_described(log8: Any, backend: str):
    with sd.open_delta("log8.shd", backend=backend) as delta:
        delta.verify()
        assert delta["w"].values().tolist() == [0.5, -1.0, 0.0]
        assert delta["w"].rows(1, 6)[1].tolist() == [-1.0, 0.0]
        assert delta["w"].record.value_codec == 200
    said = CliRunner().invoke(main, ["info", "log8.shd"])
    assert "LOG8" in said.stdout


@pytest.mark.parametrize("name", [name for name in FILE_BACKENDS if name != "numpy"])
def test_a_backend_that_does_not_know_it_refuses_it_by_name(log8: Any, name: str):
    try:
        choose(name)
    except sd.ShiraDeltaError as error:
        pytest.skip(str(error))
    message = f"backend '{name}' does not know value codec LOG8 .id 200.; take auto or numpy"
    with pytest.raises(ArgumentError, match=message):
        sd.open_delta("log8.shd", backend=name)
    with pytest.raises(ArgumentError, match=message):
        sd.save_delta("other.shd", {}, values="log8", backend=name)
    assert choose("auto", INDEX_CODECS.by_id, [200]).name == "numpy"


def test_a_fine_tune_is_converted_and_applied(log8: Any, made: Path, model: Path):
    arguments = ["convert", str(made / "tuned_a"), "--base", str(model), "-o", "a.shd", "--values", "log8"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    with sd.open_delta("a.shd") as delta:
        assert {tensor.record.value_codec_name for tensor in delta.values() if tensor.operation.adds} == {"LOG8"}
        name = next(name for name, tensor in delta.items() if tensor.nnz and tensor.operation.adds)
    before = read(model, name).copy()
    sd.apply(model, "a.shd")
    expected = formula(before, "bfloat16", [(Path("a.shd").read_bytes(), 1.0)], name)
    np.testing.assert_array_equal(read(model, name), expected)
    sd.revert(model)
    np.testing.assert_array_equal(read(model, name), before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", BACKENDS_IN_TIME)
def test_live_weights_have_the_same_bits_or_it_is_refused(log8: Any, backend: str, dtype: str):
    one, other = adapter(dtype, 1), adapter(dtype, 2)
    model = {"w": weights(SHAPE, dtype)}
    base = bits(model["w"])
    swap = HotSwap(model, backend=backend)
    if backend == "libshd":
        with pytest.raises(ArgumentError, match="does not know value codec LOG8"):
            swap.load("one", one)
        return
    swap.load("one", one)
    swap.load("other", other)
    for wanted in ({"one": 1.0}, {"one": 0.3}, {"one": 0.5, "other": -2.0}):
        swap.switch(wanted)
        files = [({"one": one, "other": other}[name], alpha) for name, alpha in wanted.items()]
        np.testing.assert_array_equal(bits(model["w"]), formula(base, dtype, files))
    swap.revert()
    np.testing.assert_array_equal(bits(model["w"]), base)


@pytest.mark.skipif(GPU, reason="the weights are on the GPU")
def test_auto_takes_it_on_a_cpu_whatever_else_is_loaded(log8: Any):
    model = {"w": weights(SHAPE, "float32")}
    base = bits(model["w"])
    swap, data = HotSwap(model), adapter("float32")
    sd.save_delta("plain.shd", {"w": random_delta(SHAPE, 300, 5, "float32")}, values="int8")
    plain = Path("plain.shd").read_bytes()
    swap.load("new", data)
    swap.load("plain", plain)
    swap.switch({"new": 1.0, "plain": 0.5})
    np.testing.assert_array_equal(bits(model["w"]), formula(base, "float32", [(data, 1.0), (plain, 0.5)]))


@pytest.mark.parametrize("backend", [one for one in ("torch", "triton") if one in {p.values[0] for p in BACKENDS}])
def test_a_codec_that_torch_decodes_stays_as_it_is_there(log8: Any, backend: str):
    """Triton has no kernel for it, and holds float32 instead."""

    class InTorch(type(log8), TorchDecoder):  # type: ignore[misc]
        def decode_torch(self, data: torch.Tensor, nnz: int, size: int) -> torch.Tensor:
            decoded = self.decode(data.cpu().numpy(), nnz, size, 0, nnz)
            return torch.from_numpy(decoded).to(data.device)

    data = adapter("float32")
    VALUE_CODECS.remove("LOG8")
    VALUE_CODECS.add(InTorch())
    model = {"w": weights(SHAPE, "float32")}
    base = bits(model["w"])
    swap = HotSwap(model, backend=backend)
    report = swap.load("one", data)
    assert (report.nbytes < 300 * 4) == (backend == "torch")
    swap.switch("one")
    np.testing.assert_array_equal(bits(model["w"]), formula(base, "float32", [(data, 1.0)]))


def test_the_minor_version_of_a_file_is_the_lowest_that_suffices(tmp_path: Path):
    class Later(type(VALUE_CODECS["F32"])):  # type: ignore[misc]
        minor = 1

    class LaterStill(type(INDEX_CODECS["ALL"])):  # type: ignore[misc]
        id, name, minor = 202, "EVERY", 2

        def size(self, positions: Any, shape: tuple[int, ...]) -> int | None:
            return -1 if positions.tolist() == [2] else None

    def version(values: str, *tensors: sd.TensorDelta) -> str:
        sd.save_delta(tmp_path / "a.shd", dict(zip("abc", tensors, strict=False)), values=values, backend="numpy")
        with sd.open_delta(tmp_path / "a.shd") as delta:
            return str(delta.version)

    some, whole = sd.TensorDelta((8,), [1], [0.5]), sd.TensorDelta((1,), [0], [0.5])
    later = VALUE_CODECS.add(Later(201, "LATER", "later", "float32"))
    try:
        assert version("f32", some, whole) == "1.0"
        assert version("later") == "1.0"
        assert version("later", sd.TensorDelta((8,), [], [])) == "1.0"
        assert version("later", some) == "1.1"
        every = INDEX_CODECS.add(LaterStill())
        try:
            assert version("later", some) == "1.1"
            assert version("f32", some, whole) == "1.0"
            assert version("f32", some, sd.TensorDelta((8,), [2], [0.5])) == "1.2"
        finally:
            INDEX_CODECS.remove(every.name)
    finally:
        VALUE_CODECS.remove(later.name)


def test_fitting_refuses_it_by_name(log8: Any):
    with pytest.raises(ArgumentError, match="value codec LOG8 cannot be fitted"):
        Quantiser("log8", [3], torch.device(DEVICE))


def test_it_is_gone_when_it_is_removed(log8: Any):
    VALUE_CODECS.remove("LOG8")
    try:
        with pytest.raises(FormatError) as caught:
            sd.open_delta("log8.shd")
        assert caught.value.reason == "unknown_value_codec"
        assert "log8" not in VALUE_OPTIONS
        with pytest.raises(ArgumentError, match="values 'log8' are unknown"):
            sd.save_delta("other.shd", {}, values="log8")
    finally:
        VALUE_CODECS.add(log8)
