"""Small facts about layers and dtypes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from shiradelta.errors import SourceError
from shiradelta.format import registry
from shiradelta.models.dtypes import TORCH_DTYPES, torch_dtype
from shiradelta.models.layers import is_conv1d


@pytest.mark.parametrize(
    ("layer", "found"), [(Conv1D(4, 3), True), (Conv1D, True), (nn.Linear(3, 4), False), (nn.Conv1d, False)], ids=str
)
def test_only_gpt2s_layer_is_a_conv1d(layer: nn.Module | type[nn.Module], found: bool):
    assert is_conv1d(layer) is found


@pytest.mark.parametrize("name", registry.ADD_DTYPES)
def test_every_dtype_to_which_deltas_are_added_is_torchs(name: str):
    assert str(torch_dtype(name)) == f"torch.{name}"
    assert torch_dtype(name) is TORCH_DTYPES[name]


def test_other_dtypes_are_refused_by_name():
    assert torch_dtype("unspecified") is torch.float32
    with pytest.raises(SourceError, match=r"float8_e4m3fn; take a model in float32, float16, bfloat16"):
        torch_dtype("float8_e4m3fn")
