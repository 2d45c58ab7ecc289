"""A fit of a model that is spread over devices gives what it gives on one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shiradelta.errors import ArgumentError, SourceError
from shiradelta.fit import tuned_weights
from shiradelta.fit.tuned_weights import TunedWeights
from shiradelta.models import loading
from shiradelta.models.placement import place
from shiradelta.nonzeros import vector
from shiradelta.nonzeros.vector import Nonzeros
from tests import seq2seq
from tests.fit.test_fit import FEW, encoder, fit, pair  # noqa: F401
from tests.fit.test_gain import write_trained
from tests.fit.test_new_base import bases, moved  # noqa: F401
from tests.fit.test_seq2seq import fit as fit_seq2seq
from tests.fit.test_stored import expert
from tests.second_device import second_device


@pytest.fixture
def a_vector_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no two weights in a row were on one device."""
    for module in (vector, tuned_weights):
        monkeypatch.setattr(module, "same_device", lambda weights: [slice(i, i + 1) for i in range(len(weights))])


def slow(*rows: Any) -> list[Any]:
    return [pytest.param(*(row if isinstance(row, tuple) else (row,)), marks=pytest.mark.slow) for row in rows]


PRUNE = {"mask": "prune"}


@pytest.mark.parametrize(
    "settings",
    [PRUNE, *slow({"mask": "prune", "scope": "model"}, {"mask": "refit"}, {"method": "refit"})],
    ids=str,
)
def test_nonzeros_in_several_vectors_are_fitted_as_in_one(
    encoder: tuple[Path, Path],  # noqa: F811
    tmp_path: Path,
    settings: dict[str, Any],
    request: pytest.FixtureRequest,
):
    one = fit(encoder, tmp_path / "one.shd", **FEW, **settings)
    request.getfixturevalue("a_vector_each")
    several = fit(encoder, tmp_path / "several.shd", **FEW, **settings)
    assert one.fit.history == several.fit.history
    assert (tmp_path / "one.shd").read_bytes() == (tmp_path / "several.shd").read_bytes()


def test_runs_of_weights_on_one_device():
    weights = [torch.zeros(2, device=device) for device in ("cpu", "cpu", "meta", "cpu")]
    assert vector.same_device(weights) == [slice(0, 2), slice(2, 3), slice(3, 4)]


@pytest.mark.usefixtures("a_vector_each")
def test_a_state_of_other_devices_is_cut_anew():
    weights = [nn.Parameter(torch.zeros(4, 2)) for _ in range(3)]
    nonzeros = Nonzeros(weights, [torch.float32] * 3, [torch.arange(count) for count in (3, 0, 4)])
    cut = nonzeros.by_vector([torch.arange(5.0), torch.arange(5.0, 7)])
    assert [own.tolist() for own in cut] == [[0, 1, 2], [], [3, 4, 5, 6]]
    for same in (nonzeros.by_vector(cut), nonzeros.by_tensor(cut), nonzeros.joined(cut)):
        assert all(map(torch.equal, same, cut))


@pytest.mark.usefixtures("a_vector_each")
def test_a_tensor_in_parts_on_several_devices_is_refused():
    fitted = TunedWeights()
    for name in ("first", "second"):
        fitted.add(name, nn.Parameter(torch.zeros(1, 4)), [expert("a", [3, 0, 0, -4], 0, 1)])
    with pytest.raises(SourceError, match="the model has parts of 'a' on several devices; fit it on one"):
        fitted.quantiser_of(fitted.topk(), "int4")


@pytest.mark.parametrize(
    ("pair", "settings"),
    [("causal", PRUNE), *slow(("causal", {"mask": "refit"}), ("encoder", {}), ("classifier", {}))],
    indirect=["pair"],
    ids=str,
)
def test_a_spread_model_is_fitted_as_one_on_one_device(
    pair: tuple[Path, Path],  # noqa: F811
    tmp_path: Path,
    settings: dict[str, Any],
):
    lines: list[str] = []
    one = fit(pair, tmp_path / "one.shd", **FEW, **settings)
    several = fit(pair, tmp_path / "several.shd", **FEW, **settings, device=["cpu", "cpu"], log=lines.append)
    assert one.fit.history == several.fit.history
    assert (tmp_path / "one.shd").read_bytes() == (tmp_path / "several.shd").read_bytes()
    assert "layers of the model: 2 on cpu" in lines
    assert " on cpu and cpu, about " in lines[-1]


CPU, META = torch.device("cpu"), torch.device("meta")
#: Operations on the second device take a multiple of the time.
SHORT = {"steps": 10}


def loaded(folder: Path) -> nn.Module:
    return loading.load_model(folder, folder, [CPU], torch.float32)


@contextmanager
def on_two_devices(folder: Path) -> Iterator[nn.Module]:
    """A folder's model, in a context in which the last layers' device is there."""
    model = loaded(folder)
    with second_device():
        yield place(model, [CPU, META])


TRAINED: list[dict[str, Any]] = [
    {"mask": "refit"},
    {"mask": "activation"},
    {"mask": "gradient", "scope": "model"},
    {"mask": "prune", "scope": "model"},
    {"method": "refit"},
]


