"""Files of random masks name the draw, in whatever form the checkpoint has the weights and whatever training left."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import shiradelta as sd
from shiradelta import train
from shiradelta.errors import DeltaError
from tests.hotswap.test_forms import mixtral, nomic
from tests.train.test_attach import llama
from tests.train.test_forms import made
from tests.train.test_pruning import trained as trained_and_pruned

TARGETS = ["q_proj", "down_proj"]


def fill(tuner: train.Tuner) -> None:
    """Values as if they had been trained, all of them nonzero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for values in tuner.parameters():
            values.copy_(torch.randn(values.shape, generator=generator) + 3)
    tuner.write()


def codecs(path: Path) -> dict[str, str]:
    with sd.open_delta(path) as delta:
        delta.verify()
        return {name: tensor.record.index_codec_name for name, tensor in delta.items()}


def digest_without_draws(tuner: train.Tuner, path: Path, values: str) -> str:
    """The digest of the file as it would be if nothing were known of the draws."""
    plain = {
        name: sd.TensorDelta(each.shape, each.positions(), each.values(), each.dtype, base_bits=each.base_bits)
        for name, each in tuner.deltas().items()
    }
    sd.save_delta(path, plain, values=values)
    assert "SEEDED" not in codecs(path).values()
    return sd.open_delta(path).digest


@pytest.mark.parametrize("values", ["f32", "int8", "int4", "sign"])
def test_a_random_mask_takes_no_bytes_and_changes_nothing_else(tmp_path: Path, values: str):
    tuner = train.attach(llama(), 0.1, "rand", TARGETS, seed=3)
    fill(tuner)
    tuner.save(tmp_path / "seeded.shd", values)
    assert set(codecs(tmp_path / "seeded.shd").values()) == {"SEEDED"}
    delta = sd.open_delta(tmp_path / "seeded.shd")
    assert {tensor.record.index.decoded for tensor in delta.values()} == {24}
    assert len({tensor.draw.seed for tensor in delta.values() if tensor.draw}) == len(delta)
    assert delta.digest == digest_without_draws(tuner, tmp_path / "plain.shd", values)


def test_values_that_stay_zero_are_left_out_of_the_draw(tmp_path: Path):
    """So that -0, infinities and NaN of the base stay as they are, and a grid of values needs no zero."""
    model = llama()
    for name, weight in model.named_parameters():
        if name.endswith("q_proj.weight"):
            weight.data.fill_(-0.0)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    tuner = train.attach(model, 0.1, "rand", TARGETS)
    fill(tuner)
    with torch.no_grad():
        for values in tuner.parameters():
            values[::5] = 0
    tuner.write()
    tuner.save(tmp_path / "some.shd", "sign")
    assert set(codecs(tmp_path / "some.shd").values()) == {"SEEDED"}
    delta = sd.open_delta(tmp_path / "some.shd")
    assert delta.nnz == sum(int((values != 0).sum()) for values in tuner.values.values())
    assert delta.digest == digest_without_draws(tuner, tmp_path / "plain.shd", "sign")
    tuner.detach()
    swap = sd.HotSwap(model)
    swap.load("some", tmp_path / "some.shd")
    swap.switch("some")
    for name, weight in model.named_parameters():
        listed = delta[name].positions() if name in delta else np.zeros(0, np.int64)
        changed = (weight.detach().view(torch.int32) != before[name].view(torch.int32)).reshape(-1).nonzero()
        assert set(changed.reshape(-1).tolist()) <= set(listed.tolist())


def test_what_pruning_leaves_of_a_random_mask_is_a_list_of_cells(tmp_path: Path):
    _, tuner = trained_and_pruned(mask="rand", sparsity=0.1, prune_from=2)
    tuner.save(tmp_path / "pruned.shd")
    assert set(codecs(tmp_path / "pruned.shd").values()) == {"SEEDED"}
    for tensor in sd.open_delta(tmp_path / "pruned.shd").values():
        assert tensor.draw is not None
        assert tensor.draw.cells == pytest.approx(2 * tensor.nnz, abs=2)
    assert sd.open_delta(tmp_path / "pruned.shd").digest == digest_without_draws(tuner, tmp_path / "plain.shd", "int4")


def test_what_is_avoided_is_left_out_of_the_draw(tmp_path: Path):
    model = llama()
    first = train.attach(model, 0.1, "rand", TARGETS)
    taken = first.positions
    first.detach()
    tuner = train.attach(model, 0.1, "rand", TARGETS, avoid=[taken], seed=1)
    fill(tuner)
    tuner.save(tmp_path / "apart.shd")
    assert set(codecs(tmp_path / "apart.shd").values()) == {"SEEDED"}
    assert sd.open_delta(tmp_path / "apart.shd").digest == digest_without_draws(tuner, tmp_path / "plain.shd", "int4")


@pytest.mark.parametrize("mask", ["wm", "struct"])
def test_other_masks_name_no_draw(tmp_path: Path, mask: str):
    tuner = train.attach(llama(), 0.1, mask, TARGETS)
    fill(tuner)
    tuner.save(tmp_path / "other.shd")
    assert "SEEDED" not in codecs(tmp_path / "other.shd").values()


