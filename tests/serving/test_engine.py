"""The engine and the worker extension of vLLM, against a stand-in of vLLM's interface."""

from __future__ import annotations

import base64
import json
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Generic, TypeVar

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from shiradelta import TensorDelta, save_delta
from shiradelta.errors import ArgumentError, BaseMismatchError, FormatError, ShiraDeltaError, TargetError
from shiradelta.serving import plugin
from shiradelta.serving.session import ServedWeights, SwapRequest
from tests.serving.test_recorded import Engine, checkpoint, delta
from tests.swapping import bits

T, U = TypeVar("T"), TypeVar("U")


@dataclass
class InitInfo:
    pass


@dataclass
class UpdateInfo:
    pass


class Base(ABC, Generic[T, U]):
    """What vLLM's base class does, of which an engine sees something."""

    init_info_cls: type
    update_info_cls: type

    def __init__(self, config: Any, vllm_config: Any, device: Any, model: Any) -> None:
        self.config, self.device, self.model, self.model_config = config, device, model, vllm_config.model_config

    def parse_init_info(self, info: dict[str, Any]) -> Any:
        return self.init_info_cls(**info)

    def parse_update_info(self, info: dict[str, Any]) -> Any:
        return self.update_info_cls(**info)

    def update_weights(self, info: dict[str, Any]) -> None:
        raise AssertionError("it ends in torch.accelerator.synchronize(), which a CPU does not have")

    @abstractmethod
    def init_transfer_engine(self, info: Any) -> None: ...
    @abstractmethod
    def start_weight_update(self) -> None: ...
    @abstractmethod
    def finish_weight_update(self) -> None: ...
    @abstractmethod
    def receive_weights(self, info: Any) -> None: ...
    @abstractmethod
    def shutdown(self) -> None: ...
    @staticmethod
    @abstractmethod
    def trainer_send_weights(iterator: Any, arguments: Any) -> None: ...


