"""The base of an exported delta: which of its tensors, and which of its layers, the delta changes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from shiradelta.errors import DeltaError
from shiradelta.folder.comparison import PastBits
from shiradelta.folder.plan import FolderPlan, make_plan
from shiradelta.folder.weights import checkpoint_for
from shiradelta.format.delta import TensorDelta
from shiradelta.io.download import local_model
from shiradelta.io.reader import Delta
from shiradelta.models.checkpoint import Checkpoint
from shiradelta.models.compatibility import Remedies, check_fingerprint
from shiradelta.models.library import linear_weights, shared_tensors
from shiradelta.util.progress import Progress

_SUFFIX = ".weight"
_REMEDIES = Remedies("revert the delta in it first", "export without a model")


@dataclass(frozen=True)
class Based:
    """A delta's tensors in the coordinates of its base.

    Attributes:
        checkpoint: the base.
        plan: what the delta changes in it.
    """

    checkpoint: Checkpoint
    plan: FolderPlan


def based(deltas: Mapping[str, TensorDelta], model: str | os.PathLike[str], progress: Progress | None = None) -> Based:
    """Finds a delta's tensors in its base, and checks that this is the base that it was made for.

    Args:
        deltas: an open `.shd` file.
        model: the base's file or folder.
        progress: called with ("checking", done, total).

    Raises:
        BaseMismatchError: it is another base.
        DeltaError: the deltas are not those of a file.
        SourceError: there is no model.
    """
    if not isinstance(deltas, Delta):
        raise DeltaError("only a delta in a file is compared with a model; save it first, or export it without a model")
    checkpoint = checkpoint_for(local_model(model), deltas)
    plan = make_plan(checkpoint, deltas, 1.0, allow_dtype=False)
    for number, edit in enumerate(plan.edits):
        if progress:
            progress("checking", number, len(plan.edits))
        if edit.tensor.base_fingerprint is not None:
            found = PastBits(edit.slot).fingerprint(edit.tensor)
            where = f"{deltas.file or 'delta'}: {checkpoint.root}: tensor {edit.name!r}"
            check_fingerprint(where, found, edit.tensor.base_fingerprint, edit.tensor.result_fingerprint, _REMEDIES)
    return Based(checkpoint, plan)


def linear_layers(
    deltas: Mapping[str, TensorDelta], what: str, model: str | os.PathLike[str] | None, progress: Progress | None
) -> dict[str, TensorDelta]:
    """The deltas of linear layers, by the layers' names in the model.

    Args:
        deltas: name of a weight -> its delta.
        what: what takes them, for messages.
        model: the base, which tells a layer's name in memory, and linear layers from others; None to take the names
            as they are, and each matrix for that of a linear layer.
        progress: called with (what, done, total).

    Raises:
        DeltaError: a delta is not an addition to the weight of a linear layer, or there is none.
        BaseMismatchError: the delta was made for another base.
    """
    if not deltas:
        raise DeltaError(f"there is no delta to export; {what} has at least one layer")
    for name, delta in deltas.items():
        if not name.endswith(_SUFFIX) or len(delta.shape) != 2 or not delta.operation.adds or not delta.numel:
            kind = f"{delta.op} with shape {list(delta.shape)}"
            raise DeltaError(
                f"tensor {name!r} is {kind}; {what} takes only additions to a linear layer's weight;"
                " use the layout merged"
            )
        if "/" in name:
            raise DeltaError(
                f"tensor {name!r} is that of a pipeline's component; {what} is for one model; use the layout merged"
            )
    if model is None:
        return {name.removesuffix(_SUFFIX): delta for name, delta in deltas.items()}
    base = based(deltas, model, progress)
    modules, shared = linear_weights(base.checkpoint), shared_tensors(base.checkpoint)
    found: dict[str, TensorDelta] = {}
    for edit in base.plan.edits:
        names = [edit.name.removesuffix(_SUFFIX)] if modules is None else modules.get(edit.name, [])
        if len(names) != 1 or edit.name in shared:
            raise DeltaError(
                f"tensor {edit.name!r} is not the weight of one linear layer in {base.checkpoint.root}; {what} takes no"
                " other; use the layout merged"
            )
        found[names[0]] = edit.tensor
    return found
