"""Lengths of rows beside a masked direction (SHiRA-DoRA): against dense torch, in files, states and the command."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call

import shiradelta
from shiradelta import train
from shiradelta.errors import ArgumentError, DeltaError
from shiradelta.nonzeros.magnitude import RowMagnitudes
from shiradelta.nonzeros.weight import WeightNonzeros
from tests.train.test_attach import BATCH, Loss, llama, make, text_loss

TARGETS = {
    "llama": ["q_proj", "down_proj", "embed_tokens"],
    "tied": ["embed_tokens", "v_proj"],
    "gpt2": ["c_attn", "c_fc", "wte"],
    "experts": ["experts", "q_proj"],
    "image": ["conv", "out_proj", "in_proj_weight", "table"],
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("weight", "magnitude"):
        monkeypatch.setattr(f"shiradelta.nonzeros.{module}.CHUNK", 500)


def attached(kind: str, **options: Any) -> tuple[nn.Module, train.Tuner, Loss]:
    model, _, loss = make(kind)
    return model, train.attach(model, 0.25, "rand", TARGETS[kind], magnitude=True, **options), loss


class Dense:
    """The same model with dense directions and lengths, by torch's own autograd."""

    def __init__(self, kind: str, positions: dict[str, Tensor]) -> None:
        self.model = make(kind)[0].requires_grad_(False)
        weights = dict(self.model.named_parameters())
        modules = dict(self.model.named_modules())
        self.masks, self.dims, self.directions, self.lengths = {}, {}, {}, {}
        for name, where in positions.items():
            weight, layer = weights[name], modules[name.rpartition(".")[0]]
            mask = torch.zeros(weight.numel())
            mask[where] = 1
            self.masks[name] = mask.view_as(weight)
            # [out, in], [out, in, kernel...], [experts, out, in], and GPT-2's [in, out].
            out = {"Conv1D": 0, "Conv2d": (1, 2, 3)}.get(type(layer).__name__, -1)
            self.dims[name] = out
            self.directions[name] = torch.zeros_like(weight).requires_grad_()
            self.lengths[name] = torch.linalg.vector_norm(weight, dim=out, keepdim=True).detach().requires_grad_()

    def weights(self) -> dict[str, Tensor]:
        found = {}
        for name, base in self.model.named_parameters():
            if name in self.masks:
                direction = base + self.masks[name] * self.directions[name]
                length = torch.linalg.vector_norm(direction, dim=self.dims[name], keepdim=True)
                scaled = self.lengths[name] * direction / torch.where(length > 0, length, 1)
                found[name] = base + self.masks[name] * (scaled - base)
        return found

    def __call__(self, *args: Any, **others: Any) -> Any:
        return functional_call(self.model, self.weights(), args, others, tie_weights=True)


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in ("llama", "experts") else pytest.mark.slow) for kind in TARGETS]
)
def test_training_is_dense_training_of_directions_and_lengths(kind: str):
    model, tuner, loss = attached(kind)
    dense = Dense(kind, tuner.positions)
    sparse = torch.optim.SGD(tuner.parameters(), lr=0.3)
    other = torch.optim.SGD([*dense.directions.values(), *dense.lengths.values()], lr=0.3)
    for _ in range(3):
        sparse.zero_grad()
        other.zero_grad()
        loss(model).backward()
        loss(dense).backward()  # type: ignore[arg-type]
        for name, values in tuner.values.items():
            wanted = dense.directions[name].grad.reshape(-1)[tuner.positions[name]]
            torch.testing.assert_close(values.grad, wanted, rtol=2e-4, atol=1e-6)
            lengths = tuner.scales[name].grad
            torch.testing.assert_close(lengths, dense.lengths[name].grad.reshape(-1), rtol=2e-4, atol=1e-6)
            assert lengths.any()
        sparse.step()
        other.step()
    found = dict(model.named_parameters())
    for name, wanted in dense.weights().items():
        torch.testing.assert_close(found[name].data, wanted.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("by_column", [False, True])
def test_changes_and_gradients_far_from_the_start(by_column: bool):
    """Against the definition in float64, with rows without nonzeros, and a row of zeros, which has no direction."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 9, generator=draw)
    weight[2], weight[:, 4] = 0, 0
    where = torch.tensor([0, 3, 10, 12, 13, 19, 20, 45, 49])
    rows = RowMagnitudes(
        WeightNonzeros(weight, weight.dtype, where, weight.view(-1)[where]), weight, 9, by_column=by_column
    )
    values = (0.5 * torch.randn(9, generator=draw)).requires_grad_()
    scales = torch.randn(rows.start().shape, generator=draw).requires_grad_()
    found = rows.changes(values, scales)
    upstream = torch.randn(9, generator=draw)
    found.backward(upstream)

    base, dim = weight.double(), 0 if by_column else 1
    exact, lengths = values.detach().double().requires_grad_(), scales.detach().double().requires_grad_()
    direction = base.view(-1).index_put((where,), base.view(-1)[where] + exact).view_as(base)
    norms = direction.norm(dim=dim, keepdim=True)
    scaled = (base.norm(dim=dim) + lengths).unsqueeze(dim) / norms * direction - base
    wanted = scaled.view(-1)[where]
    wanted.backward(upstream.double())
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(values.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scales.grad.double(), torch.nan_to_num(lengths.grad), rtol=1e-4, atol=1e-5)
    untouched = rows.changes(torch.zeros(9), torch.zeros_like(scales))
    assert not untouched.any()


@pytest.mark.parametrize(
    ("dtype", "prune_steps"),
    [
        (torch.bfloat16, 0),
        (torch.float32, 2),
        *(
            pytest.param(*rest, marks=pytest.mark.slow)
            for rest in ((torch.float32, 0), (torch.float16, 0), (torch.bfloat16, 2), (torch.float16, 2))
        ),
    ],
)
def test_the_folder_gets_the_bits_that_were_trained(dtype: torch.dtype, prune_steps: int, tmp_path: Path):
    model = llama(dtype)
    for p in model.parameters():
        p.data[p.abs() < p.abs().median()] = -0.0
    model.save_pretrained(tmp_path / "model")
    tuner = train.attach(
        model, 0.1, "wm", ["q_proj", "down_proj", "embed_tokens"], magnitude=True, prune_steps=prune_steps
    )
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=0.02)
    for _ in range(4):
        optimizer.zero_grad()
        text_loss(model).backward()
        optimizer.step()
    tuner.save(tmp_path / "task.shd", values="f32")
    shiradelta.apply(tmp_path / "model", tmp_path / "task.shd")
    weights, bits = dict(model.named_parameters()), torch.int32 if dtype == torch.float32 else torch.int16
    for name, stored in load_file(tmp_path / "model" / "model.safetensors").items():
        assert torch.equal(stored.view(bits), weights[name].data.view(bits))
    with shiradelta.open_delta(tmp_path / "task.shd") as delta:
        assert (delta.metadata["mask"], delta.metadata["magnitude"]) == ("wm", "rows")
        for name, tensor in delta.items():
            assert set(tensor.positions()) <= set(tuner.positions[name].tolist())
            assert tensor.nnz <= round(0.1 * weights[name].numel())


def test_before_training_nothing_changes_and_detach_restores_all():
    model, tuner, loss = attached("llama")
    before = {name: p.detach().clone() for name, p in make("llama")[0].named_parameters()}
    assert loss(model).item() == loss(make("llama")[0]).item()
    with pytest.raises(DeltaError, match="nothing was trained"):
        tuner.deltas()
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {f"{name}_nonzeros" for name in tuner.values} | {
        f"{name}_magnitudes_nonzeros" for name in tuner.values
    }
    with torch.no_grad():
        for scales in tuner.scales.values():
            scales.add_(0.1)
    tuner.write()
    name = "model.layers.0.self_attn.q_proj.weight"
    changed = (tuner.weights[name] != before[name]).reshape(-1).nonzero().reshape(-1)
    assert set(changed.tolist()) <= set(tuner.positions[name].tolist())
    assert len(changed) > 0.9 * len(tuner.positions[name])
    tuner.detach()
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], one) for name, one in before.items())


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"magnitude": True}, {"mask": "rigsa", "calibration": [BATCH]}])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_model_is_used_without_gradients(mode: Any, options: dict[str, Any]):
    """Also with values that were changed by hand, as optimizers do that torch does not know."""
    model = llama()
    tuner = train.attach(model, 0.1, **{"mask": "wm", "targets": ["q_proj", "down_proj"], **options})
    step(model, tuner, 1)
    wanted = text_loss(model).item()
    with mode():
        assert text_loss(model).item() == wanted
    for scales in tuner.scales.values():
        scales.data += 0.5
    with mode():
        changed = text_loss(model).item()
    assert changed != wanted
    assert text_loss(model).item() == changed


def step(model: nn.Module, tuner: train.Tuner, count: int) -> None:
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.3)
    for _ in range(count):
        optimizer.zero_grad()
        text_loss(model).backward()
        optimizer.step()


@pytest.mark.slow
def test_a_state_goes_on_exactly_on_another_mask_too():
    model, tuner, _ = attached("llama")
    step(model, tuner, 2)
    state = {name: one.clone() for name, one in tuner.state_dict().items()}
    other, resumed, _ = attached("llama", seed=1)
    assert any(not torch.equal(where, tuner.positions[name]) for name, where in resumed.positions.items())
    resumed.load_state_dict(state)
    step(model, tuner, 2)
    step(other, resumed, 2)
    assert all(torch.equal(one, resumed.state_dict()[name]) for name, one in tuner.state_dict().items())
    weights = dict(other.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    plain = train.attach(llama(), 0.25, "rand", TARGETS["llama"])
    with pytest.raises(DeltaError, match="on one side only"):
        plain.load_state_dict(state)
    name = next(iter(tuner.scales))
    with pytest.raises(DeltaError, match="does not fit"):
        tuner.load_state_dict(state | {f"{name}.magnitudes": torch.zeros(3)})


def test_a_copied_model_trains_by_itself():
    model, tuner, loss = attached("llama")
    other = copy.deepcopy(model)
    before = loss(model).item()
    step(other, other._shiradelta, 2)
    assert loss(model).item() == before > loss(other).item()
    step(model, tuner, 2)
    assert loss(model).item() == loss(other).item()


@pytest.mark.slow
def test_it_starts_from_an_adapter_and_is_exported(tmp_path: Path):
    model, tuner, _ = attached("llama")
    step(model, tuner, 2)
    tuner.save(tmp_path / "task.shd", values="f32")
    wanted = {name: weight.detach().clone() for name, weight in tuner.weights.items()}
    tuner.detach()
    again = train.attach(model, targets=TARGETS["llama"], start=tmp_path / "task.shd", magnitude=True)
    for name, weight in again.weights.items():
        torch.testing.assert_close(weight.data, wanted[name].data, rtol=1e-6, atol=1e-7)
    again.detach()
    linear = train.attach(model, 0.1, "wm", ["q_proj"], magnitude=True)
    step(model, linear, 1)
    linear.save_peft(tmp_path / "peft")
    changes = {name: delta.values() for name, delta in linear.deltas().items()}
    linear.detach()
    loaded = train.attach(model, targets=["q_proj"], start=tmp_path / "peft")
    for name, values in changes.items():
        found = loaded.values[name].detach()
        assert torch.equal(found[found != 0], torch.tensor(values))


def test_a_weight_without_rows_is_refused():
    model = llama()
    with pytest.raises(ArgumentError, match=r"'model.layers.0.input_layernorm.weight' of shape \[32\] has no rows"):
        train.attach(model, 0.1, "wm", ["q_proj", "norm", "input_layernorm"], magnitude=True)
    assert not hasattr(model, "_shiradelta")
    with pytest.raises(ArgumentError, match="magnitude"):
        train.attach(model, 0.1, "wm", ["q_proj"], magnitude="rows")  # type: ignore[arg-type]
