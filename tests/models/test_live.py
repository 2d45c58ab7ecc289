"""Live tensors: every kind that cannot be written is refused under its own name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from shiradelta.models.live import RefusalKind, live_tensors

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
