"""The layout of sparse new values: NAME.indices [nnz], flat, and NAME.values [nnz], the new elements.

The exporter writes it and the converter reads it, so what both know is here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from shiradelta.errors import SourceError
from shiradelta.format.registry import MAX_RANK
from shiradelta.models.names import Shape

INDICES, VALUES = ".indices", ".values"
_LAYOUT = "sparse-values"


def metadata_of(shapes: Mapping[str, Shape]) -> dict[str, str]:
    """The metadata of a file: the layout's name, and the tensors' shapes."""
    return {
        "format": "pt",
        "layout": _LAYOUT,
        "shapes": json.dumps({name: list(shape) for name, shape in shapes.items()}),
    }


def is_sparse(metadata: Mapping[str, str]) -> bool:
    """Whether a file's metadata say that it has this layout."""
    return metadata.get("layout") == _LAYOUT


def shapes_in(metadata: Mapping[str, str], where: object) -> dict[str, Shape]:
    """The tensors' shapes; empty where the file does not say them.

    Args:
        metadata: the file's.
        where: the file, for messages.

    Raises:
        SourceError: what it says are no shapes.
    """
    try:
        found = json.loads(metadata.get("shapes", "{}"))
        shapes = {name: tuple(shape) for name, shape in found.items()}
        if not all(
            len(shape) <= MAX_RANK and all(type(size) is int and size >= 0 for size in shape)
            for shape in shapes.values()
        ):
            raise ValueError
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise SourceError(f"{where}: its metadata have no shapes of tensors under 'shapes'; get it again") from None
    return shapes
