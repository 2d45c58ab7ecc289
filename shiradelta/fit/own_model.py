"""Restores a user's own model after a fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from shiradelta.fit.fitted import FitJob
from shiradelta.models.names import find_names


@contextmanager
def restored(job: FitJob) -> Iterator[None]:
    """Restores train/eval modes, requires_grad and any overwritten weights of a model that the user gave."""
    model = job.fit.model
    if model is None:
        yield
        return
    names = dict(model.named_parameters(remove_duplicate=False))
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in names.values()]
    exact = find_names({name: delta.shape for name, delta in job.exact}, dict.fromkeys(names)).names
    overwritten = {names[own] for own in exact.values()}
    kept = [(parameter, parameter.detach().clone()) for parameter in overwritten]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        with torch.no_grad():
            for parameter, before in kept:
                parameter.copy_(before)
