"""Rows of queries and keys: transformers has the two halves of each head's rotation below each other, Meta in turn."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from shiradelta.errors import SourceError
from shiradelta.format.arithmetic import Array
from shiradelta.models.checkpoint import Checkpoint
from shiradelta.models.safetensors import Slot

from .translated import arranged


def heads(base: Checkpoint | None, source: object) -> tuple[int, int, Mapping[str, Any]]:
    """(query heads, key heads, the base's configuration).

    Raises:
        SourceError: there is no base, or it does not say them.
    """
    if base is None:
        why = "has queries and keys in another order than the base, whose heads are in its config.json"
        raise SourceError(f"{source}: {why}; give --base MODEL")
    about: Mapping[str, Any] = next((base.config(name) for name in base), {})
    queries, keys = about.get("num_attention_heads"), about.get("num_key_value_heads")
    keys = queries if keys is None else keys
    if not all(type(number) is int and 0 < number < 1 << 31 for number in (queries, keys)):
        raise SourceError(f"{base.root}: has no config.json with num_attention_heads beside its weights; put it there")
    assert isinstance(queries, int)
    assert isinstance(keys, int)
    return queries, keys, about


def halves_below_each_other(slot: Slot, count: int, source: object) -> Slot:
    """Rows of a matrix or vector of Meta's order in that of transformers.

    Raises:
        SourceError: they are not those of so many heads.
    """
    if not slot.shape or slot.shape[0] % (2 * count):
        raise SourceError(
            f"{source}: {slot.name!r} has shape {list(slot.shape)}, which is none of {count} heads; give the right base"
        )
    return arranged(slot, partial(_rows, count))


def _rows(count: int, matrix: Array) -> Array:
    apart = matrix.reshape(count, matrix.shape[0] // count // 2, 2, *matrix.shape[1:])
    found: Array = apart.swapaxes(1, 2).reshape(matrix.shape)
    return found
