"""Whether a delta fits the base of a folder, or is a successor of the deltas on it (spec/FORMAT.md, 6.4)."""

from __future__ import annotations

from shiradelta.backends.choose import choose
from shiradelta.errors import BaseMismatchError, DeltaError
from shiradelta.format.arithmetic import Array, Positions
from shiradelta.format.delta import TensorDelta
from shiradelta.models.compatibility import Remedies, check_fingerprint

_REMEDIES = Remedies("it has been applied before", "--no-check to apply it to this one")


class StackFit:
    """Tells, tensor by tensor, what a delta was made for: the base, or the present weights.

    Args:
        label: the delta's name, for messages.
        strength: alpha.
        stacked: whether there are deltas on the folder; otherwise base and present are the same.
    """

    def __init__(self, label: str, strength: float, stacked: bool) -> None:
        self._label, self._strength, self._stacked = label, strength, stacked
        self._misses_base: str | None = None
        self._misses_present: str | None = None

    @property
    def is_successor(self) -> bool:
        """Whether it fits the present weights only."""
        return self._misses_base is not None

    def check(self, name: str, tensor: TensorDelta, positions: Positions, base: Array, present: Array) -> None:
        """Compares one tensor's elements with the fingerprint in the delta.

        Args:
            name: the tensor's name.
            tensor: its delta.
            positions: of the elements.
            base: the base's elements.
            present: the present ones.

        Raises:
            BaseMismatchError: the delta fits neither.
            DeltaError: it is a successor, and its strength is not 1.
        """
        wanted, fingerprint = tensor.base_fingerprint, choose().fingerprint
        where = f"{self._label}: tensor {name!r}"
        found = fingerprint(positions, base)
        if not self._stacked:
            check_fingerprint(where, found, wanted, tensor.result_fingerprint, _REMEDIES)
        if not self._stacked or wanted is None:
            return
        now = fingerprint(positions, present)
        if found != wanted:
            self._misses_base = self._misses_base or name
        if now != wanted:
            self._misses_present = self._misses_present or name
        if self._misses_base is not None and self._misses_present is not None:
            if found == tensor.result_fingerprint or now == tensor.result_fingerprint:
                raise BaseMismatchError(f"{where} already holds the result; {_REMEDIES.result}")
            raise BaseMismatchError(
                f"{self._label} was made for other weights: tensor {self._misses_base!r} is not the base's, and tensor"
                f" {self._misses_present!r} is not what the deltas on the folder give; revert those that do not belong"
                f" under it, or {_REMEDIES.other}"
            )
        if self._misses_base is not None and self._strength != 1:
            raise DeltaError(
                f"{where} was made for what the deltas on the folder give, and so has strength 1 only; leave --strength"
                " at 1"
            )
