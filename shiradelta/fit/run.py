"""From a fine-tune's dense deltas and some texts to fitted sparse ones."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from shiradelta.errors import ShiraDeltaError
from shiradelta.fit import Fit, state
from shiradelta.fit.fitted import Fitted, Order
from shiradelta.fit.quantise import Quantiser
from shiradelta.fit.refit import least_squares as refit
from shiradelta.fit.refit.skeleton import CannotStreamError
from shiradelta.fit.refit.stream import stream
from shiradelta.fit.subject import Subject
from shiradelta.fit.training import DivergedError, Plan, State, Trainer
from shiradelta.models.names import rename_all
from shiradelta.nonzeros.pruning import PRUNE_FROM
from shiradelta.nonzeros.vector import Nonzeros
from shiradelta.select.topk import Selection
from shiradelta.text.batches import batches

#: Steps on a GPU; on a CPU as many as fit into the time, within bounds.
STEPS, CPU_SECONDS, CPU_LEAST = 1_000, 600, 40
#: A run's state is written at most this often, in seconds.
SAVE_EVERY = 20


def run(order: Order) -> Fitted:
    """Fits the targets.

    Raises:
        SourceError: something that is given cannot be used.
    """
    fit = order.fit
    with _out_of_memory(fit):
        if fit.method == "refit" and fit.model is None and fit.forward is None:
            try:
                return stream(order)
            except CannotStreamError as reason:
                fit.say(f"the model is loaded as a whole, for {reason}")
        start = time.monotonic()
        with _as_it_was(order), _tensor_cores():
            order.progress("the fine-tune's outputs", 0, 1)
            subject = Subject(order)
            held_out = subject.measuring()
            result = Fitted({}, subject.behaviour.measure, len(subject.train), len(subject.held_out))
            result.warnings = subject.warnings
            result.note("base", held_out.measures())
            result.text_share = subject.behaviour.text_share if fit.method == "train" else 0.0
            nonzeros = subject.nonzeros()
            try:
                _write_quantised(nonzeros, order.codec)
                result.note("topk", held_out.measures())
                nonzeros.write(None)
                if fit.method == "refit":
                    _refit(order, subject, nonzeros, result)
                else:
                    _train(order, subject, nonzeros, result)
                result.note("fitted", held_out.measures())
            finally:
                nonzeros.write(None)
        result.tensors = {
            target.name: Selection(
                nonzeros.positions[part.span].cpu().numpy(), nonzeros.values[part.span].cpu().numpy(), energy
            )
            for target, part, energy in zip(subject.targets, nonzeros.parts, subject.energy, strict=True)
        }
        result.tensors |= {name: result.tensors[first] for name, first in subject.tied.items()}
        result.seconds = time.monotonic() - start
        return result


def _key(order: Order, subject: Subject) -> str:
    """Tells runs apart, so that a state is only taken up by the one that it is of."""
    fit = order.fit
    parts = [str(order.base.resolve()), str(order.source.resolve()), order.codec, order.whole_model]
    pairs = zip(subject.targets, subject.energy, strict=True)
    parts += [[target.name, target.count, f"{energy:.4g}"] for target, energy in pairs]
    parts += [fit.mask, fit.steps, fit.batch, subject.micro, fit.rate, fit.tokens, fit.text_share, fit.seed]
    parts.append(subject.train[:1])
    parts.append([str(text) for text in subject.texts])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _refit(order: Order, subject: Subject, nonzeros: Nonzeros, result: Fitted) -> None:
    calibration = subject.calibration()
    result.texts = sum(map(len, calibration))
    refit.refit(
        refit.own_linears(subject.model),
        partial(subject.behaviour.outputs, subject.model),
        subject.teacher.in_place,
        nonzeros,
        lambda values: Quantiser(order.codec, [len(values)], values.device)(values),
        calibration,
        partial(order.progress, "least squares by layer"),
    )
    _write_quantised(nonzeros, order.codec)


def _train(order: Order, subject: Subject, nonzeros: Nonzeros, result: Fitted) -> None:
    """Trains mask and values; afterwards the weights hold them."""
    fit, falling = order.fit, order.fit.mask == "falling"
    path = Path(fit.state) if fit.state is not None else order.out.with_name(order.out.name + ".fit")
    key = _key(order, subject)
    counts = [min(target.count, changed) for target, changed in zip(subject.targets, subject.changed, strict=True)]
    if falling:
        positions, values = subject.select("magnitude", _start(order, subject, counts))
    else:
        positions, values = subject.select(fit.mask, counts, order.whole_model)
    nonzeros.reset(torch.cat(positions), [p.numel() for p in positions], values)
    resumed = state.load_state(path, key)
    steps = fit.steps or (resumed.steps if resumed else None)
    units = [(energy / max(count, 1)) ** 0.5 for energy, count in zip(subject.energy, counts, strict=True)]

    def trainer(steps: int) -> Trainer:
        plan = Plan(steps, subject.micro, fit.rate, order.codec, counts, units, order.whole_model)
        return Trainer(subject.model, nonzeros, subject.behaviour, subject.teacher, plan)

    seconds = _time(trainer(1), fit, subject)
    if steps is None:
        fits = int(CPU_SECONDS / seconds)
        steps = STEPS if subject.device.type != "cpu" else min(STEPS, max(CPU_LEAST, fits))
    training = trainer(steps)
    if resumed is not None:
        training.load(resumed)
        fit.say(f"going on from step {resumed.step} of {steps}, found in {path}")
    left = steps - training.state.step
    fit.say(
        f"fitting on {len(subject.train):,} texts: {left} steps of {fit.batch} texts on {subject.device},"
        f" about {_duration(1.1 * left * seconds)}; if it is interrupted, the same command goes on"
    )
    saved = time.monotonic()

    def save(reached: State) -> None:
        nonlocal saved
        if time.monotonic() - saved > SAVE_EVERY:
            state.save_state(path, reached, key)
            saved = time.monotonic()

    try:
        training.run(_batches(fit, subject), subject.measuring(), order.progress, save)
    except KeyboardInterrupt:
        if training.good.step:
            state.save_state(path, training.good, key)
            fit.say(f"the same command goes on from step {training.good.step} of {steps}, which is kept in {path}")
        else:
            fit.say("nothing is kept yet, which is done at every twentieth of the steps; the same command begins anew")
        raise
    except DivergedError as error:
        state.save_state(path, training.state, key)
        raise DivergedError(f"{error}; the last good state is in {path}") from None
    path.unlink(missing_ok=True)
    result.history, result.steps = training.state.history, training.state.step


def _start(order: Order, subject: Subject, counts: Sequence[int]) -> list[int]:
    """Nonzeros by tensor that falling density starts with.

    Where they may move between tensors, the same share of each: magnitude gives a tensor far from what training leaves
    there.
    """
    if not order.whole_model:
        return [PRUNE_FROM * count for count in counts]
    share = PRUNE_FROM * sum(counts) / sum(weight.numel() for weight in subject.weights)
    return [math.ceil(share * weight.numel()) for weight in subject.weights]


def _batches(fit: Fit, subject: Subject) -> Iterator[list[int]]:
    return batches(subject.train, subject.behaviour.lengths, fit.batch, fit.seed)


def _time(trainer: Trainer, fit: Fit, subject: Subject) -> float:
    """Seconds that a step takes, by the second of two, if its texts were of mean length."""
    timed = list(islice(_batches(fit, subject), 2))
    seconds = [trainer.time_one(batch) for batch in timed][-1]
    lengths = [subject.behaviour.lengths[index] + 1 for index in subject.train]
    last = [subject.behaviour.lengths[index] + 1 for index in timed[-1]]
    ratio = (sum(lengths) / len(lengths)) / (sum(last) / len(last))
    return seconds * ratio


def _write_quantised(nonzeros: Nonzeros, codec: str) -> None:
    nonzeros.write(Quantiser(codec, nonzeros.counts, nonzeros.values.device)(nonzeros.values))


def _duration(seconds: float) -> str:
    return f"{max(2, round(seconds))} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes"


@contextmanager
def _as_it_was(order: Order) -> Iterator[None]:
    """Gives a user's own model back as it came: its modes, its flags, and what was put in beside what is fitted."""
    model = order.fit.model
    if model is None:
        yield
        return
    names = dict(model.named_parameters(remove_duplicate=False))
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in names.values()]
    others = {names[own] for own in rename_all([name for name, _ in order.whole], names).values()}
    kept = [(parameter, parameter.detach().clone()) for parameter in others]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        with torch.no_grad():
            for parameter, before in kept:
                parameter.copy_(before)


@contextmanager
def _tensor_cores() -> Iterator[None]:
    """Lets a GPU multiply float32 matrices in TF32: student and teacher alike, so that distances hold."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _out_of_memory(fit: Fit) -> Iterator[None]:
    """Says which setting halves what a step takes."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        micro = fit.micro or fit.batch
        raise ShiraDeltaError(
            f"out of memory with {micro} texts a forward pass: --fit-micro {max(1, micro // 2)} halves what they take"
            f" and changes little; --fit-tokens {max(1, fit.tokens // 2)} cuts texts"
        ) from None
