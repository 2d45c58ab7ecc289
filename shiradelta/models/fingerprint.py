"""The base has to be the one that a delta was made against."""

from __future__ import annotations

from typing import NamedTuple

from shiradelta.errors import BaseMismatchError


class Remedies(NamedTuple):
    """What a user does where fingerprints differ: on the result, and on any other tensor."""

    result: str
    other: str


def check_fingerprint(where: str, found: int, base: int | None, result: int | None, remedies: Remedies) -> None:
    """Compares fingerprints at a delta's positions (FORMAT.md, 6.3).

    Args:
        where: delta and tensor, for people.
        found: that of the tensor as it is.
        base: that of the base, as the file has it; None if it has none.
        result: that of the result, likewise.
        remedies: what to do if they differ.

    Raises:
        BaseMismatchError: they do.
    """
    if base is None or found == base:
        return
    if found == result:
        raise BaseMismatchError(f"{where} already holds the result; {remedies.result}")
    raise BaseMismatchError(
        f"{where} is not the one that the delta was made against (fingerprint {found:016x} instead of {base:016x});"
        f" give the right base, or {remedies.other}"
    )
