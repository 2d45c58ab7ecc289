"""Levels of active adapters: those of the base, and on top of them successors, one a level (spec/FORMAT.md, 6.4).

A level saves the elements that it overwrites, as the levels beneath it left them.  So levels are left topmost first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from shiradelta.errors import ArgumentError
from shiradelta.hotswap.devices import Layers, new_layers
from shiradelta.hotswap.loaded import Loaded, Strengths, targets_of, together
from shiradelta.hotswap.strengths import are_same
from shiradelta.models.compatibility import check_strength


@dataclass(frozen=True, eq=False)
class Level:
    """Adapters that are on the weights, applied at once to what the levels beneath give.

    Attributes:
        adapters: adapter -> strength.
        layers: their deltas, with the elements that they overwrote.
    """

    adapters: Strengths
    layers: Layers


def planned(wanted: Strengths, adapters: Mapping[str, Loaded]) -> list[Strengths]:
    """The wanted adapters in levels, if they can be active together.  A successor brings the levels beneath it.

    Raises:
        DeltaError: a strength that is not allowed, a delta under two names, or a successor that is wanted at another
            strength than 1 or with other adapters than those that it was made for.
    """
    for name, strength in wanted.items():
        check_strength(f"adapter {name!r}", strength, adapters[name].operations)
    levels = _levels({name: float(strength) for name, strength in wanted.items()}, adapters)
    for level in levels:
        digests: dict[bytes, str] = {}
        for name in level:
            twin = digests.setdefault(adapters[name].digest, name)
            if twin != name and not targets_of([adapters[twin]]).isdisjoint(targets_of([adapters[name]])):
                raise ArgumentError(f"adapters {twin!r} and {name!r} are the same delta; give it one strength")
    return levels


def _levels(wanted: Strengths, adapters: Mapping[str, Loaded]) -> list[Strengths]:
    if not any(adapters[name].is_successor for name in wanted):
        return [wanted] if wanted else []
    # A delta that fits the base, too, is on top where all beneath it is wanted: it cannot be a delta of the base there.
    beneath = {name: together(adapters[name].beneath) for name in wanted}
    tops = [name for name in wanted if adapters[name].is_successor or beneath[name].keys() <= wanted.keys()]
    top = max(tops, key=lambda name: len(beneath[name]))
    levels = [*adapters[top].beneath, {top: 1.0}]
    allowed = together(levels)
    for name, strength in wanted.items():
        if name not in allowed or not are_same({name: strength}, {name: allowed[name]}):
            these = ", ".join(f"{other!r} at {alpha:g}" for other, alpha in beneath[top].items())
            raise ArgumentError(
                f"adapter {top!r} was made for what {these} gives, and is active at strength 1 on exactly that, not"
                f" with {name!r} at {strength:g}; switch to {top!r} alone, which brings what is beneath it"
            )
    return levels


def new_levels(plan: Sequence[Strengths], before: Sequence[Level], adapters: Mapping[str, Loaded]) -> list[Level]:
    """Levels as planned: those of `before` as far up as they are the same, and new ones with room above.

    Raises:
        DeltaError: two deltas of a level set the same element.
    """
    levels: list[Level] = []
    for number, wanted in enumerate(plan):
        old = before[number] if number < len(before) and levels == list(before[:number]) else None
        if old is not None and are_same(wanted, old.adapters):
            levels.append(old)
            continue
        ordered = sorted((adapters[name].digest, name) for name in wanted)
        helds = [(adapters[name].held, wanted[name]) for _, name in ordered]
        levels.append(Level(wanted, new_layers(helds, old.layers if old is not None else {})))
    return levels


def different(before: Sequence[Level], after: Sequence[Level]) -> tuple[Sequence[Level], Sequence[Level]]:
    """The levels of each that lie above those that both have."""
    pairs = enumerate(zip(before, after, strict=False))
    kept = next((number for number, (one, other) in pairs if one is not other), min(len(before), len(after)))
    return before[kept:], after[kept:]


def exchange(before: Sequence[Level], after: Sequence[Level]) -> None:
    """Replaces levels on the weights: leaves those above the common ones, topmost first, and enters the new ones."""
    leave, enter = different(before, after)
    for old, new in _exchanges([level.layers for level in leave], [level.layers for level in enter]):
        for backend in {**old, **new}:
            backend.replace(old.get(backend, []), new.get(backend, []))


def _exchanges(leave: Sequence[Layers], enter: Sequence[Layers]) -> Iterator[tuple[Layers, Layers]]:
    """(layers to leave, layers to enter in their place), one after the other."""
    yield from ((old, {}) for old in reversed(leave[1:]))
    if leave or enter:
        yield leave[0] if leave else {}, enter[0] if enter else {}
    yield from (({}, new) for new in enter[1:])


def restore(levels: Sequence[Level]) -> None:
    """Puts back all elements that the levels have saved, topmost first."""
    for level in reversed(levels):
        for backend, layers in level.layers.items():
            backend.restore(layers)


def layers_of(levels: Sequence[Level]) -> Layers:
    """The layers of all levels, the topmost first: the last one that saved an element has the base's."""
    found: Layers = {}
    for level in reversed(levels):
        for backend, layers in level.layers.items():
            found.setdefault(backend, []).extend(layers)
    return found
