"""Trains an adapter for a model's folder on a file of examples, and writes a `.shd` file."""

from __future__ import annotations

import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shiradelta.errors import DivergedError, SourceError
from shiradelta.format import registry
from shiradelta.io.download import local_model
from shiradelta.models import loading
from shiradelta.models.candidates import refuse_several
from shiradelta.models.checkpoint import Checkpoint, open_checkpoint
from shiradelta.models.dtypes import TORCH_DTYPES
from shiradelta.models.library import match_names
from shiradelta.models.provenance import base_names
from shiradelta.models.sentence import modules_not_run
from shiradelta.nonzeros.pruning import PRUNE_FROM
from shiradelta.nonzeros.schedule import cycle
from shiradelta.nonzeros.unfinished import UnfinishedRun
from shiradelta.select.shares import parse_sparsity
from shiradelta.text.batches import batches, by_length, mean_over, split
from shiradelta.text.examples import training_examples
from shiradelta.text.pooling import find_pooling
from shiradelta.text.read import read_file
from shiradelta.train.attaching import attach, reattach
from shiradelta.train.masks import MASKS
from shiradelta.train.plot import draw_losses
from shiradelta.train.recipe import HELD_OUT, calibration, find_lr, optimizer_of, take_step
from shiradelta.train.run_state import BestState, History, RunState, load_run, save_run
from shiradelta.train.settings import TrainReport, TrainSettings
from shiradelta.train.targets import find_weights
from shiradelta.train.tuner import Tuner
from shiradelta.util.deprecated import renamed_arguments, renamed_names
from shiradelta.util.files import check_target
from shiradelta.util.memory import advising_on_memory
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
        device: "cpu", "cuda", ...; None takes a GPU if there is one.
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
            folder=local_model(model_folder),
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
        refuse_several(folder)
        checkpoint = open_checkpoint(folder)
        given = read_file(examples_file)
        kind = given.kind
        loader, _ = loading.model_class(folder, folder)
        tokenizer = loading.load_tokenizer(folder)
        if kind.predicts and not loader.can_generate():
            raise SourceError(
                f"{folder}: {loader.__name__} does not predict the next token, which {' and '.join(kind.keys)}"
                " train; for an encoder, give pairs: anchor and positive"
            )
        if not kind.predicts and (left_out := modules_not_run(folder)):
            raise SourceError(
                f"{folder}: {' and '.join(kind.keys)} train the embedding, and its {', '.join(left_out)} would not be"
                " run; train the SentenceTransformer in a loop of your own (shiradelta.train.attach)"
            )
        self.device = loading.pick_device(device)
        dtype = _stored_dtype(checkpoint)
        # Activations in float16 may overflow, so products are made in bfloat16; the weights stay float16.
        mixed = dtype == torch.float16
        self.casting: Any = torch.autocast(self.device.type, torch.bfloat16) if mixed else nullcontext()
        self.model = loading.load_model(folder, folder, self.device, dtype).eval()
        self.examples = training_examples(
            given, tokenizer, self.model, settings.tokens, find_pooling(folder), settings.prompt_share
        )
        self.train, self.held_out = split(len(given.rows), HELD_OUT, settings.seed)
        identity = [str(folder.resolve()), given.rows, settings.as_of_0_1()]
        self.unfinished = UnfinishedRun(out.with_name(out.name + ".train"), identity)
        self.checkpoint = checkpoint
        self.history: History = []
        self.best: BestState | None = None

    def go(self, plot: Path | None, accept_worse: bool) -> TrainReport:
        start = time.monotonic()
        settings = self.settings
        resumed = load_run(self.unfinished, self.log)
        self.history = [] if resumed is None else resumed.history
        before = self.history[0][2] if self.history else self._measure()
        tuner = self._attach(resumed)
        optimizer = optimizer_of(tuner, self.units, settings.mask)
        step = 0
        if resumed is not None:
            resumed.restore(tuner, optimizer, self.checkpoint.root, self.unfinished.path)
            step, self.best = resumed.step, resumed.best
            self.log(f"going on from step {step} of {settings.steps}, found in {self.unfinished.path}")
        self.relative_lr = settings.relative_lr or self._find_lr(tuner, resumed)
        what = f"training {tuner.nnz:,} of {tuner.numel:,} weights on {len(self.train):,} examples, {self.device}"
        self.log(f"{what}; pruned to a share of {settings.sparsity}" if settings.pruning[0] else what)
        self._train(tuner, optimizer, step, before)
        about = {
            "mask": settings.mask,
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
        settings = self.settings
        # A search takes long, and finds more than a mask.
        if resumed is not None and MASKS.find(settings.mask).search is not None:
            tuner = reattach(self.model, resumed.of_tuner, settings.mask)
            self.units = tuner.units()
            return tuner
        targets: list[str] | None = list(settings.targets) or None
        mask: str | dict[str, Tensor] = settings.mask if resumed is None else resumed.mask
        weights = find_weights(self.model, targets)
        prune_steps, prune_from = settings.pruning
        starting = prune_steps if resumed is None else 0  # a resumed run continues to prune the mask of its state
        tuner = attach(
            self.model,
            settings.sparsity,
            mask,
            targets,
            calibration(settings, self.train, self.examples.lengths),
            loss=self._loss,
            scope=settings.scope,
            avoid=settings.avoid,
            seed=settings.seed,
            prune_steps=starting,
            prune_from=prune_from if starting else PRUNE_FROM,
            magnitude=settings.magnitude,
            progress=self.progress,
        )
        if prune_steps and not starting:
            share, _ = parse_sparsity(settings.sparsity)
            tuner.prune(prune_steps, share, weights.values() if settings.scope == "model" else None)
        self._check_stored(tuner)
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

    def _check_stored(self, tuner: Tuner) -> None:
        """Checks that the folder stores the weights with the bits that are trained, since the file is made for them."""
        shapes = {view.name: view.shape for views in tuner.views.values() for view in views}
        found = match_names(shapes, self.checkpoint).names
        for name, weight in tuner.weights.items():
            own = str(weight.dtype).removeprefix("torch.")
            for view in tuner.views[name]:
                slot = self.checkpoint[found[view.name]] if view.name in found else None
                if slot is None or slot.dtype.name != own or slot.shape != view.shape:
                    where = "not in the folder"
                    if slot is not None and slot.dtype.name != own:
                        where = f"stored as {slot.dtype.name}, but trained as {own}"
                    elif slot is not None:
                        where = f"stored as {list(slot.shape)}, and saved as {list(view.shape)}"
                    raise SourceError(f"{self.checkpoint.root}: {view.name!r} is {where}; leave it out of --targets")

    def _loss(self, model: nn.Module, indices: Sequence[int]) -> Tensor:
        with self.casting:
            return self.examples.loss(model, indices)

    def _measure(self) -> float:
        """Mean loss on the held-out examples."""
        parts = by_length(self.held_out, self.examples.lengths, self.settings.batch)
        return mean_over(parts, lambda part: {"loss": self._loss(self.model, part).item()})["loss"]

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

    def _train(self, tuner: Tuner, optimizer: torch.optim.Optimizer, first: int, before: float) -> None:
        settings = self.settings
        stream = batches(self.train, self.examples.lengths, settings.batch, settings.seed)
        every = max(1, settings.steps // EVALUATIONS)
        mean = self.history[-1][1] if self.history else before
        kept = first
        try:
            for step, indices in islice(enumerate(stream), first, settings.steps):
                if step % every == 0 and (not self.history or self.history[-1][0] != step):
                    self._note(tuner, step, mean, self._measure() if step else before)
                if self.unfinished.is_due():
                    save_run(self.unfinished, tuner, optimizer, step, self.history, self.best, self.relative_lr)
                    kept = step
                mean = 0.9 * mean + 0.1 * self._step(tuner, optimizer, step, indices)
                self.progress(f"loss {mean:.3f}", step + 1, settings.steps)
            if self.history[-1][0] != settings.steps:  # a run that ended worse than its base has all its steps
                self._note(tuner, settings.steps, mean, self._measure())
            save_run(self.unfinished, tuner, optimizer, settings.steps, self.history, self.best, self.relative_lr)
        except KeyboardInterrupt:
            if kept:
                where = self.unfinished.path
                self.log(f"the same command goes on from step {kept} of {settings.steps}, kept in {where}")
            raise

    def _note(self, tuner: Tuner, step: int, mean: float, held_out: float) -> None:
        """Records a held-out loss, and the state if it is the best one with the final mask."""
        self.history.append((step, mean, held_out))
        if step > self.settings.pruning[0] and (self.best is None or held_out < self.best.loss):
            self.best = BestState.of(tuner, held_out)

    def _step(self, tuner: Tuner, optimizer: torch.optim.Optimizer, step: int, indices: Sequence[int]) -> float:
        loss, share = partial(self._loss, self.model, indices), cycle(step, self.settings.steps)
        found = take_step(tuner, optimizer, loss, self.relative_lr, share)
        if math.isnan(found):
            smaller = f"{self.relative_lr / 4:.2g}"
            raise DivergedError(f"training gave NaN at step {step}; give a smaller --relative-lr, such as {smaller}")
        return found


def _stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of most weights of a checkpoint.

    Raises:
        SourceError: weights of that dtype, such as quantised ones, cannot be trained.
    """
    sizes: Counter[str] = Counter()
    for slot in checkpoint.values():
        sizes[slot.dtype.name] += slot.numel
    name = sizes.most_common(1)[0][0]
    if name not in TORCH_DTYPES:
        raise SourceError(
            f"{checkpoint.root}: its weights are stored as {name}: quantised, or more precise than float32; train on"
            " the model in bfloat16, float16 or float32"
        )
    return TORCH_DTYPES[name]


__getattr__ = renamed_names(__name__, {"Settings": TrainSettings, "Report": TrainReport})
