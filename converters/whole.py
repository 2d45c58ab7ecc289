"""Whole or refused: what a source holds and the file would lack is an error, unless a pattern allows it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from shiradelta.errors import ArgumentError, SourceError
from shiradelta.util.arguments import as_patterns, matches
from shiradelta.util.text import count

from .item import Skipped, SkipReason, Source

#: Tensors that a message names.
_NAMED = 3
#: The pattern that allows whatever cannot be converted; it may match nothing.
_ANY = "*"


@dataclass(frozen=True)
class Losses:
    """The tensors that patterns allow to be missing from the file.

    Attributes:
        patterns: the user's patterns.
        skipped: name -> why it is not converted.
        energies: name -> squared norm of the lost change; None where it is unknown.
    """

    patterns: tuple[str, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    energies: Mapping[str, float | None] = field(default_factory=dict)

    @property
    def energy(self) -> float:
        """The squared norm of all lost changes whose norm is known."""
        return sum(energy for energy in self.energies.values() if energy is not None)

    @property
    def unknown(self) -> list[str]:
        """The tensors whose lost change has an unknown norm."""
        return [name for name, energy in self.energies.items() if energy is None]

    @property
    def warnings(self) -> list[str]:
        """What the user allowed to be lost, in a line."""
        if not self.skipped:
            return []
        counted = "what they would change counts as energy lost"
        if self.unknown:
            counted = f"the energy kept is unknown, as nothing tells the change of {', '.join(self.unknown[:_NAMED])}"
        return [f"{count(self.skipped, 'tensor')} skipped, as patterns allow: {_listed(self.skipped)}; {counted}"]

    @property
    def metadata(self) -> dict[str, str]:
        """What the file says of them."""
        return {"skipped": f"{len(self.skipped)} by {' '.join(self.patterns)}"} if self.skipped else {}


def store_whole(source: Source, where: object, whole: str | Sequence[str] = ()) -> None:
    """Takes tensors that patterns name, and that have another shape than the base's, whole in the place of those.

    Args:
        source: the opened source; its skipped tensors become items.
        where: its name in messages.
        whole: glob patterns of names in the source or in the base.

    Raises:
        ArgumentError: a pattern matches no tensor of another shape.
    """
    patterns = as_patterns(whole)
    shaped = {name: skipped for name, skipped in source.skipped.items() if skipped.whole is not None}
    for pattern in patterns:
        if not any(matches((pattern,), name, *skipped.names) for name, skipped in shaped.items()):
            listed = ", ".join(map(repr, list(shaped)[:_NAMED]))
            raise ArgumentError(
                f"{where}: whole pattern {pattern!r} matches no tensor of another shape than the base's"
                + (f"; these are {listed}" if shaped else "; leave it out")
            )
    for name, skipped in shaped.items():
        if skipped.whole is not None and matches(patterns, name, *skipped.names):
            del source.skipped[name]
            source.items.append(skipped.whole)
            source.warnings.append(
                f"{skipped.whole.name!r} is stored whole, with shape {list(skipped.whole.shape)}; where the file is"
                " applied, config.json and the tokenizer have to be the fine-tune's, too"
            )


def check_whole(source: Source, where: object, skip: str | Sequence[str] = ()) -> Losses:
    """Refuses a source that would be converted in part, apart from what patterns allow.

    Args:
        source: the opened source.
        where: its name in messages.
        skip: glob patterns; a tensor may be lost if one matches a name that it has in the source or in the base.

    Raises:
        SourceError: a tensor would be lost that no pattern allows.
        ArgumentError: a pattern matches no tensor that would be lost.
    """
    patterns = as_patterns(skip)
    energies: dict[str, float | None] = {}
    for name, skipped in source.skipped.items():
        if skipped.reason.loses:
            energy = energy_of(skipped)
            if energy != 0 or skipped.reason is SkipReason.SHAPE:  # another shape is a change in itself
                energies[name] = energy
    allowed = {
        name: [pattern for pattern in patterns if matches((pattern,), name, *source.skipped[name].names)]
        for name in energies
    }
    refused = {name: str(source.skipped[name]) for name in energies if not allowed[name]}
    used = {pattern for matching in allowed.values() for pattern in matching} | {_ANY}
    unused = [pattern for pattern in patterns if pattern not in used]
    if unused:
        listed = f"; what cannot be converted is {_listed(refused)}" if refused else "; leave it out"
        raise ArgumentError(
            f"{where}: skip pattern {unused[0]!r} matches no tensor that would otherwise be refused{listed}"
        )
    if refused:
        raise SourceError(
            f"{where}: {count(refused, 'tensor')} cannot be converted: {_listed(refused)}; give what is lacking, or"
            " --skip PATTERN (skip=) to leave them out"
        )
    return Losses(patterns, {name: str(source.skipped[name]) for name in energies}, energies)


def energy_of(skipped: Skipped) -> float | None:
    """The squared norm of a lost change; None where it cannot be computed."""
    try:
        energy = math.nan if skipped.energy is None else skipped.energy()
    except SourceError:  # NaN or infinity in it
        return None
    return energy if math.isfinite(energy) else None


def _listed(skipped: Mapping[str, str]) -> str:
    """The first few with their reasons."""
    few = "; ".join(f"{name}: {why}" for name, why in list(skipped.items())[:_NAMED])
    return few + (f"; and {len(skipped) - _NAMED} more" if len(skipped) > _NAMED else "")
