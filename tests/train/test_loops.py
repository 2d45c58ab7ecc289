"""Sparse adapters in the loops that people have: mixed precision, checkpointing, compilation, Trainer, processes."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.pytorch_utils import Conv1D

import shiradelta
from shiradelta import train
from shiradelta.errors import DeltaError
from shiradelta.nonzeros.saved_state import load_state
from shiradelta.train.trainer import STATE, SparseCheckpoints
from tests import ranks
from tests.train import processes
from tests.train.test_attach import BATCH, IDS, llama, text_loss, train_dense, train_sparse

pytestmark = pytest.mark.slow

TARGETS = ["q_proj", "down_proj", "embed_tokens"]


def attached(**options: object) -> tuple[nn.Module, train.Tuner]:
    model = llama(**options)
    return model, train.attach(model, 0.1, "wm", TARGETS)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)


def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=(IDS + step) % 60, labels=(IDS + step) % 60).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def run_attached(steps: int, **options: object) -> list[float]:
    model, _ = attached(**options)
    return run(model, adam(model), steps)


def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(tmp_path: Path):
    model, tuner = attached(dtype=torch.bfloat16)
    optimizer = adam(model)
    run(model, optimizer, 3)
    whole = {name: value.clone() for name, value in model.state_dict().items()}
    torch.save({"tuner": tuner.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    expected = run(model, optimizer, 3)

    state = torch.load(tmp_path / "state.pt")
    model = llama(torch.bfloat16)
    tuner = train.attach(model, 0.1, "rand", TARGETS)  # another mask, of another size: the state's counts
    tuner.load_state_dict(state["tuner"])
    assert all(torch.equal(value, whole[name]) for name, value in model.state_dict().items())  # before any forward pass
    optimizer = adam(model)
    optimizer.load_state_dict(state["optimizer"])
    assert run(model, optimizer, 3) == expected
    tuner.detach()
    base = llama(torch.bfloat16).state_dict()
    assert all(torch.equal(value, base[name]) for name, value in model.state_dict().items())


def test_states_of_other_runs_are_refused():
    _, tuner = attached()
    state = tuner.state_dict()
    for broken in (
        {name: value for name, value in state.items() if "q_proj" not in name},
        {name: value[:-1] if name.endswith("embed_tokens.weight.values") else value for name, value in state.items()},
        {name: value - 10**6 if name.endswith("positions") else value for name, value in state.items()},
        {name: value + 10**6 if name.endswith("positions") else value for name, value in state.items()},
        {name: value.flip(0) if name.endswith("positions") else value for name, value in state.items()},
    ):
        with pytest.raises(DeltaError, match="state"):
            tuner.load_state_dict(broken)
    tuner.load_state_dict(state)


def test_accumulated_gradients_are_those_of_the_whole_batch():
    model, tuner = attached()
    text_loss(model).backward()
    whole = [p.grad.clone() for p in tuner.parameters()]
    model.zero_grad()
    for ids in IDS.split(2):
        (model(input_ids=ids, labels=ids).loss / 2).backward()
    for values, expected in zip(tuner.parameters(), whole, strict=True):
        torch.testing.assert_close(values.grad, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant: bool):
    expected = run_attached(3)
    model, _ = attached()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert run(model, adam(model), 3) == pytest.approx(expected, rel=1e-6)


def test_gradients_for_a_mask_are_made_with_checkpointing_too():
    model, calls = llama(), []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    expected = train.attach(model, 0.1, "snip", ["q_proj"], [BATCH])
    plain, masks = len(calls), expected.positions
    expected.detach()
    model.activation_checkpointing_enable({"use_reentrant": False})
    found = train.attach(model, 0.1, "snip", ["q_proj"], [BATCH])
    assert len(calls) == plain + 2 * plain
    assert all(torch.equal(where, masks[name]) for name, where in found.positions.items())
    assert model.training
    assert model.model.layers[0].mlp.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype: torch.dtype):
    def loss(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return text_loss(model)

    model, tuner = attached(dtype=dtype)
    dense = llama(dtype)
    train_dense(dense, tuner.positions, loss, 2)
    losses = train_sparse(model, loss, 2)
    assert losses[1] < losses[0]
    found = dict(model.named_parameters())
    for name in tuner.positions:
        torch.testing.assert_close(found[name].data, dict(dense.named_parameters())[name].data, rtol=0.02, atol=2e-3)


def test_a_gradient_scaler_sees_the_values():
    model, tuner = attached()
    optimizer, scaler = adam(model), torch.amp.GradScaler("cpu", init_scale=2.0**4)
    scaler.scale(text_loss(model)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(bool((values != 0).any()) for values in tuner.parameters())
    before = [values.clone() for values in tuner.parameters()]
    optimizer.zero_grad()
    scaler.scale(text_loss(model) * torch.inf).backward()
    scaler.step(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, tuner.parameters(), strict=True))


@pytest.mark.parametrize("by", ["data", "copy", "foreach", "own optimizer"])
def test_whatever_changes_the_values_reaches_the_weights(by: str):
    """Also what leaves no trace in a tensor's version."""

    class Own(torch.optim.Optimizer):
        def __init__(self, parameters: list[nn.Parameter]) -> None:
            super().__init__(parameters, {})

        def step(self, closure: None = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.sub_(p.grad)

    model, tuner = attached()
    optimizer = Own(tuner.parameters())
    first = text_loss(model)
    first.backward()
    if by == "own optimizer":
        optimizer.step()
    for values in tuner.parameters():
        if by == "data":
            values.data.sub_(values.grad)
        elif by == "copy":
            with torch.no_grad():
                values.copy_(values - values.grad)
    if by == "foreach":
        with torch.no_grad():
            torch._foreach_add_(tuner.parameters(), [-values.grad for values in tuner.parameters()])
    with torch.no_grad():
        assert text_loss(model) < first
    weights = dict(model.named_parameters())
    base = dict(llama().named_parameters())
    for name, positions in tuner.positions.items():
        expected = base[name].view(-1)[positions] + tuner.values[name]
        assert torch.equal(weights[name].view(-1)[positions], expected)


def test_checkpointing_by_hand_and_weights_used_twice():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.inner = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(checkpoint(self.inner, x, use_reentrant=False)).square().mean()

    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    model, dense = Twice(), Twice()
    tuner = train.attach(model, 0.2, "rand")
    train_dense(dense, tuner.positions, lambda m: m(x), 3)
    train_sparse(model, lambda m: m(x), 3)
    torch.testing.assert_close(model.inner.weight.detach(), dense.inner.weight.detach())


@pytest.mark.parametrize("by", ["deepcopy", "pickle"])
def test_a_copy_of_the_model_trains_by_itself(by: str):
    model, tuner = attached()
    train_sparse(model, text_loss, 1)
    trained = [values.clone() for values in tuner.parameters()]
    other = copy.deepcopy(model) if by == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert text_loss(other) == text_loss(model)
    train_sparse(other, text_loss, 2)
    assert all(map(torch.equal, tuner.parameters(), trained))
    assert text_loss(other) < text_loss(model)
    other._shiradelta.detach()
    assert type(other.model.layers[0].mlp.down_proj) is nn.Linear
    assert all(map(torch.equal, other.state_dict().values(), llama().state_dict().values()))
    assert train_sparse(model, text_loss, 2)[-1] < text_loss(llama())  # which the copy has not touched


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 5, 6), (2, 0, 6)])
@pytest.mark.parametrize("layer", [nn.Linear(6, 6), Conv1D(6, 6)])
def test_what_follows_may_change_outputs_in_place(layer: nn.Module, shape: tuple[int, ...]):
    def loss(model: nn.Module) -> Tensor:
        return model(x).square().sum()

    x = torch.linspace(-1, 1, math.prod(shape)).reshape(shape)
    model = nn.Sequential(copy.deepcopy(layer), nn.ReLU(inplace=True))
    dense = copy.deepcopy(model)
    tuner = train.attach(model, 0.5, "rand", ["0"])
    train_dense(dense, tuner.positions, loss, 2)
    train_sparse(model, loss, 2)
    torch.testing.assert_close(model[0]._parameters["weight"], dense[0].weight)


