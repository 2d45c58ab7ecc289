"""The method "train": mask and values by gradient descent, resumable."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path

from shiradelta.errors import DivergedError
from shiradelta.fit.choices import MASKS, RENAMED_MASKS, FitMask
from shiradelta.fit.fitted import DISTANCE, FitJob, Fitted
from shiradelta.fit.refit.whole import fit as refit
from shiradelta.fit.refit.whole import solve
from shiradelta.fit.state import FitState, load_state, save_state
from shiradelta.fit.subject import Subject
from shiradelta.fit.training import LOSS, FitTrainer, TrainingPlan
from shiradelta.models.placement import named
from shiradelta.nonzeros.unfinished import UnfinishedRun
from shiradelta.nonzeros.vector import Nonzeros
from shiradelta.util.memory import gpu_peak

#: Steps on a GPU.  A CPU takes as many as fit into this many seconds, but not fewer than the least; where even these
#: take more than the most, least squares are all.
STEPS, CPU_SECONDS, CPU_LEAST, CPU_MOST = 1_000, 600, 40, 900
#: With fewer steps than these, what least squares gave is not pruned, and is the result where training is no better.
REFIT_STEPS = 100
#: The mask where none is asked for.  Where it leaves more than this share of the base's distance, and there are so many
#: steps at least, training comes farther from the largest changes ("prune"), as on small models.
MASK, LEFT, PRUNE_STEPS = "refit", 0.25, 300
WORSE = (
    "training from the largest changes was no better than least squares, which are the result; give more examples, or"
    " --fit-mask refit"
)


def fit(job: FitJob, subject: Subject, nonzeros: Nonzeros, result: Fitted) -> None:
    """Trains mask and values; afterwards the weights hold them.

    Raises:
        DivergedError: training gave NaN again and again.
    """
    settings = job.fit
    path = Path(settings.state) if settings.state is not None else job.out.with_name(job.out.name + ".fit")
    unfinished = UnfinishedRun(path, _identity(job, subject))
    resumed = load_state(unfinished, settings.log)
    start = _TrainingStart(
        job, subject, nonzeros, MASKS.find((resumed.mask if resumed else "") or settings.mask or MASK)
    )
    seconds = _seconds_per_step(start.trainer(1), subject)
    steps = settings.steps or (resumed.steps if resumed else _default_steps(subject, seconds))
    refitted = 0.0
    if start.mask.solves:
        if settings.steps is None and resumed is None and subject.device.type == "cpu" and steps * seconds > CPU_MOST:
            settings.log(
                f"{steps} steps on {named(subject.devices)} would take {_duration(steps * seconds)}, so values are"
                f" those of least squares, as by --fit-method refit; --fit-steps {steps} trains them all the same"
            )
            start.take(start.mask, 1)
            refit(job, subject, nonzeros, result)
            return
        if steps < REFIT_STEPS:
            start.take(start.mask, 1)
        if resumed is None:
            solve(job, subject, nonzeros)
            if settings.mask is None and steps >= PRUNE_STEPS and result.base:
                refitted = start.leave_least_squares(result.base, steps)
    training = start.trainer(steps)
    training.state.refitted = refitted
    if resumed is not None:
        training.load(resumed)
        settings.log(f"going on from step {resumed.step} of {steps}, found in {path}")
    left = steps - training.state.step
    size = min(settings.batch, len(subject.texts.train))
    made = f" and {result.generated:,} generated ones" if result.generated else ""
    settings.log(
        f"fitting on {result.texts:,} examples{made}: {left} steps of {size} on {named(subject.devices)},"
        f" about {_duration(1.1 * left * seconds)} at the pace of the first two{gpu_peak(subject.devices)}; if it is"
        " interrupted, the same command goes on"
    )
    _train(training, job, subject, unfinished, solved=start.mask.solves or refitted > 0)
    result.mask = start.mask.name
    if settings.mask is None and not start.mask.solves and start.return_to_least_squares(training):
        result.mask = MASK
        result.warnings.append(WORSE)
    unfinished.remove()
    result.history, result.steps = training.state.history, training.state.step


class _TrainingStart:
    """What training starts from.

    Args:
        job: the fit.
        subject: its model and texts.
        nonzeros: get the mask and the values.
        mask: the mask to start from.

    Attributes:
        mask: the mask that it starts from now.
    """

    def __init__(self, job: FitJob, subject: Subject, nonzeros: Nonzeros, mask: FitMask) -> None:
        self._job, self._subject, self._nonzeros = job, subject, nonzeros
        tuned = subject.fitted
        self._counts = [
            min(target.count, changed) for target, changed in zip(tuned.targets, tuned.changed, strict=True)
        ]
        pairs = zip(tuned.energy, self._counts, strict=True)
        self._units = [(energy / max(count, 1)) ** 0.5 for energy, count in pairs]
        self.take(mask, mask.begin)

    def take(self, mask: FitMask, begin: float) -> None:
        """Takes a mask's most important changes, `begin` times as many as are kept."""
        self.mask, self._begin = mask, begin
        number, whole = self._counts, self._job.whole_model
        if begin > 1:
            number, whole = _begin(self._job, self._subject, self._counts, begin), False
        positions, values = self._subject.select(mask, number, whole)
        self._nonzeros.reset(positions, values)

    def trainer(self, steps: int) -> FitTrainer:
        """One that trains from here."""
        plan = TrainingPlan(
            steps=steps,
            micro=self._subject.micro,
            relative_lr=self._job.fit.relative_lr or self.mask.relative_lr,
            quantiser=partial(self._subject.fitted.quantiser_of, codec=self._job.codec),
            counts=self._counts,
            units=self._units,
            whole_model=self._job.whole_model,
            keeps_start=self.mask.solves and self._begin == 1,
            mask=self.mask.name,
        )
        subject = self._subject
        return FitTrainer(
            subject.model, self._nonzeros, subject.behaviour, subject.teacher, plan, subject.recomputation
        )

    def leave_least_squares(self, base: float, steps: int) -> float:
        """Starts from the largest changes instead of what least squares gave, where that leaves much.

        Args:
            base: the base's distance.
            steps: those of the run.

        Returns:
            The distance that least squares leave.
        """
        refitted = self.trainer(steps).measured(self._subject.held_out)[DISTANCE]
        if not refitted <= LEFT * base:  # NaN, too
            found = "give NaN" if math.isnan(refitted) else f"leave {refitted / base:.0%} of the distance"
            self._job.fit.log(f"least squares {found}, so training starts from the largest changes")
            prune = MASKS["prune"]
            self.take(prune, prune.begin)
        return refitted

    def return_to_least_squares(self, training: FitTrainer) -> bool:
        """Takes least squares of the final number where training made no better of the largest changes.

        Returns:
            Whether it did; otherwise all is as training left it.
        """
        held_out, state = self._subject.held_out, training.state
        if training.measured(held_out)[DISTANCE] <= state.refitted:
            return False
        own = self._nonzeros
        trained = own.by_tensor(own.positions), own.by_tensor(own.values)
        self.take(MASKS[MASK], 1)
        solve(self._job, self._subject, self._nonzeros)
        if self.trainer(state.steps).measured(held_out)[LOSS] < state.best:
            return True
        self._nonzeros.reset(*trained)
        training.write()
        return False


