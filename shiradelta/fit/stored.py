"""Where a loaded model has the tensors of its files.

transformers renames, stacks, splits and transposes tensors on loading.  A fit changes the weights in memory; its file
holds the tensors of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor, nn

from shiradelta.errors import SourceError
from shiradelta.fit.fitted import FitTarget
from shiradelta.models.library import Library
from shiradelta.models.names import Shape, find_names
from shiradelta.models.views import View, whole_view
from shiradelta.select.topk import Rows, row_shape


@dataclass(frozen=True)
class Piece:
    """Elements that a tensor to fit shares with a weight in memory."""

    target: FitTarget
    view: View


@dataclass
class Homes:
    """Where tensors of the files are in memory.

    Attributes:
        found: name in the files -> (first name of a weight, the elements that the two share).
        missing: name in the files -> why there are none, to follow "because".
    """

    found: dict[str, list[tuple[str, View]]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


class LoadedWeights:
    """The weights of a model in memory, which are found by the names of its files.

    Args:
        model: a torch module.

    Attributes:
        by_name: name -> parameter, or buffer of floating-point numbers; tied ones have several names.
    """

    def __init__(self, model: nn.Module) -> None:
        self.by_name: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        buffers = model.named_buffers(remove_duplicate=False)
        self.by_name |= {name: buffer for name, buffer in buffers if buffer.is_floating_point()}
        self._library = Library.of_model(model)

    def find(self, wanted: Mapping[str, Shape]) -> Homes:
        """Finds tensors, by names as in the files -> their shapes: those of the checkpoint first, then those in memory.

        Raises:
            SourceError: the model has a tensor in another shape.
        """
        library, homes = self._library, Homes()
        other = {name: shape for name, shape in wanted.items() if name in library.saved or name not in library.shapes}
        saved = find_names(other, library.saved_shapes)
        searched = {*saved.names, *saved.unclear}
        own = find_names({name: shape for name, shape in wanted.items() if name not in searched}, library.shapes)
        for name, shape in wanted.items():
            if name in saved.names:
                tensor = library.saved[saved.names[name]]
                turned = tensor.turned
                parts = turned.parts if turned is not None and turned.shape == shape else tensor.parts
            elif name in own.names:
                parts = ((own.names[name], whole_view(own.names[name], library.shapes[own.names[name]])),)
            else:
                unclear = saved.unclear.get(name) or own.unclear.get(name)
                homes.missing[name] = unclear or "the loaded model has none of that name"
                continue
            if parts is None or any(weight not in self.by_name for weight, _ in parts):
                homes.missing[name] = "the loaded model computes others from it"
                continue
            if parts[0][1].shape != shape:
                raise wrong_shape(name, parts[0][1].shape, shape)
            homes.found[name] = [(library.first[weight], view) for weight, view in parts]
        return homes


def group(targets: Sequence[FitTarget], homes: Homes) -> tuple[dict[str, list[Piece]], dict[str, str]]:
    """Groups targets by the weights that hold their elements.

    Args:
        targets: the tensors to fit; those that are missing in memory are left out.
        homes: where they are.

    Returns:
        (a weight's first name -> its pieces, targets that are the same in memory as an earlier one -> that one's name).
    """
    pieces: dict[str, list[Piece]] = {}
    tied: dict[str, str] = {}
    first: dict[object, str] = {}
    for target in targets:
        if target.name not in homes.found:
            continue
        home = homes.found[target.name]
        same = first.setdefault(frozenset((weight, view.weight, view.stored) for weight, view in home), target.name)
        if same != target.name:
            tied[target.name] = same
            continue
        for weight, view in home:
            pieces.setdefault(weight, []).append(Piece(target, view))
    return pieces, tied


def joined(name: str, weight: Tensor, pieces: Sequence[Piece], count: int) -> FitTarget:
    """A weight as one target, whose dense delta is put together from its pieces.

    Args:
        name: the weight's, in memory.
        weight: the weight.
        pieces: what tensors to fit share with it; the rest of it does not change.
        count: how many of its elements may change.

    Raises:
        SourceError: the tensors share elements, or are stored in different dtypes.
    """
    if sum(piece.view.weight.numel for piece in pieces) > weight.numel():
        named = " and ".join(repr(piece.target.name) for piece in pieces[:2])
        raise SourceError(f"{named} share elements once loaded, so it is unclear which hold; keep one of them")
    dtypes = {piece.target.dtype: piece.target.name for piece in pieces}
    if len(dtypes) > 1:
        named = " and ".join(f"{tensor!r} in {dtype}" for dtype, tensor in dtypes.items())
        raise SourceError(f"{named} become one weight on loading; store them in one dtype to fit them")

    shape = tuple(weight.shape)

    def rows() -> Rows:
        delta = np.zeros(weight.numel(), np.float32)
        for piece in pieces:
            piece.view.weight.of(delta)[...] = piece.view.stored.of(piece.target.dense())
        matrix = delta.reshape(row_shape(shape))
        return lambda start, stop: matrix[start:stop]

    return FitTarget(name, pieces[0].target.dtype, shape, rows, count)


def wrong_shape(name: str, found: Shape, wanted: Shape) -> SourceError:
    """The error for a tensor that has another shape in the model than its change."""
    return SourceError(
        f"tensor {name!r} has shape {list(found)} in the model, but its change has {list(wanted)}; give the model that"
        " belongs to the files"
    )


def make_contiguous(model: nn.Module) -> None:
    """Gives weights that are transposed on loading a memory of their own, row by row."""
    for weight in (*model.parameters(), *model.buffers()):
        if not weight.is_contiguous():
            weight.data = weight.data.contiguous()