def test_gradients_of_gradients_are_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    train.attach(model, 0.5, "wm")
    x = torch.ones(2, 8, requires_grad=True)
    with pytest.raises(DeltaError, match="create_graph"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)
    torch.autograd.grad(model(x).sum(), x)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, while it traces
def test_compiled():
    def train_net(compiled: bool) -> list[float]:
        net = processes.model()
        train.attach(net, 0.25, "wm", ["table", "1", "0.0.weight", "0.3.bias", "head"])
        runner = torch.compile(net, backend="aot_eager", fullgraph=True) if compiled else net
        return train_sparse(net, lambda _: processes.loss(runner, IDS), 4)

    assert train_net(compiled=True) == pytest.approx(train_net(compiled=False), rel=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("prune_steps", [0, 2])
def test_compiled_with_checkpointing(prune_steps: int):
    """In one graph: nothing is noted on the way that a recomputation would note again."""

    def train_net(compiled: bool) -> list[float]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(9, 32), nn.Linear(32, 32), nn.Linear(32, 9))
        train.attach(net, 0.1, "wm", ["0", "1"], prune_steps=prune_steps)

        def loss() -> Tensor:
            return checkpoint(net, IDS.float() / 60, use_reentrant=False).square().mean()

        runner = torch.compile(loss, backend="aot_eager", fullgraph=True) if compiled else loss
        return train_sparse(net, lambda _: runner(), 4)

    assert train_net(compiled=True) == pytest.approx(train_net(compiled=False), rel=1e-5)


