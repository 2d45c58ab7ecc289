"""Whether a delta fits a live model: names, shapes, dtypes, shared memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from shiradelta.errors import BaseMismatchError, TargetError
from shiradelta.io.reader import Delta, StoredTensor
from shiradelta.models.compatibility import TensorSpec, check_fit
from shiradelta.models.live import Target, is_array
from shiradelta.models.names import rename_all

#: The file's name of a tensor -> the model's, or None to skip the tensor.
Names = Mapping[str, str] | Callable[[str], str | None]


def match(
    delta: Delta, targets: Mapping[str, Target], names: Names | None, label: str, strict: bool
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Finds a delta's tensors in a model.

    Args:
        delta: the file.
        targets: the model's tensors by name.
        names: the file's names -> the model's, where they differ.
        label: the file, for messages.
        strict: refuse a file with tensors that the model does not have.

    Returns:
        (the file's names -> the model's, names that the model does not have).

    Raises:
        BaseMismatchError: nothing matches; `strict` is set and something does not; or the delta adds or removes
            tensors.
    """
    mapped: dict[str, str] = {}
    for name, tensor in delta.items():
        if tensor.operation.restructures:
            raise BaseMismatchError(
                f"{label}: tensor {name!r} is to be {'added' if tensor.operation.creates else 'removed'}, which a live"
                " model does not allow; use shiradelta.apply on its folder and load that"
            )
        other = names(name) if callable(names) else (names or {}).get(name, name)
        if other is not None:
            mapped[name] = other
    found = rename_all(list(mapped.values()), targets)
    matched = {name: found[other] for name, other in mapped.items() if other in found}
    unmatched = tuple(name for name in delta if name not in matched)
    if unmatched and (strict or not matched):
        raise BaseMismatchError(
            f"{label}: {len(unmatched)} of its {len(delta)} tensors are not in the model, the first is"
            f" {unmatched[0]!r} (the model has e.g. {next(iter(targets), 'nothing')!r}); give the model it was made"
            " for, or map the names with HotSwap(model, names=...)"
        )
    return matched, unmatched


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
            if not (target.view and target.view == other.view and target.holder is other.holder):
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
        shown=str(target.tensor.dtype) if dtype == "?" else "",
    )
    return dtype
