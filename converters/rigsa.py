"""RIGSA (arXiv:2511.01794): W + gate x D, with a gate and a sparse D for each weight, apart in a file.

The paper names no files and no checkpoint of it was found, so nothing tells D from a new weight: the layout is read
where the user names it, and is never guessed.
"""

from __future__ import annotations

from functools import partial

from shiradelta.errors import SourceError
from shiradelta.format.arithmetic import Float32, to_float32
from shiradelta.format.registry import ADD_DTYPES
from shiradelta.models.checkpoint import Checkpoint
from shiradelta.models.peft import unwrap
from shiradelta.select.topk import Rows, row_shape

from .changes import add_changes
from .gates import beside, parse_gate
from .item import Skipped, SkipReason, Source
from .lora_converted import Change
from .lycoris import no_remarks
from .sources import SourceFiles, source

_WEIGHT = ".weight"


@source(
    "rigsa",
    "A RIGSA: a number MODULE.gate or MODULE.alpha beside each change; read by --kind rigsa only.",
    lambda files: False,
    order=25,
)
def open_rigsa(files: SourceFiles) -> Source:
    """The products of all gates and their changes."""
    checkpoint, result = files.checkpoint, Source()
    gates = _pairs(files)
    for key in checkpoint:
        if key not in gates and key not in gates.values():
            result.add(key, Skipped(SkipReason.UNSUPPORTED, "is neither a gate nor the one change beside it"))
    changes, called = {}, {}
    for gate, key in gates.items():
        parsed = parse_gate(gate)
        assert parsed is not None, gate
        stem = unwrap(parsed[0])
        name = stem if stem.endswith(_WEIGHT) else stem + _WEIGHT
        odd = [one for one in (gate, key) if checkpoint[one].dtype.name not in ADD_DTYPES]
        if odd:
            why = f"{odd[0]!r} is {checkpoint[odd[0]].dtype.name}; gates and changes are {', '.join(ADD_DTYPES)}"
            result.add(name, Skipped(SkipReason.PARTS, why).called(gate, key))
            continue
        changes[name] = Change(partial(_rows, checkpoint, gate, key), checkpoint[key].shape)
        called[name] = [stem, gate, key]
    add_changes(files, changes, called, result)
    return result


def _pairs(files: SourceFiles) -> dict[str, str]:
    """Gate -> the change beside it.

    Raises:
        SourceError: a gate may be that of several changes, or a change has several gates.
    """
    pairs: dict[str, str] = {}
    for gate in files.checkpoint:
        keys = beside(files.checkpoint, gate)
        if len(keys) > 1:
            raise SourceError(f"{files.path}: {gate!r} may be the gate of {keys[0]!r} or of {keys[1]!r}; remove one")
        pairs |= dict.fromkeys([gate], keys[0]) if keys else {}
    for gate, key in pairs.items():
        others = [other for other, one in pairs.items() if one == key and other != gate]
        if others:
            raise SourceError(f"{files.path}: {gate!r} and {others[0]!r} are gates of {key!r}; remove one")
    return pairs


def _rows(checkpoint: Checkpoint, gate: str, key: str) -> Rows:
    """Gate x D in float32."""
    factor = to_float32(checkpoint.bits(gate), checkpoint[gate].dtype.name).reshape(())
    slot = checkpoint[key]
    bits, columns = checkpoint.bits(key), row_shape(slot.shape)[1]

    @no_remarks
    def rows(start: int, stop: int) -> Float32:
        made: Float32 = to_float32(bits[start * columns : stop * columns], slot.dtype.name) * factor
        return made

    return rows
