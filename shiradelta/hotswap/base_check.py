"""Checks that the weights of a live model are the base that a delta was made against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shiradelta.format.arithmetic import Array, Positions
from shiradelta.format.record import Record
from shiradelta.hotswap.layers import Held, Layer, stacks_of
from shiradelta.hotswap.protocol import Fit, LiveBackend
from shiradelta.hotswap.transcode import Change, base_fingerprint
from shiradelta.models.compatibility import Remedies, check_fingerprint
from shiradelta.models.live import Target

_REMEDIES = Remedies("give the base, without the delta in it", "check=False to use it with this one")


def checkable(held: Mapping[LiveBackend, Held], parts: Sequence[Fit]) -> set[Target]:
    """The tensors whose fingerprint can be compared; arguments are those of `check_base`."""
    patches = {
        patch.target for one in held.values() for patch in one.patches if _is_checkable(patch.record, patch.dtype)
    }
    return patches | {target for tensor, target, dtype in parts if _is_checkable(tensor.record, dtype)}


def check_base(
    label: str,
    held: Mapping[LiveBackend, Held],
    parts: Sequence[Fit],
    layers: Mapping[LiveBackend, Sequence[Layer]],
) -> None:
    """Compares fingerprints with those in the file.

    Args:
        label: the file, for messages.
        held: the file's deltas.
        parts: its deltas of tensors that are in parts; `held` has them for each weight.
        layers: what is on the weights now.

    Raises:
        BaseMismatchError: a fingerprint differs.
    """
    for backend, one in held.items():
        mine = [(i, patch.record) for i, patch in enumerate(one.patches) if _is_checkable(patch.record, patch.dtype)]
        if mine:
            found = backend.fingerprints(one, layers.get(backend, []))
            for number, record in mine:
                _compare(label, record, found[number])
    patches = {
        (patch.target, patch.record.operation.name): (backend, patch)
        for backend, one in held.items()
        for patch in one.patches
    }
    stacks = {backend: stacks_of(layers.get(backend, [])) for backend in held}
    base: dict[Change, tuple[Positions, Array]] = {}
    for tensor, target, dtype in parts:
        if not _is_checkable(tensor.record, dtype):
            continue
        before, base = base, {}  # what the last tensor needed may be needed again, the rest is not
        for weight, _ in target.parts:
            change = weight, tensor.op
            backend, patch = patches[change]
            base[change] = before[change] if change in before else backend.base(patch, stacks[backend].get(weight, []))
        _compare(label, tensor.record, base_fingerprint(tensor, target, base))


def _is_checkable(record: Record, dtype: str) -> bool:
    """Whether a file has a fingerprint for elements of this dtype."""
    return record.base_fingerprint is not None and record.dtype.name == dtype


def _compare(label: str, record: Record, found: int) -> None:
    fingerprints = found, record.base_fingerprint, record.result_fingerprint
    check_fingerprint(f"{label}: tensor {record.name!r}", *fingerprints, _REMEDIES)
