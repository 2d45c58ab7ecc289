"""Adapters to start from, and to and from PEFT's SHiRA."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel, ShiraConfig, get_peft_model
from torch import nn

import shiradelta
from shiradelta import train
from shiradelta.errors import ArgumentError, DeltaError, ShiraDeltaError, SourceError
from shiradelta.exports import EXPORTS, export
from tests.train.test_attach import IDS, llama, make, text_loss, train_sparse

pytestmark = [  # PEFT's own
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),
]


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def test_what_is_trained_is_loaded_by_peft(tmp_path: Path):
    model = llama()
    base = copy.deepcopy(model)
    tuner = train.attach(model, 0.1, "wm", ["q_proj", "down_proj"])
    train_sparse(model, text_loss, 2)
    rank = tuner.save_peft(tmp_path / "peft", "some/base")
    assert rank == -(-round(0.1 * 32 * 48) // (32 + 48))
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "peft"))
    torch.testing.assert_close(output(loaded), output(model), rtol=1e-5, atol=1e-6)
    tuner.export(tmp_path / "export", base="some/base")
    for path in (tmp_path / "peft").iterdir():
        assert path.read_bytes() == (tmp_path / "export" / path.name).read_bytes()


def test_training_is_exported_to_any_layout(tmp_path: Path):
    model = llama()
    tuner = train.attach(model, 0.1, "wm", ["q_proj"])
    seen: dict[str, object] = {}

    def write(folder: object, deltas: dict[str, object], base: str) -> None:
        seen.update(folder=folder, names=set(deltas), base=base)

    export("seen", "What it gets.")(write)  # type: ignore[arg-type]
    try:
        tuner.export(tmp_path / "seen", "seen", "some/base")
    finally:
        EXPORTS.remove("seen")
    names = {name for name, _ in model.named_parameters() if name.endswith("q_proj.weight")}
    assert seen == {"folder": tmp_path / "seen", "names": names, "base": "some/base"}
    with pytest.raises(ArgumentError, match="export layout 'seen' is unknown; take dense"):
        tuner.export(tmp_path / "seen", "seen")


def test_training_starts_from_a_peft_adapter(tmp_path: Path):
    config = ShiraConfig(r=2, target_modules=["q_proj", "down_proj"], random_seed=0)
    peft_model = get_peft_model(llama(), config)
    generator = torch.Generator().manual_seed(0)
    for name, p in peft_model.named_parameters():
        if "shira_weight" in name:
            p.data = 0.02 * torch.randn(p.shape, generator=generator)
    peft_model.save_pretrained(str(tmp_path / "peft"))
    model = llama()
    tuner = train.attach(model, targets=["q_proj", "down_proj"], start=tmp_path / "peft")
    torch.testing.assert_close(output(model), output(peft_model), rtol=1e-5, atol=1e-6)
    assert tuner.nnz == 2 * 2 * (64 + 80)
    tuner.save_peft(tmp_path / "again")
    again = PeftModel.from_pretrained(llama(), str(tmp_path / "again"))
    torch.testing.assert_close(output(again), output(peft_model))
    tuner.detach()
    with pytest.raises(SourceError, match="SHiRA layer"):
        train.attach(make("gpt2")[0], start=tmp_path / "peft")


@pytest.mark.parametrize("kind", ["llama", "experts"])
def test_training_goes_on_from_a_file(kind: str, tmp_path: Path):
    model, targets, loss = make(kind)
    tuner = train.attach(model, 0.1, "wm", targets)
    train_sparse(model, loss, 2)
    tuner.save(tmp_path / "task.shd", values="f32")
    expected, values = loss(model).item(), tuner.values
    tuner.detach()
    tuner = train.attach(model, targets=targets, start=tmp_path / "task.shd")
    assert loss(model).item() == expected
    for name, value in tuner.values.items():
        assert torch.equal(value, values[name][values[name] != 0])
    assert train_sparse(model, loss, 2)[-1] < expected


def test_what_cannot_be_started_from(tmp_path: Path):
    (tmp_path / "nothing.safetensors").write_bytes(b"nothing")
    with pytest.raises(SourceError, match="not the state"):
        train.attach(llama(), start=tmp_path / "nothing.safetensors")
    set_delta = shiradelta.TensorDelta((32, 32), [1], torch.ones(1).numpy(), "float32", op="set")
    shiradelta.save_delta(tmp_path / "set.shd", {"model.layers.0.self_attn.q_proj.weight": set_delta})
    with pytest.raises(SourceError, match="only additions"):
        train.attach(llama(), start=tmp_path / "set.shd")
    tuner = train.attach(llama(), 0.1, "wm", ["embed_tokens"])
    with pytest.raises(DeltaError, match="linear"):
        tuner.save_peft(tmp_path / "peft")
    tuner = train.attach(llama(), 1.0, "wm", ["down_proj"])
    with pytest.raises(ShiraDeltaError, match="make a sparser delta"):
        tuner.save_peft(tmp_path / "peft")
    assert not (tmp_path / "peft").exists()
