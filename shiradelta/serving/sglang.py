"""HotSwap in the workers of SGLang: a function for `--custom-weight-loader`.

SGLang imports this module itself, and calls `swap` in each worker.  Nothing of SGLang is imported here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shiradelta.errors import ArgumentError
from shiradelta.serving.session import ServedWeights, SwapRequest, known_fields, served, synchronize

#: What `load_format=` and `--custom-weight-loader` call the function.
LOADER = "shiradelta.serving.sglang.swap"
#: The tensor that has the request; all others are files.
REQUEST = "request"
#: The attribute of the model that has its session.
_SESSION = "_shiradelta_weights"


def swap(model: Any, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Does what a request says, in all workers or in none; it is done when this returns.

    Args:
        model: the model of this worker.
        named_tensors: what `request_tensors` gives, on any device.

    Raises:
        ArgumentError: the tensors are no request, or the model's checkpoint is not known.
        ShiraDeltaError: as `ServedWeights.do`.  Nothing has changed.
    """
    files: dict[str, bytes] = {}
    for name, tensor in named_tensors:
        _check_free(name, files)
        files[name] = _bytes(name, tensor)
    if REQUEST not in files:
        raise ArgumentError(f"no tensor {REQUEST!r} is there; send what request_tensors gives, and nothing else")
    request = _object(files.pop(REQUEST))
    checkpoint = request.pop("checkpoint", None)
    wanted = SwapRequest(**request)
    wanted.check()
    for name in files:
        _check_free(name, wanted.data)
    wanted = replace(wanted, data={**wanted.data, **files})
    device = next((tensor.device for tensor in model.parameters()), "cpu")
    synchronize(device)  # a batch may be on its way on another stream
    _weights(model, checkpoint).do(wanted)
    synchronize(device)


def request_tensors(
    request: Mapping[str, Any], files: Mapping[str, str | Path] | None = None
) -> list[tuple[str, Tensor]]:
    """The tensors to give `update_weights_from_tensor`, with `load_format=LOADER`.

    Args:
        request: the fields of a `SwapRequest`; and `checkpoint`, the folder that the model was loaded from, which only
            the first request needs.
        files: name of an adapter -> path of its `.shd` file here, for workers that cannot read it.

    Returns:
        Names and uint8 tensors, on the CPU.

    Raises:
        ArgumentError: a field is unknown, or an adapter is called as the request's tensor.
    """
    files = files or {}
    if REQUEST in files:
        raise ArgumentError(f"an adapter cannot be called {REQUEST!r} here; take another name")
    text = json.dumps(dict(request)).encode()
    _object(text)
    return [(REQUEST, _tensor(text)), *((name, _tensor(Path(path).read_bytes())) for name, path in files.items())]


def _weights(model: Any, checkpoint: str | None) -> ServedWeights:
    """The session of a model; the first request makes it."""
    weights: ServedWeights | None = getattr(model, _SESSION, None)
    if weights is None:
        checkpoint = checkpoint or getattr(getattr(model, "config", None), "_name_or_path", None)
        if not checkpoint:
            raise ArgumentError("the model does not tell its checkpoint; give the request's field 'checkpoint'")
        weights = served(model, checkpoint)
        setattr(model, _SESSION, weights)
    return weights


def _object(text: bytes) -> dict[str, Any]:
    """A request's fields."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ArgumentError(f"tensor {REQUEST!r} is no JSON ({error}); send what request_tensors gives") from None
    return known_fields(found, "checkpoint")


def _check_free(name: str, others: Mapping[str, object]) -> None:
    if name in others:
        raise ArgumentError(f"{name!r} is given twice; give each file a name of its own")


def _bytes(name: str, tensor: Tensor) -> bytes:
    if tensor.dtype != torch.uint8 or tensor.dim() != 1:
        shape = ", ".join(map(str, tensor.shape))
        raise ArgumentError(
            f"tensor {name!r} is {str(tensor.dtype)[6:]} [{shape}], not bytes; send what request_tensors gives"
        )
    return tensor.cpu().numpy().tobytes()


def _tensor(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())
