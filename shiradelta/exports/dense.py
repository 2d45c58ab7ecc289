"""Exports to dense differences: a safetensors file with NAME -> the change of NAME, float32."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from shiradelta.errors import DeltaError
from shiradelta.format.delta import TensorDelta
from shiradelta.format.registry import DTYPE_OF_NAME
from shiradelta.models.safetensors import Unwritten, write_tensors
from shiradelta.util.files import replacing
from shiradelta.util.progress import Progress

from .layouts import export
from .target import check_file


@export(
    "dense", "Dense differences: a safetensors file with the change of each tensor, float32.", options=("progress",)
)
def write(
    path: str | os.PathLike[str],
    deltas: Mapping[str, TensorDelta],
    base: str = "",
    *,
    progress: Progress | None = None,
) -> None:
    """Writes dense differences, which `convert --kind diff` reads.

    Args:
        path: the file.
        deltas: name of the weight -> its delta.
        base: ignored.
        progress: called with (tensor, done, total).

    Raises:
        DeltaError: a delta is not an addition.
        TargetError: the file cannot be written.
    """
    for name, delta in deltas.items():
        if not delta.operation.adds:
            raise DeltaError(f"tensor {name!r} is {delta.op}, which is no difference; use the layout merged")
    check_file(Path(path))
    dtype = DTYPE_OF_NAME["float32"]
    tensors = [Unwritten(name, delta.shape, dtype, delta.to_dense) for name, delta in deltas.items()]
    with replacing(Path(path)) as stream:
        write_tensors(stream, tensors, {"format": "pt"}, progress)
