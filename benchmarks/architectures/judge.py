"""Comparisons that use nothing of shiradelta: files as safetensors reads them, models as torch holds them."""

from __future__ import annotations

import filecmp
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

Tensors = Mapping[str, Tensor]
#: Two ways to compute B @ A in float32 differ by this much at most; a LoRA here changes weights by about 1.
TOLERANCE = 1e-5
#: Cosine of a fitted change with the fine-tune's: about 0.6 for the largest tenth of a random one, and 0.0 for others.
DIRECTION = 0.2


class WrongError(Exception):
    """A result that is not what it has to be; the message says what differs."""


def read(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, by file and name."""
    return {
        f"{path.relative_to(folder).as_posix()}:{name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def state(model: Any) -> dict[str, Tensor]:
    """A copy of a model's tensors, tied ones under each of their names."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def check_equal(found: Tensors, wanted: Tensors, what: str, base: Tensors | None = None) -> None:
    """Compares bit for bit.

    Args:
        found: what is judged.
        wanted: what it has to be.
        what: names `wanted` in the message.
        base: counts, where it is given, those of the wrong tensors that did not change at all.

    Raises:
        WrongError: they differ.
    """
    _check_names(found, wanted, what)
    _check([name for name in wanted if not _same(found[name], wanted[name])], found, wanted, what, base)


def check_close(found: Tensors, wanted: Tensors, what: str, base: Tensors | None = None) -> None:
    """Compares within `TOLERANCE`; arguments and errors are those of `check_equal`."""
    _check_names(found, wanted, what)
    differ = [
        name
        for name in wanted
        if found[name].shape != wanted[name].shape
        or not torch.allclose(found[name].float(), wanted[name].float(), rtol=TOLERANCE, atol=TOLERANCE)
    ]
    _check(differ, found, wanted, what, base)


def check_moved(found: Tensors, wanted: Tensors, base: Tensors, least: int) -> list[str]:
    """Each tensor of at least so many elements that the fine-tune changes has changed; returns their names.

    Raises:
        WrongError: one has not.
    """
    _check_names(found, wanted, "the fine-tune")
    changed = [name for name in wanted if wanted[name].numel() >= least and not _same(wanted[name], base[name])]
    left = [name for name in changed if _same(found[name], base[name])]
    if left:
        raise WrongError(f"{len(left)} of {len(changed)} tensors are still the base's: {_some(left)}")
    return changed


def check_direction(found: Tensors, wanted: Tensors, base: Tensors, least: int) -> None:
    """Each such tensor has moved in the fine-tune's direction; one that landed in another's place has not.

    Raises:
        WrongError: tensors have not moved, or elsewhere.
    """
    changed = check_moved(found, wanted, base, least)
    off = [name for name in changed if _cosine(found[name] - base[name], wanted[name] - base[name]) < DIRECTION]
    if off:
        raise WrongError(f"{len(off)} of {len(changed)} tensors have moved elsewhere: {_some(off)}")


def check_closer(found: Sequence[Tensor], wanted: Sequence[Tensor], base: Sequence[Tensor]) -> None:
    """A model's outputs are closer to the fine-tune's than the base's are.

    Raises:
        WrongError: they are not.
    """
    distance, before = (
        sum(float((o - w).square().sum() / w.square().sum()) for o, w in zip(outputs, wanted, strict=True))
        for outputs in (found, base)
    )
    if not distance < before:
        raise WrongError(f"outputs are {distance:.3g} from the fine-tune's, the base's {before:.3g}")


def check_files(found: Path, wanted: Path) -> None:
    """Two folders hold the same files with the same bytes; the journal that `revert` leaves aside.

    Raises:
        WrongError: they do not.
    """
    every = [sorted(path.relative_to(folder) for path in folder.rglob("*")) for folder in (found, wanted)]
    names = [[name for name in listed if name.parts[0] != ".shiradelta"] for listed in every]
    if names[0] != names[1]:
        raise WrongError(f"files are left or lost: {_some(map(str, set(names[0]) ^ set(names[1])))}")
    differ = [
        str(name) for name in names[1] if (wanted / name).is_file() and not _same_file(found / name, wanted / name)
    ]
    if differ:
        raise WrongError(f"files differ from the base's: {_some(differ)}")


def _check_names(found: Tensors, wanted: Tensors, what: str) -> None:
    lost, new = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    if lost or new:
        raise WrongError(f"not the tensors of {what}: {len(lost)} lost, {len(new)} new: {_some(lost | new)}")


def _check(differ: list[str], found: Tensors, wanted: Tensors, what: str, base: Tensors | None) -> None:
    if differ:
        left = [] if base is None else [name for name in differ if _same(found[name], base[name])]
        still = f", {len(left)} of them still the base's" if left else ""
        raise WrongError(f"{len(differ)} of {len(wanted)} tensors are not {what}{still}: {_some(differ)}")


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)))


def _cosine(one: Tensor, other: Tensor) -> float:
    return float(torch.cosine_similarity(one.flatten().double(), other.flatten().double(), dim=0))


def _same_file(one: Path, other: Path) -> bool:
    return filecmp.cmp(one, other, shallow=False)


def _some(names: Any) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:2]) + (", ..." if len(ordered) > 2 else "")
