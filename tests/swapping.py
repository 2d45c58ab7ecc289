"""What the tests of hot-swapping share: adapters, and the formula computed without the package's arithmetic."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import shiradelta as sd
from shiradelta.hotswap.choose import LIVE_BACKENDS, DeviceBackend

GPU = os.environ.get("TRITON_INTERPRET") == "0" and torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


def why_not(row: DeviceBackend) -> str | None:
    """Why a backend cannot be tested here."""
    if not row.works_on(DEVICE):
        return f"the weights are on {DEVICE}"
    try:
        row.check()
    except sd.ShiraDeltaError as error:
        return str(error)
    return None


BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(why_not(row) is not None, reason=why_not(row) or "works"))
    for name, row in LIVE_BACKENDS.items()
]
#: For tests of many switches: without a GPU, Triton's interpreter takes seconds for them.
BACKENDS_IN_TIME = [
    pytest.param(
        *backend.values, marks=[*backend.marks, *([pytest.mark.slow] if backend.values == ("triton",) else [])]
    )
    for backend in BACKENDS
]
DTYPES = ["float32", "float16", "bfloat16"]
_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
QUIET = {"float32": 0x7FC00000, "bfloat16": 0x7FC0, "float16": 0x7E00}


def bits(tensor: Any) -> np.ndarray:
    """Elements' bits, flat, copied."""
    if isinstance(tensor, np.ndarray):
        return np.ascontiguousarray(tensor).reshape(-1).view(f"u{tensor.itemsize}").copy()
    flat = tensor.detach().contiguous().view(_INTEGER[tensor.element_size()]).cpu().numpy()
    return flat.reshape(-1).view(f"u{tensor.element_size()}").copy()


def weights(shape: tuple[int, ...], dtype: str, seed: int = 0, special: bool = False) -> torch.Tensor:
    """Random weights; `special` puts NaNs with payloads, infinities, denormals and zeros of both signs among them."""
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(shape, generator=generator).to(getattr(torch, dtype))
    if special:
        size = tensor.element_size()
        integer = tensor.view(_INTEGER[size]).view(-1)
        inf = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00}[dtype]
        for i, pattern in enumerate((0, 1, 3, inf, inf - 1, inf + 1, inf + 5, QUIET[dtype])):
            sign = 1 << (8 * size - 1)
            integer[i::31] = pattern
            integer[i + 8 :: 31] = pattern - sign
    return tensor.to(DEVICE)


def adapter(tensors: Mapping[str, sd.TensorDelta], values: str = "int8", folder: Path | None = None) -> bytes:
    """The bytes of a file."""
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        path = Path(folder or temporary) / "x.shd"
        sd.save_delta(path, tensors, values=values)
        return path.read_bytes()


def random_delta(
    shape: tuple[int, ...],
    nnz: int,
    seed: int,
    dtype: str = "bfloat16",
    op: str = "add",
    base: Any = None,
    scale: float = 1,
) -> sd.TensorDelta:
    """Independent positions; a fingerprint if the base is given."""
    rng = np.random.default_rng(seed)
    positions = np.sort(rng.choice(int(np.prod(shape)), nnz, replace=False))
    if op == "set":
        size = {"float32": 4, "bool": 1, "int64": 8, "float8_e4m3fn": 1}.get(dtype, 2)
        values = rng.integers(0, 1 << (8 * size - 1), nnz).astype(f"u{size}")
    else:
        values = (rng.normal(size=nnz) * scale).astype(np.float32)
    return sd.TensorDelta(shape, positions, values, dtype, op, None if base is None else bits(base)[positions])


@lru_cache(8)
def _opened(data: bytes) -> sd.Delta:
    """Models ask for the same files tensor by tensor."""
    return sd.open_delta(data)


def formula(base: np.ndarray, dtype: str, files: list[tuple[bytes, float]], name: str = "w") -> np.ndarray:
    """FORMAT.md, 6.2, element by element, in Python; rounding is torch's."""
    opened = sorted(((_opened(data), np.float32(alpha)) for data, alpha in files), key=lambda x: x[0].digest)
    result = base.copy()
    total: dict[int, np.float32] = {}
    for delta, alpha in opened:
        if name not in delta:
            continue
        tensor = delta[name]
        if tensor.op == "set":
            result[tensor.positions()] = tensor.bits()
            continue
        with np.errstate(all="ignore"):
            for position, value in zip(tensor.positions().tolist(), tensor.values(), strict=True):
                s = alpha * value
                total[position] = total[position] + s if position in total else s
    if total:
        at = np.array(list(total))
        old = torch.from_numpy(result[at].view(f"i{result.itemsize}")).view(getattr(torch, dtype))
        new = (old.float() + torch.tensor(np.array(list(total.values())))).to(old.dtype)
        plain = bits(new)
        plain[new.isnan().numpy()] = QUIET[dtype]
        result[at] = np.where(old.isnan().numpy(), result[at], plain)
    return result


def file(data: bytes) -> BytesIO:
    """A file that can be read once."""
    return BytesIO(data)
