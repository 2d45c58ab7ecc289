"""A fit of a model that is spread over devices gives what it gives on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shiradelta.errors import SourceError
from shiradelta.fit import tuned_weights
from shiradelta.fit.tuned_weights import TunedWeights
from shiradelta.nonzeros import vector
from shiradelta.nonzeros.vector import Nonzeros
from tests.fit.test_fit import FEW, encoder, fit  # noqa: F401
from tests.fit.test_stored import expert


@pytest.fixture
def a_vector_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no two weights in a row were on one device."""
    for module in (vector, tuned_weights):
        monkeypatch.setattr(module, "same_device", lambda weights: [slice(i, i + 1) for i in range(len(weights))])


@pytest.mark.parametrize(
    "settings",
    [{"mask": "prune"}, {"mask": "prune", "scope": "model"}, {"mask": "refit"}, {"method": "refit"}],
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
