"""Training on models whose checkpoints hold weights in another form: fused, stacked, renamed, tied."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import shiradelta as sd
from shiradelta import HotSwap, train
from shiradelta.errors import ArgumentError, SourceError
from tests.hotswap.test_forms import gte, llama, mixtral, nomic, rearranged
from tests.hotswap.test_names import gemma3, qwen2_vl

transformers = pytest.importorskip("transformers", minversion="5.0")


def tied() -> Any:
    """Its output layer is its embedding, and trained as such."""
    return llama()


MODELS = [nomic, mixtral, *(pytest.param(m, marks=pytest.mark.slow) for m in (rearranged, qwen2_vl, tied, gte, gemma3))]


def made(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return make().bfloat16()


def attached(model: Any, **options: Any) -> train.Tuner:
    matrices = [name for name, weight in model.named_parameters() if weight.dim() > 1]
    return train.attach(model, 0.05, "rand", targets=matrices, **options)


def trained(model: Any, seed: int = 1, **options: Any) -> train.Tuner:
    """Values as if they had been trained, all of them nonzero."""
    tuner = attached(model, seed=seed, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for values in tuner.parameters():
            values.copy_(torch.randn(values.shape, generator=generator) + 3)
    tuner.write()
    return tuner


def state(model: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items() if "_nonzeros" not in name}


def saved(model: Any, folder: Path) -> dict[str, Tensor]:
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("make", MODELS)
def test_a_trained_file_fits_the_folder_and_the_live_model(make: Callable[[], Any], tmp_path: Path):
    model = made(make)
    base, on_disk = state(model), saved(model, tmp_path / "base")
    tuner = trained(model)
    tuner.save(tmp_path / "task.shd", values="f32")
    wanted = state(model)
    tuner.detach()
    assert equal(state(model), base)
    assert not equal(wanted, base)
    with sd.open_delta(tmp_path / "task.shd") as delta:
        assert set(delta) <= set(on_disk)
        assert all(delta[name].shape == tuple(on_disk[name].shape) for name in delta)
    model.load_state_dict(wanted)
    expected = saved(model, tmp_path / "wanted")
    model.load_state_dict(base)
    sd.apply(tmp_path / "base", tmp_path / "task.shd", out=tmp_path / "applied")
    assert equal(load_file(tmp_path / "applied" / "model.safetensors"), expected)
    swap = HotSwap(model)
    report = swap.load("task", tmp_path / "task.shd")
    assert (report.unmatched, report.unchecked) == ((), ())
    swap.switch("task")
    assert equal(state(model), wanted)
    swap.revert()
    assert equal(state(model), base)


@pytest.mark.parametrize("make", MODELS)
def test_training_goes_on_from_a_file(make: Callable[[], Any], tmp_path: Path):
    model = made(make)
    tuner = trained(model)
    tuner.save(tmp_path / "task.shd", values="f32")
    positions, values, wanted = tuner.positions, [v.detach().clone() for v in tuner.parameters()], state(model)
    tuner.detach()
    again = attached(model, start=tmp_path / "task.shd")
    assert equal(state(model), wanted)
    assert equal(again.positions, positions)
    assert all(torch.equal(one, other) for one, other in zip(again.parameters(), values, strict=True))


@pytest.mark.parametrize("make", MODELS)
def test_masks_are_kept_apart(make: Callable[[], Any], tmp_path: Path):
    """From a file in the checkpoint's names, and from positions in the model's."""
    model = made(make)
    tuner = trained(model)
    tuner.save(tmp_path / "task.shd")
    first = tuner.positions
    tuner.detach()
    for avoid in (tmp_path / "task.shd", first, {f"base_model.model.{name}": where for name, where in first.items()}):
        other = attached(model, seed=2, avoid=[avoid])
        for name, where in other.positions.items():
            assert not torch.isin(where, first[name]).any()
        other.detach()


def test_a_file_for_more_weights_than_are_trained_is_refused(tmp_path: Path):
    """Its tensor has the nonzeros of keys and values, too."""
    model = made(nomic)
    tuner = trained(model)
    tuner.save(tmp_path / "task.shd")
    tuner.detach()
    with sd.open_delta(tmp_path / "task.shd") as delta:
        fused = {name: tensor for name, tensor in delta.items() if "Wqkv" in name}
        sd.save_delta(tmp_path / "fused.shd", fused, values="f32")
    with pytest.raises(SourceError, match=r"Wqkv\.weight' changes weights that are not targets, beside '.*q_proj"):
        train.attach(model, targets=["q_proj"], start=tmp_path / "fused.shd")
    train.attach(model, targets=["q_proj", "k_proj", "v_proj"], start=tmp_path / "fused.shd")


def test_names_that_fit_two_weights_are_refused(tmp_path: Path):
    sizes = {f"{half}_{what}": 2 for half in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    config = transformers.BartConfig(**sizes, d_model=32, encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=60)
    model = made(lambda: transformers.BartModel(config))
    tuner = train.attach(model.encoder, 0.05, "rand", targets=["fc1"])
    first = tuner.positions
    for values in tuner.parameters():
        torch.nn.init.ones_(values)
    tuner.save(tmp_path / "encoder.shd")
    tuner.detach()
    both = r"'layers\.0\.fc1\.weight' may be 'decoder\.layers\.0\.fc1\.weight' or 'encoder\.layers\.0\.fc1\.weight'"
    with pytest.raises(SourceError, match=both):
        train.attach(model, targets=["fc1"], start=tmp_path / "encoder.shd")
    for avoid in (tmp_path / "encoder.shd", first):
        with pytest.raises(ArgumentError, match=both):
            train.attach(model, 0.05, "rand", targets=["fc1"], avoid=[avoid])
