"""Whether a delta fits a live model: names, shapes, dtypes, shared memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from shiradelta.errors import BaseMismatchError, TargetError
from shiradelta.format import registry
from shiradelta.io.reader import Delta, StoredTensor
from shiradelta.models.checkpoint import rename_all
from shiradelta.models.live import Target, is_array

#: Checkpoint's name -> model's name, or None for a tensor to leave out.
Names = Mapping[str, str] | Callable[[str], str | None]


def match(
    delta: Delta, targets: Mapping[str, Target], names: Names | None, label: str, strict: bool
) -> tuple[dict[str, str], tuple[str, ...]]:
    """(the file's names -> the model's, names that the model does not have).

    Raises:
        BaseMismatchError: nothing matches, or `strict` and not all; or whole tensors come or go.
    """
    mapped: dict[str, str] = {}
    for name, tensor in delta.items():
        if tensor.op in ("new", "drop"):
            raise BaseMismatchError(
                f"{label}: tensor {name!r} is to be {'added' if tensor.op == 'new' else 'taken away'}, which a live"
                " model cannot have done to it; use shiradelta.apply on its folder and load that"
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
            " for, or HotSwap(model, names=...) to say what is called how"
        )
    return matched, unmatched


def check_overlaps(label: str, targets: Iterable[Target]) -> None:
    """No two tensors that are written may share memory, unless they are disjoint views of one."""
    before: list[tuple[int, Target]] = []  # (end, target) of those that reach as far as here
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


def check_fit(where: str, tensor: StoredTensor, target: Target, allow_dtype: bool) -> str:
    """The dtype of the target's elements, if the delta can be applied to them."""
    if target.refusal is not None:
        raise TargetError(f"{where} {target.refusal}")
    if tensor.shape != target.shape:
        raise BaseMismatchError(
            f"{where} has shape {list(target.shape)} in the model, the delta was made for {list(tensor.shape)}; give"
            " the model it was made for"
        )
    # NumPy has no bfloat16: its bits are kept as uint16, here as everywhere in the package.
    bare = is_array(target.tensor) and (target.dtype, tensor.dtype) == ("uint16", "bfloat16")
    dtype = "bfloat16" if bare else target.dtype
    addable = dtype in registry.ADDABLE
    if dtype == "?" or (tensor.op == "add" and not addable):
        raise BaseMismatchError(
            f"{where} has elements of {target.tensor.dtype} in the model, to which nothing can be added exactly;"
            " convert the fine-tune against this base, which stores whole values"
        )
    if tensor.dtype in (dtype, "unspecified") or (allow_dtype and tensor.op == "add"):
        return dtype
    hint = "; allow_dtype=True applies it all the same" if tensor.op == "add" else ""
    raise BaseMismatchError(
        f"{where} has elements of {dtype} in the model, but the delta was made against a {tensor.dtype} base, so it"
        f" cannot be checked{hint}"
    )