def _train(training: FitTrainer, job: FitJob, subject: Subject, unfinished: UnfinishedRun, solved: bool) -> None:
    """Runs to the end, and keeps the state where that is not reached: before the first step, only what was `solved`."""
    settings, path = job.fit, unfinished.path

    def save(reached: FitState) -> None:
        if unfinished.is_due():
            save_state(unfinished, reached)

    try:
        batches = subject.texts.batches(subject.behaviour.lengths)
        training.run(batches, subject.held_out, job.progress, save)
    except (KeyboardInterrupt, SystemExit):  # the latter by SIGTERM
        state = training.resumable()
        if state.step or solved:
            save_state(unfinished, state)
            where = f"step {state.step} of {state.steps}" if state.step else "what least squares gave"
            settings.log(f"the same command goes on from {where}, which is kept in {path}")
        else:
            settings.log("no step was done yet, so the same command begins anew")
        raise
    except DivergedError as error:
        save_state(unfinished, training.state)
        raise DivergedError(f"{error}; the last good state is in {path}") from None


def _identity(job: FitJob, subject: Subject) -> object:
    """The settings and inputs that the run's result depends on; only a run with the same ones is resumed.

    As in 0.1, whose interrupted runs are resumed as well: in its order, with the mask by its old name.  Where no mask
    is asked for, the run chooses one, so it is another run than those that ask for either.
    """
    fit, tuned, mask = job.fit, subject.fitted, job.fit.mask
    targets = zip(tuned.targets, tuned.energy, strict=True)
    masks_of_0_1 = {new: old for old, new in RENAMED_MASKS.items()}
    return [
        *(str(job.base.resolve()), str(job.source.resolve()), job.codec, job.whole_model),
        *([target.name, target.count, f"{energy:.4g}"] for target, energy in targets),
        *(mask and masks_of_0_1.get(mask, mask), fit.steps, fit.batch, subject.micro),
        *(fit.relative_lr or MASKS.find(mask or MASK).relative_lr, fit.tokens, fit.text_share, fit.seed),
        *([fit.prompt_share] if fit.prompt_share else []),  # 0.1 had none
        *([f"{fit.generate} generated"] if fit.generate else []),
        *([str(job.old.root.resolve())] if job.old is not None else []),
        subject.texts.train[:1],
        subject.texts.identity,
    ]


def _begin(job: FitJob, subject: Subject, counts: Sequence[int], begin: float) -> list[int]:
    """Nonzeros by tensor before pruning.

    Where nonzeros may move between tensors, all tensors begin with the same density: the largest changes are
    distributed very differently from what training keeps.
    """
    if not job.whole_model:
        return [round(begin * count) for count in counts]
    weights = subject.fitted.weights
    density = begin * sum(counts) / sum(weight.numel() for weight in weights)
    return [math.ceil(density * weight.numel()) for weight in weights]


def _default_steps(subject: Subject, seconds: float) -> int:
    """The default number of steps, from the seconds that one takes."""
    if subject.device.type != "cpu":
        return STEPS
    return min(STEPS, max(CPU_LEAST, int(CPU_SECONDS / seconds)))


def _seconds_per_step(trainer: FitTrainer, subject: Subject) -> float:
    """Estimate for texts of mean length, from the second of two steps."""
    lengths, train = subject.behaviour.lengths, subject.texts.train
    timed = list(islice(subject.texts.batches(lengths), 2))
    seconds = [trainer.time_one(batch) for batch in timed][-1]
    return seconds * _mean_length(lengths, train) / _mean_length(lengths, timed[-1])


def _mean_length(lengths: Sequence[int], indices: Sequence[int]) -> float:
    return sum(lengths[index] + 1 for index in indices) / len(indices)


def _duration(seconds: float) -> str:
    return f"{max(2, round(seconds))} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes"
