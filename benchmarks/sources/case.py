"""A source that a producer makes, and what becomes of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import shiradelta
from shiradelta.util.text import brief

#: Largest difference from the producer's merge, as a part of the largest weight: float32's rounding, a few times.
ROUNDING = 2e-6
EXACT = "exact"


@dataclass(frozen=True)
class Made:
    """A source, its base, and the weights that its producer makes of both.

    Attributes:
        source: the file or folder to convert.
        base: the base's file or folder.
        wanted: name in the base -> weight after the merge; tensors that are not here stay as they are.
        options: further arguments of `convert`.
    """

    source: Path
    base: Path
    wanted: Mapping[str, torch.Tensor]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Attributes:
        producer: who writes such sources.
        kind: what of theirs it is.
        by: what makes it here, and what it is compared with.
        make: writes it into a folder.
    """

    producer: str
    kind: str
    by: str
    make: Callable[[Path], Made]


def outcome(case: Case, folder: Path) -> str:
    """What becomes of a source in an empty folder: exact, wrong, refused with the reason, or not made with it."""
    try:
        made = case.make(folder)
    except Exception as error:  # whatever the producer's library cannot do
        return f"not made: {brief(str(error), 120)}"
    before = weights(made.base)
    try:
        shiradelta.convert(made.source, folder / "x.shd", sparsity=1, base=made.base, values="f32", **made.options)
    except shiradelta.ShiraDeltaError as error:
        return f"refused: {str(error).replace(str(made.source), '').replace(str(folder), '').lstrip('/: ')}"
    root = made.base if made.base.is_dir() else made.base.parent
    shiradelta.apply(root, folder / "x.shd", out=folder / "out")
    found = weights(folder / "out")
    wanted = {**before, **made.wanted}
    if found.keys() != wanted.keys():
        return f"WRONG: {sorted(found.keys() ^ wanted.keys())[0]!r} is in one of the two"
    if not any(distance(before[name], wanted[name]) for name in before.keys() & wanted.keys()):
        return "not made: it changes nothing"
    worst = max(distance(found[name], wanted[name]) for name in found)
    return EXACT if worst < ROUNDING else f"WRONG by {worst:g}"


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, as a part of the largest weight; infinity for another shape."""
    if found.shape != wanted.shape:
        return math.inf
    if not found.numel():
        return 0.0
    worst = (found.double() - wanted.double()).abs().max()
    return float(worst / wanted.double().abs().max().clamp(min=1))


def weights(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file, a model's folder or a pipeline's, by the names that `convert` gives them."""
    if path.is_file():
        return dict(load_file(path))
    found: dict[str, torch.Tensor] = {}
    for file in sorted(path.rglob("*.safetensors")):
        within = file.parent.relative_to(path)
        if within.parts[:1] == (".shiradelta",):  # the originals of files that were rewritten
            continue
        prefix = "".join(f"{part}/" for part in within.parts)
        found.update({prefix + name: tensor for name, tensor in load_file(file).items()})
    return found
