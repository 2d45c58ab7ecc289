"""Deltas on a model's weights: the same numbers, however the model is loaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from shiradelta.errors import SourceError
from shiradelta.fit.fitted import FitTarget
from shiradelta.fit.refit.skeleton import Skeleton
from shiradelta.fit.stored import LoadedWeights, Piece
from shiradelta.fit.tuned_weights import TunedWeights, exact_homes, write_exact
from shiradelta.format.delta import TensorDelta
from shiradelta.models.views import whole_view
from tests.fit.test_fit import write_pair


def added_once(weights: Tensor, values: Tensor) -> Tensor:
    return (weights.double() + values.double()).to(weights.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_an_exact_sum_is_rounded_once(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(4096, generator=generator).to(dtype)
    values = 0.01 * torch.randn(4096, generator=generator)
    expected, twice = added_once(weights, values), weights + values.to(dtype)
    name = str(dtype).removeprefix("torch.")
    write_exact(weights, TensorDelta((64, 64), None, values.numpy(), name))
    assert torch.equal(weights, expected)
    assert torch.equal(twice, expected) is (dtype == torch.float32)


def test_set_and_new_replace():
    weights = torch.zeros(6)
    write_exact(weights, TensorDelta((2, 3), [1, 4], np.float32([7, 8]), "float32", "set"))
    assert weights.tolist() == [0, 7, 0, 0, 8, 0]
    write_exact(weights, TensorDelta((2, 3), None, np.arange(6, dtype=np.float32), "float32", "new"))
    assert weights.tolist() == [0, 1, 2, 3, 4, 5]


def test_a_removal_is_not_written_and_another_shape_is_refused_by_name():
    weights = LoadedWeights(nn.Linear(3, 2))
    delta = TensorDelta((2, 3), [1], np.float32([7]), "float32")
    ((weight, view, found),) = exact_homes([("weight", delta), ("other", delta)], weights)
    assert (weight, view.is_same, found is delta) == ("weight", True, True)
    assert not list(exact_homes([("weight", TensorDelta((2, 3), None, [], "float32", "drop"))], weights))
    with pytest.raises(SourceError, match=r"'bias' has shape \[2\] in the model, but its change has \[2, 3\]"):
        list(exact_homes([("bias", delta)], weights))


def test_a_model_filled_layer_by_layer_has_the_same_exact_changes(tmp_path: Path):
    base, tuned = write_pair("encoder", tmp_path)
    name, values = "encoder.layer.0.output.dense.weight", 0.01 * np.random.default_rng(0).standard_normal((32, 64))
    delta = TensorDelta((32, 64), None, values.reshape(-1).astype(np.float32), "float32")
    skeleton = Skeleton(base, tuned, {name: delta}, torch.device("cpu"), torch.bfloat16)
    plain = Skeleton(base, tuned, {}, torch.device("cpu"), torch.bfloat16)
    weights, before = (each.fill(each.of_block(0))[name].data for each in (skeleton, plain))
    change = torch.from_numpy(delta.values().copy()).view(32, 64)
    assert torch.equal(weights, added_once(before, change))
    assert not torch.equal(weights, before + change.bfloat16())


def test_only_what_the_fine_tune_changed_is_fitted():
    tuned = TunedWeights()
    for name, delta in (("a", [0.0, 3, -4, 1]), ("b", [0.0] * 4)):
        rows = torch.tensor(delta)[:, None].numpy()
        weight = torch.nn.Parameter(torch.ones(4))
        target = FitTarget(name, "float32", (4,), lambda rows=rows: lambda a, b: rows[a:b], 2)
        tuned.add(name, weight, [Piece(target, whole_view(name, (4,)))])
    assert ([target.name for target in tuned.targets], tuned.changed, tuned.energy) == (["a"], [3], [26])
    (selection,) = tuned.selections(tuned.topk()).values()
    assert selection.positions.tolist() == [1, 2]
    assert selection.values.tolist() == [3, -4]
    assert tuned.tuned[tuned.weights[0]].tolist() == [1, 4, -3, 2]