class Factory:
    """What a plugin sees of vLLM's factory."""

    _registry: dict[str, Any] = {}  # noqa: RUF012

    @classmethod
    def register_engine(cls, name: str, module: str, kind: str) -> None:
        assert name not in cls._registry
        cls._registry[name] = lambda: getattr(import_module(module), kind)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the engine, in a process that has the stand-in."""
    names = ("vllm", "vllm.distributed", "vllm.distributed.weight_transfer")
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    made = {"WeightTransferEngine": Base, "WeightTransferInitInfo": InitInfo, "WeightTransferUpdateInfo": UpdateInfo}
    for name, content in (("base", made), ("factory", {"WeightTransferEngineFactory": Factory})):
        module = ModuleType(f"{names[-1]}.{name}")
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(Factory, "_registry", {})
    monkeypatch.delitem(sys.modules, "shiradelta.serving.vllm", raising=False)
    yield import_module("shiradelta.serving.vllm")
    sys.modules.pop("shiradelta.serving.vllm", None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(checkpoint(), tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "a.shd").write_bytes(delta(["norm.weight", "k.weight"]))
    (tmp_path / "b.shd").write_bytes(delta(["v.weight"]))
    return tmp_path


def model() -> Engine:
    made = Engine(0)
    made.load_weights(checkpoint().items())
    return made


def state(made: torch.nn.Module) -> dict[str, bytes]:
    return {name: bits(tensor).tobytes() for name, tensor in made.state_dict().items()}


def test_the_engine_is_registered_once_and_does_what_requests_say(vllm: Any, folder: Path):
    plugin.register()
    plugin.register()
    made = model()
    config = SimpleNamespace(model_config=SimpleNamespace(model=str(folder)))
    engine = Factory._registry["shd"]()(None, config, torch.device("cpu"), made)
    with pytest.raises(ArgumentError, match="call init_weight_transfer_engine first"):
        engine.update_weights({})
    engine.init_transfer_engine(engine.parse_init_info({}))
    base = state(made)
    engine.start_weight_update()
    engine.update_weights({"load": {"a": str(folder / "a.shd")}, "active": {"a": 1.0}})
    engine.finish_weight_update()
    assert state(made)["norm"] != base["norm"]
    engine.update_weights({"active": {}, "unload": ["a"]})
    assert state(made) == base
    with pytest.raises(ArgumentError, match="a trainer sends no tensors here"):
        engine.trainer_send_weights(iter(()), {})
    engine.shutdown()


def test_the_extension_of_the_worker(vllm: Any, folder: Path):
    class Worker(vllm.SwapExtension):
        device = "cpu"
        model_config = SimpleNamespace(model=str(folder))
        model = model()

        def get_model(self) -> Engine:
            return self.model

    worker = Worker()
    with pytest.raises(ArgumentError, match="call shd_init first"):
        worker.shd_info()
    assert worker.shd_init() == {"adapters": {}}
    base = state(worker.model)
    text = base64.b64encode((folder / "a.shd").read_bytes()).decode()
    request = json.loads(json.dumps({"data": {"a": text}, "active": {"a": 0.5}}))
    told = worker.shd_update(request)
    assert told == worker.shd_info() == json.loads(json.dumps(told))
    assert told["adapters"]["a"]["strength"] == 0.5
    for wrong, what in [({"actve": {}}, "fields actve"), (["active"], "list")]:
        with pytest.raises(ArgumentError, match=f"a request has {what}, which is not known; it is an object of load,"):
            worker.shd_update(wrong)
    worker.shd_update({"active": {}})
    assert state(worker.model) == base


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        ({"load": {"b": "b.shd", "c": "nowhere.shd"}, "active": {"b": 1}}, ShiraDeltaError),
        ({"load": {"b": "b.shd"}, "active": {"d": 1}}, ArgumentError),
        ({"load": {"b": "b.shd"}, "active": {"b": float("nan")}}, ShiraDeltaError),
        ({"load": {"b": "b.shd"}, "data": {"c": "AAAA"}, "active": {}}, FormatError),
        ({"data": {"c": "no base64"}, "active": {}}, ArgumentError),
        ({"load": {"strange": "strange.shd"}, "active": {}}, BaseMismatchError),
        ({"active": {"a": 1.0}, "unload": ["a"]}, ArgumentError),
        ({"unload": ["a"]}, ArgumentError),
        ({"unload": ["z"]}, ArgumentError),
        ({"load": {"a": "b.shd"}}, ArgumentError),
        ({"rebase": True, "active": {"a": 1.0}}, ArgumentError),
        ({"rebase": True, "load": {"b": "b.shd"}, "active": {"b": float("nan")}}, ShiraDeltaError),
        ({"rebase": True, "load": {"b": "b.shd", "c": "b.shd"}, "active": {"b": 1, "c": 1}}, ArgumentError),
    ],
)
def test_a_request_that_fails_changes_nothing(request_: dict[str, Any], error: type[Exception], folder: Path):
    made = model()
    base, served = state(made), ServedWeights(made, folder)
    served.do(SwapRequest(load={"a": str(folder / "a.shd")}, active={"a": 1.0}))
    (folder / "strange.shd").write_bytes(delta(["q.weight"]))  # of which this rank has a half
    before, about = state(made), served.about()
    request_["load"] = {name: str(folder / path) for name, path in request_.get("load", {}).items()}
    with pytest.raises(error):
        served.do(SwapRequest(**request_))
    assert (state(made), served.about()) == (before, about)
    served.do(SwapRequest(active={}))
    assert state(made) == base


def test_layers_that_were_repacked_are_refused_before_anything_is_written(folder: Path):
    made = model()
    made.qkv = torch.nn.Parameter(made.qkv.t().contiguous(), requires_grad=False)
    before = state(made)
    with pytest.raises(TargetError, match="the engine's loader cannot be followed"):
        ServedWeights(made, folder)
    with pytest.raises(ArgumentError, match="is no folder here"):
        ServedWeights(made, folder / "nowhere")
    assert state(made) == before
    assert np.array_equal(bits(made.qkv.t()), bits(model().qkv))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *(
            ({"active": value}, "active is .*; give a mapping of names to strengths")
            for value in ("a", ["a"], 3, {1: 1})
        ),
        *(({"load": value}, "load is .*; give a mapping of names to paths") for value in ("a", ["b"], 3, {"b": 3})),
        *(({"data": value}, "data is .*; give a mapping of names to files' bytes") for value in ("x", {"b": 3}, None)),
        *(({"unload": value}, "unload is .*; give a list of names") for value in ("a", 3, [3], [["a"]])),
        ({"load": {"b": "b.shd"}, "data": {"b": ""}}, "'b' is in load and in data"),
    ],
)
def test_fields_of_the_wrong_type_are_refused(fields: dict[str, Any], message: str, folder: Path):
    made = model()
    served = ServedWeights(made, folder)
    served.do(SwapRequest(load={"a": str(folder / "a.shd")}, active={"a": 1.0}))
    before = state(made)
    with pytest.raises(ArgumentError, match=message):
        served.do(SwapRequest(**fields))
    assert state(made) == before


def test_a_name_may_be_unloaded_twice(folder: Path):
    served = ServedWeights(model(), folder)
    served.do(SwapRequest(load={"a": str(folder / "a.shd")}))
    assert served.do(SwapRequest(unload=["a", "a"])) == {"adapters": {}}


class Moves(Engine):
    """A layer that moves elements after loading, in a weight that is called as in the checkpoint."""

    def __init__(self) -> None:
        super().__init__(0)
        del self.norm, self.scaled
        self.norm, self.scaled = torch.nn.Module(), torch.nn.Module()
        for layer in (self.norm, self.scaled):
            layer.weight = torch.nn.Parameter(torch.zeros(8, dtype=torch.bfloat16), requires_grad=False)

    def load_norm(self, layer: str, kind: str, tensor: torch.Tensor) -> None:
        self.norm.weight.data.copy_(tensor)

    def load_scaled(self, layer: str, kind: str, tensor: torch.Tensor) -> None:
        self.scaled.weight.data.copy_(tensor * 2)


@pytest.mark.parametrize("name", ["norm.weight", "scaled.weight"])
def test_what_is_not_in_memory_as_in_the_checkpoint_is_refused_by_name(name: str, folder: Path):
    """A fingerprint would tell, but not every file has one."""
    made = Moves()
    made.load_weights(checkpoint().items())
    made.norm.weight.copy_(made.norm.weight.flip(0))
    served = ServedWeights(made, folder)
    before = state(made)
    save_delta(folder / "a.shd", {name: TensorDelta((8,), [1], [0.5], "bfloat16")})
    with pytest.raises(TargetError, match=f"tensor {name!r} is not in memory as in the checkpoint"):
        served.do(SwapRequest(load={"a": str(folder / "a.shd")}, active={"a": 1.0}))
    served.do(SwapRequest(load={"b": str(folder / "b.shd")}, active={"b": 1.0}))
    served.do(SwapRequest(active={}, unload=["b"]))
    assert state(made) == before
    assert served.about() == {"adapters": {}}


def test_a_cpu_that_packs_weights_is_told_how_to_keep_them(vllm: Any, folder: Path, monkeypatch: pytest.MonkeyPatch):
    made = model()
    made.qkv = torch.nn.Parameter(torch.empty(0, dtype=torch.bfloat16), requires_grad=False)  # as vLLM leaves it
    engine = vllm.SwapEngine(None, SimpleNamespace(model_config=SimpleNamespace(model=str(folder))), "cpu", made)
    with pytest.raises(TargetError, match=f"start vLLM with {plugin.UNPACKED}=1, which keeps weights"):
        engine.init_transfer_engine(engine.parse_init_info({}))
    utils = ModuleType("vllm.model_executor.layers.utils")
    for name in ("vllm.model_executor", "vllm.model_executor.layers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["vllm.model_executor.layers"].utils = utils  # type: ignore[attr-defined]
    monkeypatch.setenv(plugin.UNPACKED, "1")
    plugin.register()
    layer = SimpleNamespace()
    utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    x, weight, bias = torch.ones(2, 3), torch.ones(4, 3), torch.ones(4)
    assert torch.equal(layer.cpu_linear(x, weight, bias), torch.full((2, 4), 4.0))
    with pytest.raises(TargetError, match="apply the delta to the checkpoint") as caught:
        engine.init_transfer_engine(engine.parse_init_info({}))
    assert plugin.UNPACKED not in str(caught.value)
