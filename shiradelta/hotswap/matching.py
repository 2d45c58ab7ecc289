"""Whether a delta fits a live model, and others: names, shapes, dtypes, shared memory, elements that are set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from shiradelta.errors import ArgumentError, BaseMismatchError, DeltaError, TargetError
from shiradelta.hotswap.layers import Held, Patch
from shiradelta.hotswap.protocol import LiveBackend
from shiradelta.io.reader import StoredTensor
from shiradelta.models.compatibility import TensorSpec, check_fit, remedy_of
from shiradelta.models.live import Target
from shiradelta.models.memory import is_array
from shiradelta.models.names import Found, Named, find_names, search_the_rest
from shiradelta.util.arguments import matches
from shiradelta.util.text import count

#: The file's name of a tensor -> the model's, or None to skip the tensor.
Names = Mapping[str, str] | Callable[[str], str | None]


#: Allows everything, so it may match nothing.
_ANY = "*"
#: Names in an error.
_NAMED = 8


def only_these(label: str, matched: Mapping[str, str], only: Iterable[str] | None) -> dict[str, str]:
    """The tensors of a file that are to be loaded, of those that the model has; None for all.

    Raises:
        ArgumentError: one is not among them.
    """
    if only is None:
        return dict(matched)
    for name in (chosen := tuple(only)):
        if name not in matched:
            raise ArgumentError(
                f"{label}: only= names {name!r}, which is not among the tensors to load; correct the name"
            )
    return {name: matched[name] for name in matched if name in set(chosen)}


def match(
    delta: Mapping[str, StoredTensor],
    targets: Mapping[str, Target],
    names: Names | None,
    label: str,
    skip: Sequence[str],
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Finds a delta's tensors in a model.

    Args:
        delta: the file's tensors.
        targets: the model's tensors by name.
        names: the file's names -> the model's, where they differ.
        label: the file, for messages.
        skip: glob patterns of the file's names; these tensors may be left out.

    Returns:
        (the file's names -> the model's, names that are left out).

    Raises:
        BaseMismatchError: nothing matches, or a tensor does not that no pattern names; or the delta adds or removes a
            tensor.
        ArgumentError: a pattern matches no tensor that would be refused without it.
    """
    renamed = {name: other for name in delta if (other := mapped(names, name)) is not None}
    restructured = {name for name, tensor in delta.items() if tensor.operation.restructures}
    wanted = {other: delta[name].shape for name, other in renamed.items() if name not in restructured}
    searched = _find(wanted, targets, {other: name for name, other in renamed.items()}, skip)
    found = searched.names
    matched: dict[str, str] = {}
    refused: list[str] = []
    for name, other in renamed.items():
        if other not in found or name in restructured:
            refused.append(name)
        else:
            matched[name] = found[other]
            if targets[found[other]].refusal is not None:
                refused.append(name)
    allowed = _allowed(label, refused, skip)
    kept = {name: other for name, other in matched.items() if name not in allowed}
    matched = kept or matched  # where nothing is left, the reason for the first is the error
    for name in refused:
        operation = delta[name].operation
        if operation.restructures and name not in allowed:
            done = "replaced whole" if operation.replaces else "added" if operation.creates else "removed"
            raise BaseMismatchError(
                f"{label}: tensor {name!r} is to be {done}, which a live model"
                " does not allow; use shiradelta.apply on its folder and load that, or leave the tensor out with skip="
            )
    missing = [name for name in refused if name not in matched and name not in allowed]
    unclear = [name for name in (missing if matched else renamed) if renamed[name] in searched.unclear]
    if unclear:
        why = searched.unclear[renamed[unclear[0]]]
        raise BaseMismatchError(f"{label}: {why} of the model; map the names with HotSwap(model, names=...)")
    if missing or not matched:
        few = missing or list(delta)
        examples = f"e.g. {next(iter(targets))!r}" if targets else "no tensors"
        more = f" and {len(few) - _NAMED} more" if len(few) > _NAMED else ""
        raise BaseMismatchError(
            f"{label}: {len(few)} of {count(delta, 'tensor')} not found in the model:"
            f" {', '.join(map(repr, few[:_NAMED]))}{more} (the model has {examples});"
            f" {remedy_of(delta.values())}, map the names with HotSwap(model, names=...), or leave tensors out with"
            " skip="
        )
    return matched, tuple(name for name in delta if name not in matched)


def _find(wanted: Named, targets: Mapping[str, Target], own: Mapping[str, str], skip: Sequence[str]) -> Found:
    """Finds names among all that the model's tensors have, in memory or in the checkpoint.

    Args:
        wanted: the names to find, with shapes.
        targets: the model's tensors by name.
        own: a wanted name -> the file's name of the tensor.
        skip: glob patterns of the file's names that may be left out.
    """
    if wanted.keys() <= targets.keys():  # exact names come first; the rest looks at all of the model
        return Found({name: name for name in wanted})
    have = {name: target.known_shape for name, target in targets.items()}
    same = {name: id(target) for name, target in targets.items()}

    def search(some: Named) -> tuple[Found, list[str]]:
        found = find_names(some, have, same)
        return found, [name for name in some if name not in found.names]

    return search_the_rest(wanted, search, lambda name: matches(skip, own[name]))


