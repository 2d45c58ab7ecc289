"""The table of wires, and what all of them share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from shiradelta.chain.difference import shifted
from shiradelta.chain.fold import check_base
from shiradelta.chain.wires.checks import Change
from shiradelta.errors import DeltaError, SourceError
from shiradelta.folder.copying import new_folder
from shiradelta.format import arithmetic
from shiradelta.format.delta import TensorDelta
from shiradelta.io.download import local_model
from shiradelta.io.reader import open_delta
from shiradelta.io.writer import writing
from shiradelta.models.checkpoint import Checkpoint, open_checkpoint
from shiradelta.util.arguments import ANY, PATH, TEXT, checked
from shiradelta.util.arrays import different
from shiradelta.util.registry import Registry

Path_ = str | os.PathLike[str]


@dataclass(frozen=True)
class Wire:
    """How another project stores a step.

    Attributes:
        name: what a user calls it.
        help: what it is, for people.
        read: (its file or folder, the base) -> the tensors that it changes.
        write: (a new folder, the base, the tensors that it changes, options) writes it.
        options: the options of `write` -> their defaults.
    """

    name: str
    help: str
    read: Callable[[Path, Checkpoint], Iterator[Change]]
    write: Callable[..., None]
    options: dict[str, str]


WIRES: Registry[Wire] = Registry("wire")


@checked(name=TEXT, source=PATH, base=PATH, out=PATH)
def read_wire(name: str, source: Path_, base: Path_, out: Path_) -> int:
    """Makes a `.shd` file, with fingerprints, of a step on a wire; returns the number of elements that change.

    Args:
        name: a name of `WIRES`.
        source: the step's file or folder.
        base: the model before the step.
        out: the file to write.

    Raises:
        ArgumentError: there is no such wire.
        SourceError: the step is damaged, or was made for another model.
        TargetError: the file cannot be written.
    """
    wire, checkpoint, changed = WIRES.find(name), open_checkpoint(local_model(base)), 0
    with writing(out) as writer:
        for tensor, old, new in wire.read(Path(source), checkpoint):
            at = different(old, new)
            slot, changed = checkpoint[tensor], changed + at.size
            if at.size:
                step = TensorDelta.trusted(slot.shape, at, new[at], slot.dtype.name, "set", old[at])
                writer.add(tensor, shifted(step))
        writer.metadata["method"] = f"wire {name}"
    return changed


@checked(name=TEXT, delta=PATH, base=PATH, out=PATH, options=ANY)
def write_wire(name: str, delta: Path_, base: Path_, out: Path_, **options: str) -> None:
    """Writes a step to a new folder, as a wire has it.

    Args:
        name: a name of `WIRES`.
        delta: the `.shd` file.
        base: the model before the step.
        out: the folder, which is new or empty.
        options: what the wire takes; `WIRES` has the defaults.

    Raises:
        ArgumentError: there is no such wire or option.
        BaseMismatchError, ChainError: the step was made for another model.
        DeltaError: the wire cannot hold the step.
        TargetError: the folder cannot be written.
    """
    wire, checkpoint = WIRES.find(name), open_checkpoint(local_model(base))
    unknown = sorted(set(options) - set(wire.options))
    if unknown:
        known = ", ".join(wire.options)
        raise DeltaError(f"{unknown[0]} is no option of the wire {name}; it takes {known}")
    with open_delta(delta) as opened, new_folder(Path(out), Path(delta)) as folder:

        def changes() -> Iterator[Change]:
            for tensor, one in opened.items():
                where = f"{opened.file}: tensor {tensor!r}"
                if one.operation.restructures:
                    raise DeltaError(
                        f"{where} is {one.op}, which the wire {name} has no form for; publish an anchor there"
                    )
                if tensor not in checkpoint or checkpoint[tensor].shape != one.shape:
                    raise SourceError(f"{where} is not in {base} with this shape; give the model before the step")
                old, positions = checkpoint.bits(tensor), one.positions()
                check_base(where, one, positions, old[positions])
                new = old.copy()
                dtype = checkpoint[tensor].dtype.name
                new[positions] = arithmetic.result(one.operation, one.bits(), old[positions], dtype, 1)
                yield tensor, old, new

        wire.write(folder, checkpoint, changes(), **{**wire.options, **options})
