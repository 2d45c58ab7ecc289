"""Restores a user's own model after a fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from shiradelta.fit.fitted import FitJob
from shiradelta.fit.stored import LoadedWeights, make_contiguous
from shiradelta.fit.tuned_weights import exact_homes


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
    spread = [(weight, weight.data) for weight in (*names.values(), *model.buffers()) if not weight.is_contiguous()]
    kept: dict[Tensor, Tensor] = {}
    try:
        make_contiguous(model)
        if job.exact:
            weights = LoadedWeights(model)
            overwritten = {weights.by_name[name] for name, _, _ in exact_homes(job.exact, weights)}
            kept = {weight: weight.detach().clone() for weight in overwritten}
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for weight, before in spread:
            weight.data = before.to(weight.device)
        with torch.no_grad():
            for weight, before in kept.items():
                weight.copy_(before)
