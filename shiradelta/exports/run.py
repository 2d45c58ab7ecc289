"""`export`: writes a delta in the layout of another library."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shiradelta.io.reader import DELTA, Delta, open_delta
from shiradelta.util.arguments import NUMBER, PATH, TEXT, WHOLE, checked
from shiradelta.util.progress import Progress

from .layouts import Written, find_layout

Path_ = str | os.PathLike[str]


@dataclass(frozen=True)
class ExportReport:
    """Report of `export`.

    Attributes:
        out: the file or folder that was written.
        layout: the export layout.
        tensors: number of tensors in the delta.
        nonzeros: number of nonzeros in it.
        bytes: size of the weights that were written; for a folder of all its files.
        energy_kept: share of the delta's squared norm that the result has; None where it has all of the delta.
        ranks: layer -> rank, where factors were written.
        warnings: warnings for the user.
    """

    out: str
    layout: str
    tensors: int
    nonzeros: int
    bytes: int
    energy_kept: float | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@checked(delta=DELTA, layout=TEXT, model=PATH, rank=WHOLE, energy=NUMBER)
def export(
    delta: Delta | Path_,
    layout: str,
    out: Path_,
    *,
    model: Path_ | None = None,
    rank: int | None = None,
    energy: float | None = None,
    strength: float | None = None,
    progress: Progress | None = None,
    limit: int | str | None = None,
) -> ExportReport:
    """Writes a delta in the layout of another library, with one tensor in memory at a time.

    What the layout cannot hold is refused by name; nothing is left out.

    Args:
        delta: the `.shd` file.
        layout: a name of `shiradelta.exports.EXPORTS`; `shiradelta export --list` lists them.
        out: the file or folder to write.
        model: the base model's file or folder.  "merged" and "sparse-undo" need it, "sparse" for additions.  The
            other layouts check with it that each tensor belongs to a linear layer, and take the layers' names in memory
            from it.
        rank: the rank of each layer's factors, for "peft-lora"; 16 by default.
        energy: the share of each layer's squared norm that the factors keep instead, for "peft-lora".
        strength: alpha, the factor of the values, for "merged"; 1 by default.
        progress: called with (what, done, total).
        limit: for a path, the most memory that decoding one tensor may take; see `open_delta`.

    Raises:
        ArgumentError: the layout is unknown, or does not take an option.
        BaseMismatchError: the model is not the base that the delta was made for.
        DeltaError: the layout cannot hold the delta.
        FormatError: the delta is refused.
        LimitError: a tensor takes more memory than `limit` allows.
        TargetError: `out` cannot be written.
    """
    options: dict[str, Any] = {"model": model, "rank": rank, "energy": energy, "strength": strength}
    given = {name: value for name, value in options.items() if value is not None}
    row = find_layout(layout, given)
    if "progress" in row.options:
        given["progress"] = progress
    with nullcontext(delta) if isinstance(delta, Delta) else open_delta(delta, limit=limit) as opened:
        base = opened.metadata.get("base", "") if model is None else os.fspath(model)
        written = row.write(out, opened, base, **given) or Written()
        return ExportReport(
            out=os.fspath(out),
            layout=layout,
            tensors=len(opened),
            nonzeros=opened.nnz,
            bytes=_size(Path(out)),
            energy_kept=written.energy_kept,
            ranks=written.ranks,
            warnings=written.warnings,
        )


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
