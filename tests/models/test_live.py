"""Live tensors: every kind that cannot be written is refused under its own name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.utils.parametrizations
from torch.nn.utils import prune

from shiradelta.models.live import live_tensors
from shiradelta.models.refusals import RefusalKind

READ_ONLY = np.zeros(4, np.float32)
READ_ONLY.flags.writeable = False


class Packed(torch.Tensor):
    """A tensor of a kind that the package does not know."""


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (READ_ONLY, RefusalKind.READ_ONLY),
        (np.zeros(4, ">f4"), RefusalKind.BYTE_ORDER),
        (torch.zeros(4).as_subclass(Packed), RefusalKind.QUANTISED),
        (torch.zeros(4, device="meta"), RefusalKind.META),
        (torch.eye(4).to_sparse(), RefusalKind.LAYOUT),
        (torch.zeros(1).expand(4), RefusalKind.EXPANDED),
        (torch.zeros(4), None),
        (np.zeros(4, np.float32), None),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_refusals_have_a_kind_and_a_remedy(tensor: Any, kind: RefusalKind | None):
    refusal = live_tensors({"w": tensor})["w"].refusal
    assert (refusal.kind if refusal else None) is kind
    if refusal:
        what, _, remedy = str(refusal).partition("; ")
        assert (what, remedy) == (refusal.what, refusal.remedy)


def parametrized() -> torch.nn.Module:
    layer = torch.nn.Linear(4, 4)
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", torch.nn.Identity())
    return layer


def quantised(layer: torch.nn.Module) -> torch.nn.Module:
    return torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(layer), {type(layer)})[0]


def packed() -> torch.nn.Module:
    layer = torch.nn.Module()
    layer.register_buffer("qweight", torch.zeros(2, 2, dtype=torch.int32))
    return layer


#: What holds a weight in another form -> (a layer, the weight's name, kind).
UNSTORED: dict[str, tuple[Callable[[], torch.nn.Module], str, RefusalKind]] = {
    "parametrization": (parametrized, "weight", RefusalKind.COMPUTED),
    "parametrized weight norm": (
        lambda: torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 4)),
        "weight",
        RefusalKind.COMPUTED,
    ),
    "weight norm": (lambda: torch.nn.utils.weight_norm(torch.nn.Linear(4, 4)), "weight", RefusalKind.COMPUTED),
    "spectral norm": (lambda: torch.nn.utils.spectral_norm(torch.nn.Linear(4, 4)), "weight", RefusalKind.COMPUTED),
    "pruning": (
        lambda: prune.random_unstructured(torch.nn.Linear(4, 4), "weight", 0.5),
        "weight",
        RefusalKind.COMPUTED,
    ),
    "quantised": (lambda: quantised(torch.nn.Linear(4, 4)), "weight", RefusalKind.QUANTISED),
    "quantised bias": (lambda: quantised(torch.nn.Linear(4, 4)), "bias", RefusalKind.QUANTISED),
    "quantised recurrent": (lambda: quantised(torch.nn.LSTM(4, 4)), "weight_ih_l0", RefusalKind.QUANTISED),
    "GPTQ": (packed, "weight", RefusalKind.QUANTISED),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning", "ignore::DeprecationWarning", "ignore:.*quantiz")
@pytest.mark.parametrize("case", UNSTORED)
def test_weights_that_a_layer_does_not_store_are_refused_by_name(case: str):
    layer, name, kind = UNSTORED[case]
    for model, prefix in ((torch.nn.Sequential(layer()), "0."), ({"unet": torch.nn.Sequential(layer())}, "unet/0.")):
        refusal = live_tensors(model)[prefix + name].refusal
        assert refusal is not None
        assert refusal.kind is kind
