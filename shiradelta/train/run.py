"""Trains an adapter for a model's folder on a file of examples, and writes a `.shd` file."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from shiradelta.errors import DivergedError
from shiradelta.format import registry
from shiradelta.models.placement import named
from shiradelta.models.provenance import base_names
from shiradelta.nonzeros.schedule import cycle
from shiradelta.nonzeros.unfinished import UnfinishedRun
from shiradelta.text.batches import batches
from shiradelta.train.mask_registry import is_searched
from shiradelta.train.plot import draw_losses
from shiradelta.train.recipe import attached, find_lr, optimizer_of, take_step
from shiradelta.train.run_state import BestState, History, RunState, load_run, save_run
from shiradelta.train.settings import TrainReport, TrainSettings
from shiradelta.train.subject import TrainingSubject
from shiradelta.train.tuner import Tuner
from shiradelta.util.deprecated import renamed_arguments, renamed_names
from shiradelta.util.files import check_target
from shiradelta.util.interrupts import interrupts_held_back
from shiradelta.util.memory import advising_on_memory, gpu_peak
from shiradelta.util.plots import check_plot
from shiradelta.util.progress import Progress

#: How often the held-out loss is measured.
EVALUATIONS = 20


@renamed_arguments(say="log")
def run(
    model_folder: Path,
    examples_file: Path,
    out: Path,
    settings: TrainSettings,
    device: str | None = None,
    plot: Path | None = None,
    log: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda what, done, total: None,
    accept_worse: bool = False,
) -> TrainReport:
    """Trains an adapter.  The same call resumes an interrupted run, and ends in the same file.

    Args:
        model_folder: a folder that transformers loads; the model is trained in the dtype in which it is stored.
        examples_file: JSON Lines, or a data set of Hugging Face (`shiradelta.text.read`).
        out: the file to write.  The state of an interrupted run is kept beside it, as `OUT.train`.
        settings: the settings of the run.
        device: "cpu", "cuda", "cuda:1", ...; several, such as "cuda:0,cuda:1", share out the layers of the model.  None
            takes a GPU if there is one, and all GPUs where the weights do not fit into one.
        plot: a PNG of the losses to write.
        log: called with lines for the user.
        progress: called with (what, done, total).
        accept_worse: write the file even if the model with it is worse than the base on the held-out examples.

    Raises:
        SourceError: the model or the examples cannot be used.
        TargetError: the file or the plot cannot be written there; raised before the work.
        DivergedError: training gave NaN, or the model is worse than the base.
        ShiraDeltaError: memory ran out.
    """
    check_target(out, registry.MAGIC, "a .shd file")
    if plot is not None:
        check_plot(plot)
    advice = (
        f": --batch {max(1, settings.batch // 2)} halves what a step takes, or cut examples with --tokens"
        f" {max(1, settings.tokens // 2)}"
    )
    with advising_on_memory(advice):
        run = _Run(
            folder=model_folder,
            examples_file=examples_file,
            out=out,
            settings=settings,
            device=device,
            log=log,
            progress=progress,
        )
        return run.go(plot, accept_worse)


class _Run:
    def __init__(
        self,
        folder: Path,
        examples_file: Path,
        out: Path,
        settings: TrainSettings,
        device: str | None,
        log: Callable[[str], None],
        progress: Progress,
    ) -> None:
        self.settings, self.out, self.log, self.progress = settings, out, log, progress
        self.subject = subject = TrainingSubject(folder, examples_file, settings, device)
        self.model, self.examples, self.checkpoint = subject.model, subject.examples, subject.checkpoint
        self.train, self.held_out = subject.train, subject.held_out
        self.unfinished = UnfinishedRun(out.with_name(out.name + ".train"), subject.identity)
        self.history: History = []
        self.best: BestState | None = None
        self.done = 0  # steps

    def go(self, plot: Path | None, accept_worse: bool) -> TrainReport:
        start = time.monotonic()
        settings, subject = self.settings, self.subject
        resumed = load_run(self.unfinished, self.log)
        self.history = [] if resumed is None else resumed.history
        before = self.history[0][2] if self.history else self._measure()
        tuner = self._attach(resumed)
        if resumed is None and is_searched(settings.mask):
            save_run(self.unfinished, tuner, None, 0, [], None, None)
        optimizer = optimizer_of(tuner, self.units, settings.mask)
        if resumed is not None:
            resumed.restore(tuner, optimizer, self.checkpoint.root, self.unfinished.path)
            self.done, self.best = resumed.step, resumed.best
            self.log(f"going on from step {self.done} of {settings.steps}, found in {self.unfinished.path}")
        self.relative_lr = settings.relative_lr or self._find_lr(tuner, resumed)
        where = f"{named(subject.devices)}{gpu_peak(subject.devices)}"
        what = f"training {tuner.nnz:,} of {tuner.numel:,} weights on {len(self.train):,} examples, {where}"
        self.log(f"{what}; pruned to a share of {settings.sparsity}" if settings.pruning[0] else what)
        self._train(tuner, optimizer, before)
        about = {
            "mask": settings.mask,
            "seed": str(settings.seed),
            "prune_from": f"{settings.pruning[1]:g}",
            "steps": str(settings.steps),
            "examples": str(len(self.train)),
            **base_names(self.checkpoint.root),
        }
        tensors, nnz, numel = len(tuner.values), tuner.nnz, tuner.numel
        trained = self.history[-1][2]
        if self.best is not None and self.best.loss <= trained:
            self.best.restore(tuner)
            trained = self.best.loss
        with tempfile.TemporaryDirectory(prefix=".shiradelta-", dir=self.out.absolute().parent) as scratch:
            written = Path(scratch) / self.out.name
            tuner.save(written, settings.values, about)
            after = self._measure_file(tuner, written)
            if after > before and not accept_worse:
                raise self._worse(before, trained, after)
            written.replace(self.out)
        self.unfinished.remove()
        if plot is not None:
            draw_losses(plot, self.history)
        return TrainReport(
            out=str(self.out),
            tensors=tensors,
            nnz=nnz,
            numel=numel,
            examples=len(self.train),
            held_out=len(self.held_out),
            steps=settings.steps,
            relative_lr=self.relative_lr,
            before=before,
            trained=trained,
            after=after,
            seconds=round(time.monotonic() - start, 1),
            file_bytes=self.out.stat().st_size,
            history=self.history,
        )

    def _attach(self, resumed: RunState | None) -> Tuner:
        lengths = self.examples.lengths
        tuner = attached(self.model, self._loss, self.settings, self.train, lengths, resumed, self.progress)
        self.subject.check_stored(tuner)
        self.units = tuner.units()
        return tuner

    def _find_lr(self, tuner: Tuner, resumed: RunState | None) -> float:
        """The learning rate, relative to `units`, that short runs recommend; a resumed run's own."""
        if resumed is not None and resumed.relative_lr is not None:
            return resumed.relative_lr

        def tried(rate: float, loss: float, steps: int) -> None:
            self.log(f"learning rate {rate:.2g} of a weight's RMS: loss {loss:.4g} after {steps} steps")

        loss = partial(self._loss, self.model)
        return find_lr(tuner, self.units, loss, self.settings, self.train, self.examples.lengths, tried)

    def _loss(self, model: nn.Module, indices: Sequence[int]) -> Tensor:
        return self.subject.loss(model, indices)

    def _measure(self) -> float:
        """Mean loss on the held-out examples."""
        return self.subject.measure(self.held_out)

    def _worse(self, before: float, trained: float, after: float) -> DivergedError:
        """The error of a run that ends worse than the base."""
        if trained < before:
            why, remedy = f"rounding to {self.settings.values} loses what was gained", "give --values int8 or f32"
        else:
            smaller = f"{self.relative_lr / 4:.2g}"
            why = "no state on the way is better"
            remedy = f"give a smaller --relative-lr, such as {smaller}, more examples, or more --steps"
        return DivergedError(
            f"the trained model is worse than its base on {len(self.held_out)} examples held out (loss {after:.4g},"
            f" {before:.4g} before), and {why}; {remedy}. --accept-worse writes the file all the same, from the state"
            f" in {self.unfinished.path}"
        )

    def _measure_file(self, tuner: Tuner, file: Path) -> float:
        """Mean loss on the held-out examples with the values as the file stores them, in 4 bits for example."""
        from shiradelta.hotswap.session import HotSwap

        tuner.detach()
        swap = HotSwap(self.model)
        swap.load("file", file)
        with swap.applied("file"):
            return self._measure()

    def _train(self, tuner: Tuner, optimizer: torch.optim.Optimizer, before: float) -> None:
        settings = self.settings
        stream = batches(self.train, self.examples.lengths, settings.batch, settings.seed)
        every = max(1, settings.steps // EVALUATIONS)
        mean = self.history[-1][1] if self.history else before

        def save() -> None:
            save_run(self.unfinished, tuner, optimizer, self.done, self.history, self.best, self.relative_lr)

        try:
            for step, indices in islice(enumerate(stream), self.done, settings.steps):
                if step % every == 0 and (not self.history or self.history[-1][0] != step):
                    self._note(tuner, step, mean, self._measure() if step else before)
                if self.unfinished.is_due():
                    save()
                mean = 0.9 * mean + 0.1 * self._step(tuner, optimizer, step, indices)
                self.progress(f"loss {mean:.3f}", step + 1, settings.steps)
            if self.history[-1][0] != settings.steps:  # a run that ended worse than its base has all its steps
                self._note(tuner, settings.steps, mean, self._measure())
            save()
        except (KeyboardInterrupt, SystemExit):  # the latter by SIGTERM
            if self.done:
                save()
                where = self.unfinished.path
                self.log(f"the same command goes on from step {self.done} of {settings.steps}, kept in {where}")
            raise

    def _note(self, tuner: Tuner, step: int, mean: float, held_out: float) -> None:
        """Records a held-out loss, and the state if it is the best one with the final mask."""
        with interrupts_held_back():
            self.history.append((step, mean, held_out))
            if step > self.settings.pruning[0] and (self.best is None or held_out < self.best.loss):
                self.best = BestState.of(tuner, held_out)

    def _count(self) -> None:
        self.done += 1

    def _step(self, tuner: Tuner, optimizer: torch.optim.Optimizer, step: int, indices: Sequence[int]) -> float:
        loss, share = partial(self._loss, self.model, indices), cycle(step, self.settings.steps)
        found = take_step(tuner, optimizer, loss, self.relative_lr, share, self._count)
        if math.isnan(found):
            smaller = f"{self.relative_lr / 4:.2g}"
            raise DivergedError(f"training gave NaN at step {step}; give a smaller --relative-lr, such as {smaller}")
        return found


__getattr__ = renamed_names(__name__, {"Settings": TrainSettings, "Report": TrainReport})