@pytest.mark.parametrize(
    ("pair", "settings"),
    [
        ("causal", PRUNE),
        *slow(*(("causal", settings) for settings in TRAINED), ("encoder", PRUNE), ("classifier", PRUNE)),
    ],
    indirect=["pair"],
    ids=str,
)
def test_a_model_on_two_devices_is_fitted_as_on_one(
    pair: tuple[Path, Path],  # noqa: F811
    tmp_path: Path,
    settings: dict[str, Any],
):
    """An operation on tensors of both devices is an error here, as with two GPUs."""
    one = fit(pair, tmp_path / "one.shd", **FEW, **SHORT, **settings, model=loaded(pair[0]), device="cpu")
    with on_two_devices(pair[0]) as model:
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        several = fit(pair, tmp_path / "several.shd", **FEW, **SHORT, **settings, model=model, device=None)
        assert {weight.device.type for weight in model.parameters()} == {"cpu", "meta"}
        assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert several.fit.base == pytest.approx(one.fit.base, rel=1e-4)
    assert several.fit.topk == pytest.approx(one.fit.topk, rel=1e-4)
    assert several.fit.fitted == pytest.approx(one.fit.fitted, rel=0.1)
    assert several.nnz == one.nnz


def test_the_second_device_is_another_one():
    """What the tests above rely on."""
    one = torch.ones(2)
    with second_device():
        other = torch.ones(2, device=META)
        assert (one + other.cpu()).tolist() == (other + one.to(META)).tolist() == [2, 2]
        with pytest.raises(RuntimeError, match=r"add.* are on two devices"):
            one + other


@pytest.mark.slow
def test_a_delta_goes_over_to_a_new_base_on_two_devices(bases: tuple[Path, Path, Path], tmp_path: Path):  # noqa: F811
    one = moved(bases, tmp_path / "one.shd", model=loaded(bases[1]))
    with on_two_devices(bases[1]) as model:
        several = moved(bases, tmp_path / "several.shd", model=model, device=None)
    assert several.fit.fitted == pytest.approx(one.fit.fitted, rel=0.05)
    for measure, figures in one.fit.apart.items():
        assert several.fit.apart[measure] == pytest.approx(figures, rel=0.05)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_trained(tmp_path_factory.mktemp("trained"))


@pytest.mark.slow
def test_a_model_on_two_devices_generates(trained: tuple[Path, Path], tmp_path: Path):
    with on_two_devices(trained[0]) as model:
        settings = {"method": "refit", "generate": 8, "model": model, "device": None}
        report = fit(trained, tmp_path / "a.shd", **FEW, **settings)
    assert report.fit.generated == 8
    assert report.fit.fitted < report.fit.base


@pytest.mark.slow
def test_a_model_that_accelerate_has_spread_is_taken_as_it_is(
    encoder: tuple[Path, Path],  # noqa: F811
    tmp_path: Path,
):
    """Its hooks are forward passes of the modules' own, in the place of those of their classes."""
    hooks = pytest.importorskip("accelerate.hooks")
    one = fit(encoder, tmp_path / "one.shd", **FEW, mask="prune")
    model = loaded(encoder[0])
    hooks.attach_execution_device_hook(model, 0 if torch.cuda.is_available() else "cpu")
    several = fit(encoder, tmp_path / "several.shd", **FEW, mask="prune", model=model)
    assert several.fit.fitted == pytest.approx(one.fit.fitted, rel=0.05)


def test_devices_of_a_users_own_model(encoder: tuple[Path, Path], tmp_path: Path):  # noqa: F811
    model = loaded(encoder[0])
    with pytest.raises(ArgumentError, match="a model of your own is not spread; load it with device_map"):
        fit(encoder, tmp_path / "a.shd", model=model, device="cpu,cpu")
    with on_two_devices(encoder[0]) as two, pytest.raises(ArgumentError, match="on cpu and meta already; leave the"):
        fit(encoder, tmp_path / "a.shd", model=two)
    with pytest.raises(SourceError, match="load it without offloading"):
        fit(encoder, tmp_path / "a.shd", model=model.to("meta"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("method", ["train", "refit"])
def test_an_encoder_decoder_on_two_devices_is_fitted_as_on_one(kind: str, method: str, tmp_path: Path):
    folders = seq2seq.write_pair(kind, tmp_path)
    settings = {"method": method, "texts": seq2seq.examples(40), "batch": 8, "held_out": 8, "steps": 8}
    one = fit_seq2seq(folders, tmp_path / "one.shd", **settings, model=loaded(folders[0]))
    with on_two_devices(folders[0]) as model:
        assert {weight.device for weight in model.parameters()} == {CPU, META}
        several = fit_seq2seq(folders, tmp_path / "several.shd", **settings, model=model, device=None)
    assert several.topk == pytest.approx(one.topk, rel=1e-3)
    assert several.fitted == pytest.approx(one.fitted, rel=0.05)


@pytest.mark.parametrize("pair", ["causal"], indirect=True)
@pytest.mark.parametrize("devices", ["cpu", "cpu,cpu"])
def test_a_fit_that_runs_out_of_memory_goes_on_with_less(
    pair: tuple[Path, Path],  # noqa: F811
    tmp_path: Path,
    devices: str,
    monkeypatch: pytest.MonkeyPatch,
):
    """In the middle of a backward pass, when some of the gradients are there."""
    lines: list[str] = []
    one = fit(pair, tmp_path / "one.shd", **FEW, **PRUNE, device="cpu")
    gather, gathered = vector.DeviceVector.gather, []

    def spy(self: Any, index: int, parameter: Any) -> None:
        gather(self, index, parameter)
        gathered.append(index)
        if len(gathered) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(vector.DeviceVector, "gather", spy)
    again = fit(pair, tmp_path / "again.shd", **FEW, **PRUNE, device=devices, log=lines.append)
    assert [line for line in lines if line.startswith("memory ran out, so layers keep their inputs only")]
    assert one.fit.history == again.fit.history
    assert (tmp_path / "one.shd").read_bytes() == (tmp_path / "again.shd").read_bytes()
