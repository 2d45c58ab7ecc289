"""Checks that the weights of a live model are the base that a delta was made against."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from shiradelta.errors import BaseMismatchError
from shiradelta.format.record import Record
from shiradelta.format.table import Table
from shiradelta.hotswap.layers import Held, Layer, patches_on
from shiradelta.hotswap.levels import Level, layers_of
from shiradelta.hotswap.loaded import Loaded
from shiradelta.hotswap.outside import Watch
from shiradelta.hotswap.prepare import Preparation
from shiradelta.hotswap.protocol import LiveBackend, Part
from shiradelta.hotswap.ranks import Ranks
from shiradelta.hotswap.sections import check_together
from shiradelta.hotswap.shares import Share, Shares, add, check_whole, share_of, together
from shiradelta.hotswap.transcode import Change, InPieces
from shiradelta.models.compatibility import Remedies
from shiradelta.models.stacking import StackFit, StackWords
from shiradelta.models.views import View

_WORDS = StackWords(
    "the active adapters",
    Remedies(
        "give the base, without the delta in it",
        "load it while the adapters that it was made for are active, or check=False to use it with this one",
    ),
    "switch to the adapters that belong under it",
    "leave the strength at 1",
)

#: For each backend, the patches whose fingerprint can be compared: numbers -> the file's names of their tensors.
Checkable = Mapping[LiveBackend, Mapping[int, str]]
#: Fingerprints of the base, and of what is there now.
Fingerprints = Shares[tuple[int, int]]


def fit_of(
    preparation: Preparation,
    ranks: Ranks,
    watch: Watch,
    what: str,
    adapter: Loaded,
    check: bool,
    levels: Sequence[Level],
    beside: Callable[[], None] = lambda: None,
) -> tuple[tuple[str, ...], StackFit | None]:
    """Checks that all of an adapter is in memory, and compares its fingerprints with the base beneath the levels.

    Args:
        preparation: what the adapter was prepared for.
        ranks: the processes that have the model.
        watch: knows where the model has its tensors.
        what: the call, for messages.
        adapter: the adapter.
        check: compare fingerprints.
        levels: what is on the weights.
        beside: is called while devices compute fingerprints, once it is known that all of the adapter is in memory.

    Returns:
        Names of tensors that were not compared; what the adapter fits, if any were.

    Raises:
        BaseMismatchError: it does not fit, or another process has loaded another file.
        FormatError: a section that processes have read together is damaged.
        TargetError: a tensor was moved or replaced, or another process refuses.
    """
    checkable = _checkable(adapter.held) if check else {}
    parts = [part for part in adapter.parts if check and _is_checkable(part.record, part.dtype)]
    every = [(adapter.held[backend].every, some) for backend, some in checkable.items()]
    known = frozenset(part.target for part in parts).union(*(targets.chosen(some) for targets, some in every))

    def check_model() -> None:
        watch.check_model(target for held in adapter.held.values() for target in held.targets)
        beside()

    def own() -> Fingerprints:
        for held in adapter.held.values():
            held.check_memory()
        if not known:
            check_model()
            return {}
        with preparation.devices.ordered(reads=True):
            return _fingerprints(adapter.held, checkable, parts, layers_of(levels), check_model)

    found = ranks.agree(what, own)
    names = adapter.report.matched
    nonzeros = adapter.nonzeros if ranks.alone else adapter.all_nonzeros()  # what is whole here has all of its own
    known_there = ranks.gather((adapter.digest, sorted(names), nonzeros, found, adapter.readings))
    if any(other[:2] != known_there[0][:2] for other in known_there):
        raise BaseMismatchError(f"{adapter.label}: another rank has loaded another file; give all ranks the same one")
    check_together(adapter.label, [readings for *_, readings in known_there], adapter.table)
    check_whole(adapter.label, together([nonzeros for _, _, nonzeros, *_ in known_there]), adapter.table)
    fit = None
    if check and (compared := together([found for *_, found, _ in known_there])):
        fit = _check_base(adapter.label, compared, adapter.table, bool(levels))
    targets = {name: preparation.targets[other] for name, other in names.items()}
    return tuple(
        name for name, one in targets.items() if one not in known and known.isdisjoint(one.forms.values())
    ), fit


def _checkable(held: Mapping[LiveBackend, Held]) -> Checkable:
    """The patches whose fingerprint can be compared."""
    every: dict[LiveBackend, dict[int, str]] = {}
    for backend, one in held.items():
        at = 0
        for fits in one.fits:
            names, chosen = fits.table.names, np.flatnonzero(fits.have_fingerprints)
            rows = zip((chosen + at).tolist(), fits.numbers[chosen].tolist(), strict=True)
            every.setdefault(backend, {}).update((number, names[row]) for number, row in rows)
            at += len(fits)
    return {backend: patches for backend, patches in every.items() if patches}


def _fingerprints(
    held: Mapping[LiveBackend, Held],
    checkable: Checkable,
    parts: Sequence[InPieces],
    layers: Mapping[LiveBackend, Sequence[Layer]],
    beside: Callable[[], None],
) -> Fingerprints:
    """Fingerprints of the elements that a file changes, where it has some to compare.

    Args:
        held: the file's deltas.
        checkable: those that have a fingerprint.
        parts: its deltas of tensors that are in parts and have one; `held` has them for each weight.
        layers: what is on the weights now, the topmost level first.
        beside: is called while devices compute the first of them.
    """
    found: dict[str, dict[Share, tuple[int, int]]] = {}
    queued = {}
    for backend in checkable:
        below = layers.get(backend, [])
        base = backend.fingerprints(held[backend], below)
        queued[backend] = base, backend.fingerprints(held[backend], []) if below else None
    beside()
    for backend, (base, present) in queued.items():
        of_base = base()
        of_present = of_base if present is None else present()
        for number, name in checkable[backend].items():
            found[name] = {(): (of_base[number], of_present[number])}
    shown: dict[Change, list[tuple[Record, tuple[View, ...]]]] = {}
    for record, target, _ in parts:
        found.setdefault(record.name, {})
        for weight, views in target.leaves():
            shown.setdefault((weight, record.operation.name), []).append((record, views))
    for backend, one in held.items() if shown else ():
        stacks = patches_on(layers.get(backend, []))
        here = [(patch, shown.get((patch.target, patch.record.operation.name), [])) for patch in one.patches]
        here = [(patch, some) for patch, some in here if some]
        wanted = [Part(patch, stacks.get(patch.target, []), [views for _, views in some]) for patch, some in here]
        for (_, some), sums in zip(here, backend.part_fingerprints(wanted), strict=True):
            for (record, views), pair in zip(some, sums, strict=True):
                add(found[record.name], record.name, share_of(views), pair)
    return found


def _check_base(label: str, found: Fingerprints, table: Table, stacked: bool) -> StackFit:
    """Compares fingerprints with those in the file.

    Args:
        label: the file, for messages.
        found: the fingerprints of all its tensors that have some to compare.
        table: the file's table.
        stacked: whether adapters are active.

    Returns:
        What the file fits: the base, the present weights, or both.

    Raises:
        BaseMismatchError: a tensor fits neither, or not all fit the same of the two.
    """
    fit = StackFit(label, _WORDS, stacked)
    wanted = dict(zip(table.names, table.rows["base_fingerprint"].tolist(), strict=True))
    for name, shares in found.items():
        pairs = list(shares.values())
        base, present = pairs[0] if len(pairs) == 1 else (sum(sums) % (1 << 64) for sums in zip(*pairs, strict=True))
        if stacked or base != wanted[name]:  # without adapters there is nothing else to tell
            fit.check(name, table.named(name), base, present)
    return fit


def _is_checkable(record: Record, dtype: str) -> bool:
    """Whether a file has a fingerprint for elements of this dtype."""
    return record.base_fingerprint is not None and record.dtype.name == dtype
