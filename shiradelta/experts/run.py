"""Trains a family for a model's folder on a file of examples, and tells whether routes are worth it."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from shiradelta.errors import DivergedError, SourceError, TargetError
from shiradelta.experts.assembling import check_absent, check_numbers
from shiradelta.experts.clusters import check_clustering
from shiradelta.experts.family import BASE, ExpertFamily
from shiradelta.experts.features import DIMS
from shiradelta.experts.live import TOGETHER
from shiradelta.experts.routing import ExpertRouter
from shiradelta.experts.texts import check_predicts_prompts, prompt_loss
from shiradelta.experts.training import FamilyTraining
from shiradelta.experts.unfinished import UnfinishedFamily
from shiradelta.format import registry
from shiradelta.io.reader import open_delta
from shiradelta.text.kinds import COMPLETION, TEXT
from shiradelta.train.gradients import Loss
from shiradelta.train.settings import TrainSettings
from shiradelta.train.subject import TrainingSubject
from shiradelta.util.files import check_target, os_errors
from shiradelta.util.memory import advising_on_memory
from shiradelta.util.progress import Progress


@dataclass(frozen=True, kw_only=True)
class FamilyReport:
    """The result of a family's training.

    Attributes:
        out: the folder.
        experts: name -> number of examples that it was trained on.
        nnz: nonzeros of each member.
        examples, held_out: examples to train on, and to measure on.
        steps: optimizer steps of all members together.
        relative_lr: the learning rate, relative to the RMS of each weight.
        before: held-out loss of the base model.
        one_delta: held-out loss of the family's base delta.
        longer: of one delta that was trained for as many steps as the whole family; None without.
        after: of the family: every group of prompts with the weight average of its route.
        seconds: duration of the run.
        bytes: size of the folder.
    """

    out: str
    experts: dict[str, int]
    nnz: int
    examples: int
    held_out: int
    steps: int
    relative_lr: float
    before: float
    one_delta: float
    longer: float | None
    after: float
    seconds: float
    bytes: int

    @property
    def warning(self) -> str | None:
        """What speaks against the family; None if it is the best of what was measured."""
        others = {"its base delta, base.shd": self.one_delta}
        if self.longer is not None:
            others["one delta trained as long"] = self.longer
        best = min(others, key=others.__getitem__)
        if self.after <= others[best]:
            return None
        return (
            f"the family is worse than {best}, on {self.held_out} examples held out (loss {self.after:.4g},"
            f" {others[best]:.4g}); use that instead, or try fewer experts, or more steps"
        )


def run_family(
    model_folder: Path,
    examples_file: Path,
    out: Path,
    settings: TrainSettings,
    *,
    experts: int = 4,
    expert_steps: int | None = None,
    dims: int = DIMS,
    longer: Path | None = None,
    device: str | None = None,
    log: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda what, done, total: None,
    accept_worse: bool = False,
) -> FamilyReport:
    """Trains a family.  The same call goes on after an interruption, and ends in the same files.

    Args:
        model_folder: a folder that transformers loads; the model is trained in the dtype in which it is stored.
        examples_file: JSON Lines, or a data set of Hugging Face: prompts with completions, or texts.
        out: the folder to make.  The state of an interrupted run is kept beside it, as `OUT.train`.
        settings: of the base delta's training.
        experts: number of clusters, and of experts.
        expert_steps: of each expert; None lets it see its examples as often as the base delta did.
        dims: dimensions of the projected gradients.
        longer: a `.shd` file to write: one delta that is trained for as many steps as the whole family, to compare.
        device: "cpu", "cuda", ...; None takes a GPU if there is one.
        log: called with lines for the user.
        progress: called with (what, done, total).
        accept_worse: write the folder even if the family is worse than the base model on the held-out examples.

    Raises:
        SourceError: the model or the examples cannot be used.
        TargetError: the folder or the file cannot be written there; raised before the work.
        DivergedError: training gave NaN, or the family is worse than the base.
        ArgumentError: an argument is out of range, or the examples do not fall into so many clusters.
        ShiraDeltaError: memory ran out.
    """
    start = time.monotonic()
    check_absent(out)
    kept = out.with_name(out.name + ".train")
    if longer is not None:
        check_target(longer, registry.MAGIC, "a .shd file")
        if longer.absolute() in (out.absolute(), kept.absolute()):
            raise TargetError(f"{longer}: is a folder of the family; give the delta to compare with another name")
    check_clustering()
    advice = f": --batch {max(1, settings.batch // 2)} halves what a step takes, or cut examples with --tokens"
    with advising_on_memory(advice):
        subject = TrainingSubject(model_folder, examples_file, settings, device)
        kind = subject.given.kind
        if kind is not COMPLETION and not kind.is_text:
            raise SourceError(
                f"{examples_file}: {' and '.join(kind.keys)} have no prompt to route by; give {COMPLETION.shape} or"
                f" {TEXT.shape}"
            )
        check_predicts_prompts(subject.model)
        check_numbers(len(subject.train), experts, dims, expert_steps=expert_steps)
        state = UnfinishedFamily(kept, subject.identity, log)
        training = FamilyTraining(
            subject.model, subject.train, subject.loss, settings, progress, state, subject.check_stored
        )
        run = _FamilyRun(subject, training, prompt_of(subject), log, progress)
        return run.go(out, experts, expert_steps, dims, longer, accept_worse, start)


def prompt_of(subject: TrainingSubject) -> Loss:
    """A loss of indices of examples, on their prompts."""
    plain: list[Any] = subject.given.plain
    of_prompts = prompt_loss(subject.tokenizer, subject.settings.tokens)

    def loss(model: nn.Module, indices: Sequence[int]) -> Tensor:
        with subject.casting:
            return of_prompts(model, [plain[index] for index in indices])

    return loss


def _beside(path: Path, stack: ExitStack) -> Path:
    """A scratch folder on the same file system, so that what is made there can be moved to `path`."""
    with os_errors(path):
        scratch = tempfile.TemporaryDirectory(prefix=".shiradelta-", dir=path.absolute().parent)
    return Path(stack.enter_context(scratch))


@dataclass
class _FamilyRun:
    subject: TrainingSubject
    training: FamilyTraining
    prompt_loss: Loss
    log: Callable[[str], None]
    progress: Progress

    def go(
        self,
        out: Path,
        experts: int,
        expert_steps: int | None,
        dims: int,
        longer: Path | None,
        accept_worse: bool,
        start: float,
    ) -> FamilyReport:
        subject, settings = self.subject, self.subject.settings
        before = subject.measure(subject.held_out)
        with ExitStack() as stack:
            written = _beside(out, stack) / out.name
            try:
                family = self.training.family(written, self.prompt_loss, experts, None, expert_steps, dims, TOGETHER)
                steps = settings.steps + sum(self.training.expert_steps)
                one = None if longer is None else _beside(longer, stack) / "longer.shd"
                if one is not None:
                    self.training.settings = replace(settings, steps=steps)
                    self.training.base(range(len(subject.train)), one)
            except KeyboardInterrupt:
                self.log(f"the same command goes on from what is in {self.training.state}")
                raise
            losses = self._losses(family, one)
            if not losses["after"] <= before and not accept_worse:  # NaN is worse, too
                raise self._worse(before, losses["after"])
            with open_delta(family.path(BASE)) as delta:
                nnz = sum(tensor.nnz for tensor in delta.values())
            size = sum(path.stat().st_size for path in written.iterdir())
            if one is not None and longer is not None:  # first, since the family is what a repeated call refuses
                with os_errors(longer):
                    os.replace(one, longer)
            with os_errors(out):
                written.rename(out)
        self.training.finished()
        return FamilyReport(
            out=str(out),
            experts=dict(zip(family.experts, family.examples, strict=True)),
            nnz=nnz,
            examples=len(subject.train),
            held_out=len(subject.held_out),
            steps=steps,
            relative_lr=self.training.relative_lr or math.nan,
            before=before,
            seconds=round(time.monotonic() - start, 1),
            bytes=size,
            **losses,
        )

    def _losses(self, family: ExpertFamily, one: Path | None) -> dict[str, Any]:
        """Held-out losses, with the values that the files store."""
        subject = self.subject
        router = ExpertRouter(subject.model, family, self.prompt_loss, TOGETHER)
        with router.swap.applied(BASE):
            losses: dict[str, Any] = {"one_delta": subject.measure(subject.held_out), "longer": None}
        if one is not None:
            router.swap.load("longer", one)
            with router.swap.applied("longer"):
                losses["longer"] = subject.measure(subject.held_out)
        total = 0.0
        for group in router.groups(subject.held_out, self.progress):
            with router.swap.applied(group.strengths):
                total += len(group.indices) * subject.measure([subject.held_out[index] for index in group.indices])
        return losses | {"after": total / len(subject.held_out)}

    def _worse(self, before: float, after: float) -> DivergedError:
        smaller = f"{(self.training.relative_lr or 0) / 4:.2g}"
        return DivergedError(
            f"the family is worse than the base model on {len(self.subject.held_out)} examples held out (loss"
            f" {after:.4g}, {before:.4g} before); give a smaller --relative-lr, such as {smaller}, more examples, or"
            f" more --steps. --accept-worse writes it all the same, from the state in {self.training.state}"
        )