def mapped(names: Names | None, name: str) -> str | None:
    """The model's name of a file's tensor; None to leave it out."""
    return names(name) if callable(names) else (names or {}).get(name, name)


def _allowed(label: str, refused: Sequence[str], skip: Sequence[str]) -> set[str]:
    """The refused names that a pattern matches.

    Raises:
        ArgumentError: a pattern matches none.
    """
    allowed: set[str] = set()
    for pattern in skip:
        matching = {name for name in refused if matches((pattern,), name)}
        if not matching and pattern != _ANY:
            raise ArgumentError(
                f"{label}: skip pattern {pattern!r} matches no tensor that would otherwise be refused; leave it out"
            )
        allowed |= matching
    return allowed


class Apart:
    """Tensors that share no memory, as far as was looked."""

    def __init__(self) -> None:
        self._known: frozenset[Target] = frozenset()

    def check(self, label: str, targets: frozenset[Target]) -> None:
        """`check_overlaps`, unless it is known of these tensors."""
        if not targets <= self._known:
            check_overlaps(label, targets)
            self._known = targets


def check_overlaps(label: str, targets: Iterable[Target]) -> None:
    """Checks that no two tensors share memory, except as disjoint views of one.

    Raises:
        BaseMismatchError: two do.
    """
    before: list[tuple[int, Target]] = []  # (end, target) of the earlier tensors that reach this far
    device = ""
    placed = [(target.memory, target) for target in targets if 0 not in target.shape]
    for (here, start, end), target in sorted(placed, key=lambda pair: pair[0]):
        before = [(reach, other) for reach, other in before if reach > start] if here == device else []
        for _, other in before:
            if target.view and target.view == other.view and target.holder is other.holder:
                continue
            if target.holder is other.holder is not None:
                raise BaseMismatchError(
                    f"{label}: adapters change tensors {other.name!r} and {target.name!r}, one of which is part of the"
                    " other in the model; load adapters that name both as the checkpoint does"
                )
            raise BaseMismatchError(
                f"{label}: tensors {other.name!r} and {target.name!r} share memory without being the same; untie"
                " them before loading"
            )
        before.append((end, target))
        device = here


def check_target(where: str, tensor: StoredTensor, target: Target, allow_dtype: bool) -> str:
    """Checks that a delta can be applied to a tensor in memory.

    Args:
        where: delta and tensor, for messages.
        tensor: the delta.
        target: the tensor.
        allow_dtype: take values that were made against another dtype.

    Returns:
        The dtype of the tensor's elements.

    Raises:
        TargetError: the tensor cannot be written.
        BaseMismatchError: the delta does not fit it.
    """
    if target.refusal is not None:
        raise TargetError(f"{where} {target.refusal}")
    if target.extent is not None and not target.parts and target.dtype == "?":
        raise BaseMismatchError(
            f"{where} has no region in memory; give HotSwap(model, layout=...) its regions, and group=... where other"
            " processes have them"
        )
    # NumPy has no bfloat16: a uint16 array stands for it where the delta says so, as everywhere in the package.
    stands_for_bfloat16 = is_array(target.tensor) and (target.dtype, tensor.dtype) == ("uint16", "bfloat16")
    dtype = "bfloat16" if stands_for_bfloat16 else target.dtype
    check_fit(
        where,
        tensor,
        TensorSpec(target.shape, dtype),
        "the model",
        allow_dtype=allow_dtype,
        option="allow_dtype=True",
        shown=str(next((leaf for leaf, _ in target.leaves()), target).tensor.dtype) if dtype == "?" else "",
    )
    return dtype


def check_sets(backend: LiveBackend, helds: Sequence[Held]) -> None:
    """Checks that no two adapters set the same element, and that none moves one that another sets.

    Moves add up.

    Raises:
        DeltaError: two do.
    """
    setting: dict[Target, list[Patch]] = {}
    for held in helds:
        for patch in held.patches:
            if not patch.record.adds and patch.record.nnz:
                setting.setdefault(patch.target, []).append(patch)
    for target, patches in setting.items():
        for i, one in enumerate(patches):
            if any(_clash(one, other) and backend.share_positions(one, other) for other in patches[:i]):
                raise DeltaError(
                    f"two adapters set the same elements of tensor {target.name!r}; only one of them can be active"
                )


def _clash(one: Patch, other: Patch) -> bool:
    """Whether two patches that do not add cannot both change an element."""
    return not (one.record.operation.shifts and other.record.operation.shifts)
