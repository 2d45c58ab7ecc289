"""Where a model's layers go when they are spread over devices; the meta device stands in for a second one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from shiradelta.errors import ArgumentError, SourceError
from shiradelta.models import placement
from shiradelta.models.placement import devices_of, layers_by_device, main_device, named, pick_devices, place
from tests.fit.test_fit import BERT, LLAMA

CPU, META = torch.device("cpu"), torch.device("meta")
GPUS = [torch.device("cuda", index) for index in range(3)]


def llama(**settings: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**{**LLAMA, "num_hidden_layers": 6, **settings})).eval()


def where(model: nn.Module) -> dict[str, str]:
    """The device of each module that is moved as one."""
    layers = {name.rpartition(".layers.")[2].partition(".")[0]: p.device.type for name, p in model.named_parameters()}
    return {name: device for name, device in layers.items() if name.isdigit()} | {
        name: parameter.device.type for name, parameter in model.named_parameters() if ".layers." not in name
    }


def test_what_is_before_the_layers_is_on_the_first_device_and_what_is_after_them_on_the_last():
    model = place(llama(), [CPU, META])
    layers = dict(zip("012345", 3 * ["cpu"] + 3 * ["meta"], strict=True))
    rest = {"model.embed_tokens.weight": "cpu", "model.norm.weight": "meta", "lm_head.weight": "meta"}
    assert where(model) == {**layers, **rest}
    assert model.model.rotary_emb.inv_freq.device == CPU, "it makes something of the inputs"
    assert layers_by_device(model) == "3 on cpu, 3 on meta"
    assert named([*GPUS, CPU]) == "cuda:0, cuda:1, cuda:2 and cpu"
    assert main_device([CPU, *GPUS]) == GPUS[0]


def test_a_head_that_is_tied_stays_with_the_embedding():
    model = place(llama(tie_word_embeddings=True), [CPU, META])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (model.lm_head.weight.device, model.model.norm.weight.device) == (CPU, CPU)
    assert layers_by_device(model) == "3 on cpu, 3 on meta"


@pytest.mark.parametrize(("free", "layers"), [([1, 1], [3, 3]), ([2, 1], [4, 2]), ([1, 2], [2, 4]), ([1, 9], [1, 5])])
def test_each_device_has_layers_by_its_memory(free: list[int], layers: list[int], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(placement, "_room", lambda devices: free)
    model = place(llama(vocab_size=8), [CPU, META])
    assert [list(where(model).values())[:6].count(device) for device in ("cpu", "meta")] == layers


def test_a_cpu_has_as_much_as_a_gpu(monkeypatch: pytest.MonkeyPatch):
    assert placement._room([CPU, META]) == [1, 1]
    monkeypatch.setattr(placement, "_free", dict(zip(GPUS, (40.0, 80.0, 60.0), strict=True)).__getitem__)
    assert placement._room([*GPUS[:2], CPU]) == [40, 80, 60]


def test_parameters_and_buffers_of_what_holds_the_layers_go_to_the_first_device():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
            self.start = nn.Parameter(torch.zeros(2))
            self.register_buffer("scale", torch.ones(2))

    model = place(Net(), [META, CPU])
    assert (model.start.device, model.scale.device) == (META, META)
    assert [layer.weight.device for layer in model.layers] == [META, CPU]


@pytest.mark.parametrize("kind", ["causal", "classifier"])
def test_a_layer_gets_its_inputs_on_its_own_device_and_gives_what_it_gave(kind: str, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    model = llama() if kind == "causal" else BertForSequenceClassification(BertConfig(**BERT)).eval()
    ids, moved = torch.randint(0, 60, (3, 7)), []
    expected = model(ids, torch.ones_like(ids)).logits
    place(model, [CPU, CPU])
    inner = placement._moved

    def spy(value: Any, device: torch.device) -> Any:
        moved.append(device)
        return inner(value, device)

    monkeypatch.setattr(placement, "_moved", spy)
    assert torch.equal(model(ids, torch.ones_like(ids)).logits, expected)
    assert moved
    assert set(moved) == {CPU}


def test_inputs_of_any_form_are_moved():
    class Layer(nn.Linear):
        def forward(self, *arguments: Any, **keywords: Any) -> Any:
            return arguments, keywords

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer(1, 1) for _ in range(2))

    model, x, other = place(Layers(), [CPU, META]), torch.zeros(1), object()
    arguments, keywords = model.layers[1](x, [(x, 1)], mask={"a": x}, cache=other)
    assert (arguments[0].device, arguments[1][0][0].device, keywords["mask"]["a"].device) == (META, META, META)
    assert (arguments[1][0][1], keywords["cache"]) == (1, other)


def test_what_cannot_be_spread_is_refused():
    with pytest.raises(SourceError, match="Linear has no list of layers to spread over devices; name one device"):
        place(nn.Linear(2, 2), [CPU, META])
    model = llama()
    model.model.layers[5].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(SourceError, match=r"layers on two devices share 'mlp.up_proj.weight'; name one device"):
        place(model, [CPU, META])
    with pytest.raises(SourceError, match="no weights for 'weight'; load it without offloading"):
        devices_of(nn.Linear(2, 2, device="meta"))


def test_devices_that_are_named_are_taken():
    assert pick_devices("cpu, cpu", lambda device: 0) == pick_devices(["cpu", "cpu"], lambda device: 0) == [CPU, CPU]
    assert pick_devices("cpu", lambda device: 1e18) == pick_devices(["cpu"], lambda device: 1e18) == [CPU]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", "'gpu' is no device"),
        ("cpu,", "'' is no device"),
        ("cuda:one", "'cuda:one' is no device"),
        ("cpu,cuda:77", r"'cuda:77' cannot be used here \(.{,90}\)"),
        ("privateuseone", r"'privateuseone' cannot be used here \(No module .{,80}\)"),
        ("meta", "'meta' computes nothing"),
    ],
)
def test_a_device_that_is_not_there_is_refused(name: str, message: str):
    with pytest.raises(ArgumentError, match=f"^device {message}; take cpu[^;]*$"):
        pick_devices(name, lambda device: 0)


def test_what_is_there_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    with pytest.raises(ArgumentError, match=r"^device 'gpu' is no device; take cpu, cuda:0 or cuda:1$"):
        pick_devices("gpu", lambda device: 0)


@pytest.mark.parametrize(
    ("name", "need", "expected"),
    [
        (None, 75, GPUS[:1]),
        (None, 76, GPUS),
        ("cuda", 76, GPUS),
        ("cuda:0", 76, GPUS[:1]),
        ("cuda:1", 76, GPUS[1:2]),
        ("cuda:2,cuda:0", 0, [GPUS[2], GPUS[0]]),
    ],
)
def test_a_model_that_fits_takes_one_gpu_and_another_all(
    name: str | None, need: float, expected: list[torch.device], monkeypatch: pytest.MonkeyPatch
):
    def pick(name: str | None) -> torch.device:
        return GPUS[0] if name in (None, "cuda") else torch.device(name)

    monkeypatch.setattr(placement, "pick_device", pick)
    monkeypatch.setattr(placement, "_free", lambda device: 100.0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert pick_devices(name, lambda device: need) == expected
    with pytest.raises(ArgumentError, match=r"^device 'cuda:1,cpu,cuda:1' names a GPU twice"):
        pick_devices("cuda:1, cpu,cuda:1", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_devices(None, lambda device: need) == GPUS[:1]
