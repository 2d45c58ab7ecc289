"""The model of a fit: loaded, or the user's own; and the devices that it is on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from shiradelta.errors import ArgumentError
from shiradelta.fit.choices import MASKS, METHODS
from shiradelta.fit.fitted import FitJob
from shiradelta.models import loading
from shiradelta.models.checkpoint import open_checkpoint
from shiradelta.models.placement import devices_of, layers_by_device, main_device, named, pick_devices
from shiradelta.nonzeros.vector import BYTES


def model_of(job: FitJob) -> tuple[nn.Module, list[torch.device]]:
    """(the base, in evaluation mode and without gradients; its devices).

    Raises:
        ArgumentError: a device cannot be used, or is not where the user's own model is.
        SourceError: the model cannot be loaded or spread.
    """
    if job.fit.model is not None:
        model, devices = _own(job.fit.model, job.fit.device)
    else:
        stored = [target.dtype for target in job.targets]
        devices = pick_devices(job.fit.device, lambda device: _need(job, loading.pick_dtype(device, stored)))
        dtype = loading.pick_dtype(main_device(devices), stored)
        model = loading.load_model(job.base, job.source, devices, dtype)
        if len(devices) > 1:
            job.fit.log(f"layers of the model: {layers_by_device(model)}")
    return model.eval().requires_grad_(False), devices


def _own(model: nn.Module, device: str | Sequence[str] | None) -> tuple[nn.Module, list[torch.device]]:
    """The user's model, on the device that is asked for; one that is spread already stays as it is."""
    devices = devices_of(model)
    if len(devices) > 1:
        if device is not None:
            raise ArgumentError(f"the model is on {named(devices)} already; leave the device out", argument="device")
        return model, devices
    devices = pick_devices(device, lambda where: 0)
    if len(devices) > 1:
        raise ArgumentError(
            "a model of your own is not spread; load it with device_map, or name one device", argument="device"
        )
    return model.to(devices[0]), devices


def _need(job: FitJob, dtype: torch.dtype) -> float:
    """Bytes that a fit takes at most beside activations and gradients: for the base, other models, and nonzeros.

    Which tensors other models have as the base has them is not known yet.
    """
    weights = sum(slot.numel for slot in open_checkpoint(job.base).values())
    others = job.targets if job.old is None else (*job.old.tuned, *job.old.base)
    tuned = sum(math.prod(target.shape) for target in others)
    kept = sum(target.count for target in job.targets)
    begin = MASKS.find(job.fit.mask or "prune").begin if METHODS.find(job.fit.method).trains else 1
    return (weights + tuned) * dtype.itemsize + begin * kept * BYTES
