"""The content digest of a delta, which does not depend on its encoding (spec/FORMAT.md, section 7)."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from itertools import chain
from typing import TYPE_CHECKING

from shiradelta.format import registry
from shiradelta.format.arithmetic import Array
from shiradelta.format.delta import TensorDelta
from shiradelta.format.operations import Operation

if TYPE_CHECKING:
    from hashlib import _Hash


class TensorDigest:
    """T of one tensor, of whose parts each is given once: first all positions, then all bits."""

    def __init__(self, operation: Operation, dtype: registry.DType, shape: tuple[int, ...], nnz: int) -> None:
        self._digest = _sha256(struct.pack(f"<BBB{len(shape)}QQ", operation.id, dtype.id, len(shape), *shape, nnz))

    def update(self, part: Array) -> None:
        """Adds positions or bits."""
        self._digest.update(part.astype(part.dtype.newbyteorder("<"), copy=False).data)

    def digest(self) -> bytes:
        """32 bytes."""
        return self._digest.digest()


def tensor_digest(tensor: TensorDelta) -> bytes:
    """T of one tensor, 32 bytes."""
    digest = TensorDigest(tensor.operation, registry.DTYPE_OF_NAME[tensor.dtype], tensor.shape, tensor.nnz)
    for part in chain(tensor.position_windows(), tensor.bits_windows()):
        digest.update(part)
    return digest.digest()


def content_digest(tensors: Iterable[tuple[str, bytes]]) -> bytes:
    """The digest of (name, T) pairs, which are in byte order of the names."""
    pairs = [(name.encode(), digest) for name, digest in tensors]
    whole = _sha256(registry.DIGEST_SEED + struct.pack("<I", len(pairs)))
    for name, digest in pairs:
        whole.update(struct.pack("<H", len(name)) + name + digest)
    return whole.digest()


def _sha256(start: bytes) -> _Hash:
    import hashlib  # loads OpenSSL, which whoever only lists a file does not need

    return hashlib.sha256(start)
