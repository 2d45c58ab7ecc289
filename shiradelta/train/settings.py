"""The settings and the report of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from shiradelta.errors import ArgumentError
from shiradelta.format.codecs import VALUE_OPTIONS
from shiradelta.nonzeros.pruning import PRUNE_FROM, PRUNE_UNTIL
from shiradelta.select.shares import parse_sparsity
from shiradelta.text.kinds import check_prompt_share
from shiradelta.train.masks import can_be_larger
from shiradelta.util.arguments import check_least
from shiradelta.util.deprecated import renamed_arguments


@dataclass(frozen=True)
class TrainSettings:
    """Settings of a training run; `shiradelta train --help` explains them.

    Raises:
        ArgumentError: a setting is out of range or unknown.
    """

    sparsity: float | str = 0.01
    mask: str = "rand"
    targets: tuple[str, ...] = ()
    scope: str = "tensor"
    avoid: tuple[str, ...] = ()
    prune_from: float | None = None
    steps: int = 400
    batch: int = 32
    relative_lr: float | None = None
    tokens: int = 512
    seed: int = 0
    values: str = "int4"
    prompt_share: float = 0.0
    magnitude: bool = False

    def __post_init__(self) -> None:
        parse_sparsity(self.sparsity)
        if self.relative_lr is not None and not 0 < self.relative_lr < math.inf:
            raise ArgumentError(
                f"a relative learning rate of {self.relative_lr} trains nothing; give one above 0, such as 0.04"
            )
        check_least(1, steps=self.steps, batch=self.batch, tokens=self.tokens)
        if self.prune_from is not None and not 1 <= self.prune_from < math.inf:
            raise ArgumentError(
                f"pruning from {self.prune_from:g} x the sparsity is impossible; give 1 (no pruning) or more"
            )
        check_prompt_share(self.prompt_share)
        VALUE_OPTIONS.find(self.values)

    @property
    def pruning(self) -> tuple[int, float]:
        """(steps over which nonzeros are pruned, times the sparsity to start from); (0, 1) without pruning."""
        larger = can_be_larger(self.mask, parse_sparsity(self.sparsity)[1])
        begin = (PRUNE_FROM if larger else 1) if self.prune_from is None else self.prune_from
        return (math.ceil(PRUNE_UNTIL * self.steps) if begin > 1 else 0), begin

    def as_of_0_1(self) -> dict[str, Any]:
        """The settings under their names in 0.1, which identify an interrupted run."""
        renamed = {"prune_from": "fall_from", "relative_lr": "rate"}
        added = {name for name in ("prompt_share", "magnitude") if not getattr(self, name)}
        return {renamed.get(name, name): value for name, value in vars(self).items() if name not in added}


_take_old_names = renamed_arguments(fall_from="prune_from", rate="relative_lr")
TrainSettings.__init__ = _take_old_names(TrainSettings.__init__)  # type: ignore[method-assign]


@dataclass(kw_only=True)
class TrainReport:
    """The result of a training run.

    Attributes:
        out: the file.
        tensors, nnz, numel: tensors trained, nonzeros in them, elements of them.
        examples, held_out: examples to train on, and to measure on.
        steps: optimizer steps.
        relative_lr: the learning rate, relative to the RMS of each weight.
        before, trained, after: held-out loss of the base, of the best state, and with the values that the file stores.
        seconds: duration of the run.
        file_bytes: size of the file.
        history: (step, running mean of the training loss, held-out loss).
    """

    out: str
    tensors: int
    nnz: int
    numel: int
    examples: int
    held_out: int
    steps: int
    relative_lr: float
    before: float
    trained: float
    after: float
    seconds: float
    file_bytes: int
    history: list[tuple[int, float, float]] = field(default_factory=list)