def test_a_state_has_the_draws_of_its_mask(tmp_path: Path):
    model, files = llama(), {}
    tuners = {"seed 1": ("rand", 1), "seed 2": ("rand", 2), "wm": ("wm", 0)}
    states = {}
    for name, (mask, seed) in tuners.items():
        tuner = train.attach(model, 0.1, mask, TARGETS, seed=seed)
        fill(tuner)
        states[name], files[name] = tuner.state_dict(), tmp_path / f"{name}.shd"
        tuner.save(files[name], metadata={"mask": "", "seed": ""})
        tuner.detach()
    tuner = train.attach(model, 0.1, "rand", TARGETS)
    for name, state in states.items():
        tuner.load_state_dict(state)
        tuner.save(tmp_path / "loaded.shd", metadata={"mask": "", "seed": ""})
        assert (tmp_path / "loaded.shd").read_bytes() == files[name].read_bytes()
    tuner.load_state_dict({key: one for key, one in states["seed 1"].items() if not key.endswith(".draws")})
    tuner.save(tmp_path / "old.shd")
    assert "SEEDED" not in codecs(tmp_path / "old.shd").values()
    tuner.detach()
    tuner = train.reattach(model, states["seed 2"])
    tuner.save(tmp_path / "again.shd", metadata={"mask": "", "seed": ""})
    assert codecs(tmp_path / "again.shd") == codecs(files["seed 2"])


@pytest.mark.parametrize("draws", [torch.zeros(1, 2), torch.zeros(2, 2, dtype=torch.int64)])
def test_draws_that_do_not_fit_are_refused(draws: torch.Tensor):
    tuner = train.attach(llama(), 0.1, "rand", TARGETS)
    state = tuner.state_dict()
    key = next(key for key in state if key.endswith(".draws"))
    with pytest.raises(DeltaError, match="does not fit"):
        tuner.load_state_dict({**state, key: draws})


@pytest.mark.parametrize("row", [[0, 1], [7, 103], [-1, -1], [0, -1], [5, 1 << 40]])
def test_draws_of_other_positions_are_refused_before_training_and_not_when_it_is_saved(row: list[int], tmp_path: Path):
    tuner = train.attach(llama(), 0.1, "rand", TARGETS)
    fill(tuner)
    state = tuner.state_dict()
    last = [key for key in state if key.endswith(".draws")][-1]
    with pytest.raises(DeltaError, match=r"of '.*' is damaged: position \d+ or one after it is not of"):
        tuner.load_state_dict({**state, last: torch.tensor([row])})
    tuner.save(tmp_path / "as_before.shd")
    assert set(codecs(tmp_path / "as_before.shd").values()) == {"SEEDED"}


def test_a_draw_of_a_tensor_that_a_weight_has_in_part_is_refused():
    model = made(nomic)
    tuner = train.attach(model, 0.05, "rand", targets=[name for name, one in model.named_parameters() if one.dim() > 1])
    name, views = next((name, some) for name, some in tuner.views.items() if not all(view.is_whole for view in some))
    state = {**tuner.state_dict(), f"{name}.draws": torch.ones(len(views), 2, dtype=torch.int64)}
    with pytest.raises(DeltaError, match="lies in the weight in part only"):
        tuner.load_state_dict(state)


def test_a_copied_model_and_a_second_training_know_the_draw(tmp_path: Path):
    model = llama()
    tuner = train.attach(model, 0.1, "rand", TARGETS)
    fill(tuner)
    tuner.save(tmp_path / "one.shd")
    copied = copy.deepcopy(model)
    copied.__dict__["_shiradelta"].save(tmp_path / "copied.shd")
    assert (tmp_path / "copied.shd").read_bytes() == (tmp_path / "one.shd").read_bytes()
    tuner.detach()
    again = train.attach(model, targets=TARGETS, start=tmp_path / "one.shd")
    again.save(tmp_path / "again.shd")
    assert codecs(tmp_path / "again.shd") == codecs(tmp_path / "one.shd")


@pytest.mark.parametrize("make", [mixtral, nomic])
def test_weights_in_other_forms_than_the_checkpoints(make: Callable[[], Any], tmp_path: Path):
    """A tensor that lies in one weight as a whole has a draw of its own; one in parts has none."""
    model = made(make)
    matrices = [name for name, weight in model.named_parameters() if weight.dim() > 1]
    tuner = train.attach(model, 0.05, "rand", targets=matrices)
    fill(tuner)
    tuner.save(tmp_path / "task.shd", "f32")
    views = {view.name: view for some in tuner.views.values() for view in some}
    shared = [view.name for some in tuner.views.values() for view in some]
    found = codecs(tmp_path / "task.shd")
    assert "SEEDED" in found.values()
    for name, codec in found.items():
        whole = views[name].is_whole
        assert whole == (shared.count(name) == 1)
        assert (codec == "SEEDED") == whole or sd.open_delta(tmp_path / "task.shd")[name].nnz < 10
    assert sd.open_delta(tmp_path / "task.shd").digest == digest_without_draws(tuner, tmp_path / "plain.shd", "f32")
