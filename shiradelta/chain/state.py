"""What a version of a model is: each tensor's fingerprint over all its elements, and one digest over them all.

A fingerprint is a sum over elements (spec/FORMAT.md, 6.3).  So a step's own fingerprints, of the listed elements before
and after it, take the whole tensor's from one version to the next without a look at the weights.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from shiradelta.errors import ChainError
from shiradelta.folder.comparison import PastBits
from shiradelta.format import registry
from shiradelta.format.delta import TensorDelta
from shiradelta.models.checkpoint import Checkpoint
from shiradelta.util.threads import map_in_threads

_SEED = b"shiradelta state 1"
_MODULUS = 1 << 64


class TensorState(NamedTuple):
    """One tensor of a version.

    Attributes:
        dtype: torch's name, such as "bfloat16".
        shape: its shape.
        fingerprint: of all its elements (FORMAT.md, 6.3).
    """

    dtype: str
    shape: tuple[int, ...]
    fingerprint: int


#: Name -> tensor.
State = Mapping[str, TensorState]


def state_digest(state: State) -> str:
    """The digest of a version, 64 hexadecimal digits (CHAIN.md, 3)."""
    whole = hashlib.sha256(_SEED + struct.pack("<I", len(state)))
    for name, tensor in sorted(state.items(), key=lambda item: item[0].encode()):
        key, dtype = name.encode(), registry.DTYPE_OF_NAME[tensor.dtype].id
        whole.update(struct.pack("<H", len(key)) + key)
        shape = tensor.shape
        whole.update(struct.pack(f"<BB{len(shape)}QQ", dtype, len(shape), *shape, tensor.fingerprint))
    return whole.hexdigest()


def state_of(checkpoint: Checkpoint) -> dict[str, TensorState]:
    """The state of a model on disk; reads all of it."""

    def of(name: str) -> TensorState:
        slot = checkpoint[name]
        return TensorState(slot.dtype.name, slot.shape, PastBits(slot).fingerprint())

    names = list(checkpoint)
    return dict(zip(names, map_in_threads(of, names), strict=True))


def advanced(state: State, step: Iterable[tuple[str, TensorDelta]], label: str) -> dict[str, TensorState]:
    """The state after a step, from the fingerprints in its file.

    Args:
        state: that before it.
        step: (name, delta of one tensor).
        label: the step, for messages.

    Raises:
        ChainError: the step does not fit the state, or has no fingerprints.
    """
    found = dict(state)
    for name, tensor in step:
        before = found.get(name)
        operation = tensor.operation
        if not operation.in_base:
            if before is not None:
                raise ChainError("wrong_base", label, f"tensor {name!r} is to be added, and is there already")
            found[name] = _created(tensor, label, name)
            continue
        base = known(tensor.base_fingerprint, label, name)
        if before is None:
            raise ChainError("wrong_base", label, f"there is no tensor {name!r}")
        if not operation.replaces and (before.dtype, before.shape) != (tensor.dtype, tensor.shape):
            raise ChainError(
                "wrong_base",
                label,
                f"tensor {name!r} is {before.dtype} {list(before.shape)}, and in the step {tensor.dtype}"
                f" {list(tensor.shape)}",
            )
        if operation.removes:
            if base != before.fingerprint:
                raise ChainError("wrong_base", label, f"tensor {name!r}, which is to be removed, has other elements")
            del found[name]
            if operation.creates:
                found[name] = _created(tensor, label, name)
            continue
        after = (before.fingerprint - base + known(tensor.result_fingerprint, label, name)) % _MODULUS
        found[name] = before._replace(fingerprint=after)
    return found


def _created(tensor: TensorDelta, label: str, name: str) -> TensorState:
    return TensorState(tensor.dtype, tensor.shape, known(tensor.result_fingerprint, label, name))


def known(fingerprint: int | None, label: str, name: str) -> int:
    """A fingerprint that a step has to have.

    Raises:
        ChainError: it has none.
    """
    if fingerprint is None:
        raise ChainError("no_fingerprint", label, f"tensor {name!r}")
    return fingerprint
