"""Makes a family's folder of members, and of examples that say which prompts each expert is for."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from shiradelta.errors import ArgumentError, SourceError, TargetError
from shiradelta.experts.family import BASE, ExpertFamily, names_of, open_family, write_index
from shiradelta.experts.features import DIMS, Sketch, adam_scales, unit
from shiradelta.experts.gradients import NonzeroGradients
from shiradelta.format.arithmetic import Array, Float32
from shiradelta.hotswap.session import HotSwap
from shiradelta.io.reader import open_delta
from shiradelta.train.gradients import Loss
from shiradelta.util.arguments import ANY, CALL, LIST, PATH, PATHS, WHOLE, ArgumentKind, check_least, checked, is_path
from shiradelta.util.files import os_errors
from shiradelta.util.progress import Progress

#: Examples whose gradients give the scales.
SCALED_BY = 256

_MEMBERS = ArgumentKind("a list of paths", lambda value: PATHS.holds(value) and not is_path(value))


@checked(
    model=ANY, experts=_MEMBERS, examples=LIST, groups=ANY, prompt_loss=CALL, base=PATH, dims=WHOLE, prompt_batch=WHOLE
)
def assemble_family(
    model: nn.Module,
    base: str | os.PathLike[str],
    experts: Sequence[str | os.PathLike[str]],
    examples: Sequence[Any],
    groups: Sequence[int],
    prompt_loss: Loss,
    out: str | os.PathLike[str],
    *,
    dims: int = DIMS,
    seed: int = 0,
    prompt_batch: int = 1,
    progress: Progress = lambda what, done, total: None,
) -> ExpertFamily:
    """Makes a family of deltas that exist already, such as those that `convert` made of ELREA's LoRAs.

    Args:
        model: the base model, with nothing on its weights.
        base: the base delta, a `.shd` file.
        experts: the experts, `.shd` files, each a delta from the base model.
        examples: some examples for each expert.
        groups: the number of each example's expert, from 0.
        prompt_loss: loss(model, [example]) on the prompt's tokens alone.
        out: the folder to make; there must be none of that name.
        dims: dimensions of the projected gradients.
        seed: of the projection.
        prompt_batch: examples whose gradients are taken together, as `train_family` takes it.
        progress: called with (what, done, total).

    Raises:
        ArgumentError: an argument is out of range, an expert has no example, or an example no expert, or two experts
            are the same delta.
        TargetError: the folder cannot be made.
        BaseMismatchError: a delta is another model's.
        SourceError: a delta does more than add, or does not say which base it is for.
        ShiraDeltaError: the gradient of an example is not finite, or zero.
    """
    check_numbers(len(examples), len(experts), dims, prompt_batch)
    labels = group_labels(groups, len(examples), len(experts))
    with making(Path(out)) as folder:
        check = HotSwap(model)
        for name, path in zip(names_of(len(experts)), [base, *experts], strict=True):
            check.load(name, path)
            _check_fingerprints(Path(path))
            with os_errors(Path(path), "cannot be copied"):
                shutil.copyfile(path, folder / f"{name}.shd")
        _digests(folder, len(experts))
        scales, features = measured(model, folder, examples, prompt_loss, dims, seed, progress, prompt_batch)
        return replace(finish(folder, scales, features, labels, seed), folder=Path(out))


def _check_fingerprints(path: Path) -> None:
    """Raises SourceError if nothing tells that a delta is for the model it was loaded on."""
    with open_delta(path) as delta:
        # What does more than add is refused as such.
        lacking = [name for name, one in delta.items() if one.operation.adds and one.base_fingerprint is None]
    if lacking:
        raise SourceError(
            f"{path}: tensor {lacking[0]!r} has no fingerprint, so it may be for another base; convert its source"
            " again, with --base"
        )


def check_numbers(
    examples: int, experts: int, dims: int, prompt_batch: int = 1, expert_steps: int | None = None
) -> None:
    """Raises ArgumentError if a number is out of range, or there are fewer examples than experts."""
    check_least(2, experts=experts)
    check_least(1, expert_steps=expert_steps, dims=dims, prompt_batch=prompt_batch)
    if examples < experts:
        raise ArgumentError(f"{examples} examples are too few for {experts} experts; give more")


def group_labels(groups: Sequence[int], examples: int, experts: int) -> Array:
    """The groups as int64 [examples].  Raises ArgumentError unless each expert has examples, and each example one."""
    labels = np.asarray(groups)
    if labels.shape != (examples,) or labels.dtype.kind not in "iu":
        raise ArgumentError(
            f"groups are no whole number for each of the {examples} examples; give the experts' numbers"
        )
    if sorted(set(labels.tolist())) != list(range(experts)):
        raise ArgumentError(f"groups are not the numbers 0 to {experts - 1}; give examples for each expert")
    return labels.astype(np.int64)


def measured(
    model: nn.Module,
    folder: Path,
    examples: Sequence[Any],
    prompt_loss: Loss,
    dims: int,
    seed: int,
    progress: Progress,
    batch: int,
) -> tuple[dict[str, Array], Float32]:
    """(scales of the base delta's gradients, the examples' features), with the folder's base delta on the weights."""
    path = folder / f"{BASE}.shd"
    swap = HotSwap(model)
    swap.load(BASE, path)
    with swap.applied(BASE):
        gradients = NonzeroGradients(model, path)
        order = random.Random(seed).sample(range(len(examples)), min(SCALED_BY, len(examples)))
        scales = adam_scales(gradients, [examples[index] for index in order], prompt_loss, progress, batch)
        sketch = Sketch(gradients, scales, dims, seed)
        return scales, sketch.features(examples, prompt_loss, progress, batch)


def finish(folder: Path, scales: dict[str, Array], features: Float32, labels: Array, seed: int) -> ExpertFamily:
    """Writes the index of a folder that has all members, and reads the family."""
    counts = np.bincount(labels)
    centroids = np.stack([unit(features[labels == number].mean(0)) for number in range(len(counts))])
    digests = _digests(folder, len(counts))
    write_index(ExpertFamily(folder, digests, tuple(counts.tolist()), centroids, scales, seed))
    return open_family(folder)


def _digests(folder: Path, experts: int) -> dict[str, str]:
    """The digest of each member.  Raises ArgumentError if two experts are the same delta, which is never averaged."""
    digests: dict[str, str] = {}
    for name in names_of(experts):
        with open_delta(folder / f"{name}.shd") as delta:
            twins = [other for other, digest in digests.items() if other != BASE and digest == delta.digest]
            if twins:
                raise ArgumentError(
                    f"{twins[0]} and {name} are the same delta, so no route can average them; give each expert a delta"
                    " of its own, or train for longer"
                )
            digests[name] = delta.digest
    return digests


def check_absent(out: Path) -> None:
    """Raises TargetError if there is something of that name, or no folder to make it in."""
    if os.path.lexists(out):
        raise TargetError(f"{out}: is there already; give another name, or move it away")
    if not out.absolute().parent.is_dir():
        raise TargetError(f"{out}: cannot be made (no such folder: {out.absolute().parent}); make that first")


@contextmanager
def making(out: Path) -> Iterator[Path]:
    """A folder that gets its name when the block succeeds, and is deleted otherwise.

    Raises:
        TargetError: there is something of that name, or the folder cannot be made.
    """
    check_absent(out)
    with os_errors(out):
        scratch = tempfile.TemporaryDirectory(prefix=".shiradelta-", dir=out.absolute().parent)
    with scratch:
        folder = Path(scratch.name) / out.name
        folder.mkdir()
        yield folder
        with os_errors(out):
            os.rename(folder, out)