def test_weights_that_were_put_in_anew_are_patched_and_given_back():
    model, tuner = attached()
    train_sparse(model, text_loss, 2)
    expected = text_loss(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    assert text_loss(model) == expected
    base = llama().state_dict()
    model.load_state_dict(base, strict=False)
    with torch.no_grad():
        assert text_loss(model) == expected
    tuner.detach()
    assert all(torch.equal(value, base[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
def test_two_processes_are_one_with_the_whole_batch(tmp_path: Path):
    """DistributedDataParallel and FSDP2, by gloo; masks are the same on both, too, also with pruning."""
    torch.save({magnitude: processes.alone(magnitude) for magnitude in (False, True)}, tmp_path / "alone.pt")
    for found in ranks.run(processes.compare, 2, tmp_path, tmp_path / "alone.pt", tmp_path):
        assert [kind for kind, *_ in found] == ["DDP", "FSDP2", "DDP magnitude", "FSDP2 magnitude"]
        for _, values, largest, outputs in found:
            assert values < 1e-6 * largest
            assert outputs < 1e-5
    for more in ("", " magnitude"):
        files = tmp_path / f"DDP{more}.shd", tmp_path / f"FSDP2{more}.shd"
        with shiradelta.open_delta(files[0]) as one, shiradelta.open_delta(files[1]) as other:
            assert {name: tensor.nnz for name, tensor in one.items()} == {
                name: tensor.nnz for name, tensor in other.items()
            }


def trainer(
    model: nn.Module, folder: Path, steps: int, tuner: train.Tuner, *callbacks: TrainerCallback, **options: Any
) -> Trainer:
    rows = [{"input_ids": ids, "labels": ids} for ids in IDS.repeat(4, 1)]
    arguments = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.02,
        lr_scheduler_type="constant",
        save_steps=2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    callbacks = (SparseCheckpoints(tuner), *callbacks)
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:4], callbacks=list(callbacks))


def test_trainer_ends_with_the_best_mask_and_values(tmp_path: Path):
    """Which is here the worst, by its loss, and from before much was pruned."""
    model = llama()
    tuner = train.attach(model, 0.02, "wm", ["q_proj", "down_proj"], prune_steps=6, prune_from=4)
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    run = trainer(model, tmp_path, 8, tuner, eval_strategy="steps", eval_steps=2, **best)
    run.train()
    state = load_state(tmp_path / "checkpoint-2" / STATE)
    assert run.state.best_global_step == 2
    assert all(torch.equal(value, state[name]) for name, value in tuner.state_dict().items())
    assert run.evaluate()["eval_loss"] == run.state.best_metric


def test_trainer_saves_nonzeros_and_resumes(tmp_path: Path):
    model, tuner = attached()
    whole = trainer(model, tmp_path / "a", 4, tuner)
    whole.train()
    expected = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert expected[-1] < expected[0]
    values = {name: value.clone() for name, value in tuner.state_dict().items()}

    checkpoint_folder = tmp_path / "a" / "checkpoint-2"
    stored = load_file(checkpoint_folder / "model.safetensors")
    assert set(stored) == {name for name, _ in model.named_parameters() if name.endswith("_nonzeros")}
    with shiradelta.open_delta(checkpoint_folder / "adapter.shd") as delta:
        assert delta.metadata["step"] == "2"

    whole.save_model(tmp_path / "final")
    assert "save_pretrained" not in model.__dict__
    patched = type(model).from_pretrained(tmp_path / "final")
    assert text_loss(patched).item() == pytest.approx(text_loss(model).item(), rel=1e-6)

    model, tuner = attached()
    again = trainer(model, tmp_path / "a", 4, tuner)
    again.train(resume_from_checkpoint=str(checkpoint_folder))
    assert [entry["loss"] for entry in again.state.log_history if "loss" in entry] == expected
    assert all(torch.equal(value, values[name]) for name, value in tuner.state_dict().items())


def test_an_interrupted_trainer_saves_whole_models(tmp_path: Path):
    class Stop(TrainerCallback):
        def on_step_end(self, args: object, state: object, control: object, **others: object) -> None:
            raise KeyboardInterrupt

    model, tuner = attached()
    interrupted = trainer(model, tmp_path / "a", 4, tuner, Stop())
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    interrupted.save_model(tmp_path / "saved")
    saved = type(model).from_pretrained(tmp_path / "saved")
    assert text_loss(saved).item() == pytest.approx(text_loss(model).item(), rel=1e-6)
    other = copy.deepcopy(model)
    tuner.detach()
    for number, (whole, expected) in enumerate([(model, llama()), (other, saved)]):
        for folder in (
            tmp_path / f"base{number}",
            tmp_path / "a" / f"checkpoint-9{number}",
        ):  # of a Trainer's name, too
            whole.save_pretrained(folder)
            if whole is model or "base" in folder.name:
                found = text_loss(type(model).from_pretrained(folder))
                assert found.item() == pytest.approx(text_loss(expected).item(), rel=1e-6)


def test_trainer_of_a_plain_module(tmp_path: Path):
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(60, 32), nn.Linear(32, 60)

        def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {
                "loss": nn.functional.cross_entropy(self.head(self.table(input_ids)).flatten(0, 1), labels.flatten())
            }

    model = Plain()
    tuner = train.attach(model, 0.1, "wm", ["head"])
    trainer(model, tmp_path, 2, tuner).train()
    tuner.load_state_dict(load_file(tmp_path / "checkpoint-2" / "nonzeros.safetensors"))
    assert set(load_file(tmp_path / "checkpoint-2" / "model.safetensors")) == set(model.state_dict())
