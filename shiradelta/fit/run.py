"""From a fine-tune's dense deltas and some texts to fitted sparse ones."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from shiradelta.checkpoint import rename_all
from shiradelta.delta import TensorDelta
from shiradelta.errors import ShiraDeltaError, SourceError
from shiradelta.nonzeros import Nonzeros, flat
from shiradelta.select import Selection

from . import Fit, loading, refit, scores, state
from .behaviour import Behaviour, CustomBehaviour, TextBehaviour
from .fitted import Fitted, Target
from .measures import Measures, measure_all
from .quantise import Quantiser
from .skeleton import CannotStreamError
from .stream import stream
from .teacher import Teacher
from .texts import batches, read_texts, split
from .train import DivergedError, Plan, State, Trainer

#: Falling density starts at this multiple of what is kept: more costs memory and gives the mask less time to settle.
START = 5
#: Steps on a GPU; on a CPU as many as fit into the time, within bounds.
STEPS, CPU_SECONDS, CPU_LEAST = 400, 600, 40
#: A run's state is written at most this often, in seconds.
SAVE_EVERY = 20
#: Batches for scores and for the refit's moments.
CALIBRATION = 8

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def run(
    fit: Fit,
    targets: Sequence[Target],
    whole: Sequence[tuple[str, TensorDelta]],
    base: Path,
    source: Path,
    codec: str,
    whole_model: bool,
    out: Path,
    progress: Callable[[str, int, int], None],
) -> Fitted:
    """Fits the targets.

    Args:
        fit: the settings.
        targets: what to fit.
        whole: what the file changes beside them; it is the student's and the teacher's.
        base: where the base model is.
        source: where the fine-tune is.
        codec: of the values.
        whole_model: nonzeros may move between tensors.
        out: the file to be written, beside which the state is kept.
        progress: is told how far it is.

    Raises:
        SourceError: something that is given cannot be used.
    """
    with _out_of_memory(fit):
        if fit.method == "refit" and fit.model is None and fit.forward is None:
            try:
                return stream(fit, targets, whole, base, source, codec, out.absolute().parent, progress)
            except CannotStreamError as reason:
                fit.say(f"the model is loaded as a whole, for {reason}")
        return _Run(fit, targets, whole, base, source, codec, whole_model, out, progress)()


class _Run:
    def __init__(
        self,
        fit: Fit,
        targets: Sequence[Target],
        whole: Sequence[tuple[str, TensorDelta]],
        base: Path,
        source: Path,
        codec: str,
        whole_model: bool,
        out: Path,
        progress: Callable[[str, int, int], None],
    ) -> None:
        self.fit, self.codec, self.whole_model, self.progress = fit, codec, whole_model, progress
        self.path = Path(fit.state) if fit.state is not None else out.with_name(out.name + ".fit")
        texts = read_texts(fit.texts)
        self.train, self.held_out = split(len(texts), fit.held_out, fit.seed)
        self.device = loading.pick_device(fit.device)
        self.micro = fit.micro or fit.batch
        self.warnings: list[str] = []

        halves = self.device.type == "cuda" and all(target.dtype == "bfloat16" for target in targets)
        if fit.model is not None:
            self.model: nn.Module = fit.model.to(self.device)
        else:
            dtype = torch.bfloat16 if halves else torch.float32
            self.model = loading.load_model(base, source, self.device, dtype)
        self.model.eval().requires_grad_(False)
        self.behaviour: Behaviour
        if fit.forward is not None:
            self.behaviour = CustomBehaviour(texts, fit.forward, fit.loss)
        else:
            tokenizer = loading.load_tokenizer(base, source)
            self.behaviour = TextBehaviour(tokenizer, texts, self.model, fit.tokens)

        names = dict(self.model.named_parameters(remove_duplicate=False))
        found = rename_all([target.name for target in targets], names)
        self.targets = [target for target in targets if target.name in found]
        if not self.targets:
            raise SourceError(f"{base}: the loaded model has no tensor {targets[0].name!r}; give model and forward")
        for target in targets:
            if target.name not in found:
                self.warnings.append(f"{target.name} is not fitted: the loaded model has no such tensor")
        dense = {target.name: torch.from_numpy(target.dense()).to(self.device) for target in self.targets}
        changed = {name: int(delta.count_nonzero()) for name, delta in dense.items()}
        # Weights that the fine-tune left alone stay as they are, as with plain top-k.
        self.targets = [target for target in self.targets if changed[target.name]]
        if not self.targets:
            raise SourceError(f"{source}: nothing in it changes the base")
        self.deltas = [dense[target.name] for target in self.targets]
        self.counts = [min(target.count, changed[target.name]) for target in self.targets]
        self.most = [min(START * target.count, changed[target.name]) for target in self.targets]
        self.weights = [names[found[target.name]] for target in self.targets]
        self._write_whole(whole, names)
        self.key = self._key(texts, base, source)

    def _write_whole(self, whole: Sequence[tuple[str, TensorDelta]], names: dict[str, nn.Parameter]) -> None:
        for name, delta in whole:
            own = rename_all([name], names).get(name)
            if own is None or delta.op not in ("add", "set", "new") or names[own].shape != delta.shape:
                continue
            weights = flat(names[own])
            positions = torch.from_numpy(delta.positions()).to(self.device)
            values = torch.from_numpy(delta.values().copy()).to(weights)
            weights[positions] = weights[positions] + values if delta.op == "add" else values

    def _key(self, texts: Sequence[object], base: Path, source: Path) -> str:
        """Tells runs apart, so that a state is only taken up by the one that it is of."""
        fit = self.fit
        parts = [str(base.resolve()), str(source.resolve()), self.codec, self.whole_model]
        parts += [[target.name, target.count] for target in self.targets]
        parts += [fit.mask, fit.steps, fit.batch, self.micro, fit.rate, fit.tokens, fit.seed, self.train[:1]]
        parts.append([str(text) for text in texts])
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def __call__(self) -> Fitted:
        start = time.monotonic()
        self.progress("the fine-tune's outputs", 0, 1)
        deltas = self.deltas
        stored = [_DTYPES.get(target.dtype, torch.float32) for target in self.targets]
        tuned = {
            weight: (weight.data.float() + delta.view(weight.shape)).to(weight.dtype)
            for weight, delta in zip(self.weights, deltas, strict=True)
        }
        teacher = Teacher(self.model, tuned, self.behaviour)
        # Scales are taken where values are trained, so that nothing of the held-out texts is used.
        sample = self._calibration(1)[0]
        with torch.no_grad():
            self.behaviour.calibrate(self.behaviour.outputs(self.model, sample), teacher.outputs(sample))
        result = Fitted({}, self.behaviour.measure, len(self.train), len(self.held_out))
        result.note("base", self._measure(teacher))
        result.warnings = self.warnings

        positions = self._select([delta.abs() for delta in deltas], self.counts)
        nonzeros = Nonzeros(self.weights, stored, positions)
        nonzeros.values = _at(deltas, positions)
        self._write_quantised(nonzeros)
        result.note("topk", self._measure(teacher))
        nonzeros.write(None)

        if self.fit.method == "refit":
            calibration = self._calibration(CALIBRATION)
            result.texts = sum(map(len, calibration))
            refit.refit(
                refit.own_linears(self.model),
                partial(self.behaviour.outputs, self.model),
                teacher.in_place,
                nonzeros,
                lambda values: Quantiser(self.codec, [len(values)], values.device)(values),
                calibration,
                partial(self.progress, "least squares by layer"),
            )
            self._write_quantised(nonzeros)
            result.note("fitted", self._measure(teacher))
        else:
            self._train(nonzeros, teacher, result)
        nonzeros.write(None)
        result.tensors = {
            target.name: Selection(
                nonzeros.positions[place.part].cpu().numpy(),
                nonzeros.values[place.part].cpu().numpy(),
                float(delta.square().sum()),
            )
            for target, place, delta in zip(self.targets, nonzeros.places, deltas, strict=True)
        }
        result.seconds = time.monotonic() - start
        return result

    def _train(self, nonzeros: Nonzeros, teacher: Teacher, result: Fitted) -> None:
        positions = self._first_mask(teacher)
        nonzeros.reset(torch.cat(positions), [p.numel() for p in positions], _at(self.deltas, positions))
        resumed = state.load_state(self.path, self.key)
        stream = batches(self.train, self.behaviour.lengths, self.fit.batch, self.fit.seed)
        steps = self.fit.steps or (resumed.steps if resumed else None)

        def plan(steps: int) -> Plan:
            return Plan(steps, self.micro, self.fit.rate, self.codec, self.counts, self.whole_model)

        seconds = self._time(Trainer(self.model, nonzeros, self.behaviour, teacher, plan(1)))
        if steps is None:
            fits = int(CPU_SECONDS / seconds)
            steps = STEPS if self.device.type != "cpu" else min(STEPS, max(CPU_LEAST, fits))
        trainer = Trainer(self.model, nonzeros, self.behaviour, teacher, plan(steps))
        if resumed is not None:
            trainer.load(resumed)
            self.fit.say(f"going on from step {resumed.step} of {steps}, found in {self.path}")
        left = steps - trainer.state.step
        self.fit.say(
            f"fitting on {len(self.train):,} texts: {left} steps of {self.fit.batch} texts on {self.device},"
            f" about {_duration(1.1 * left * seconds)}; if it is interrupted, the same command goes on"
        )
        saved = time.monotonic()

        def save(reached: State) -> None:
            nonlocal saved
            if time.monotonic() - saved > SAVE_EVERY:
                state.save_state(self.path, reached, self.key)
                saved = time.monotonic()

        try:
            trainer.run(stream, self.held_out, self.progress, save)
        except DivergedError as error:
            state.save_state(self.path, trainer.state, self.key)
            raise DivergedError(f"{error}; the last good state is in {self.path}") from None
        self.path.unlink(missing_ok=True)
        result.history, result.steps = trainer.state.history, trainer.state.step
        result.note("fitted", self._measure(teacher))

    def _time(self, trainer: Trainer) -> float:
        """Seconds that a step takes, by the second of two, if its texts were of mean length."""
        first = list(islice(batches(self.train, self.behaviour.lengths, self.fit.batch, self.fit.seed), 2))
        trainer.time_one(first[0])
        start = time.monotonic()
        trainer.time_one(first[-1])
        lengths = [self.behaviour.lengths[index] + 1 for index in self.train]
        timed = [self.behaviour.lengths[index] + 1 for index in first[-1]]
        return (time.monotonic() - start) * (sum(lengths) / len(lengths)) / (sum(timed) / len(timed))

    def _first_mask(self, teacher: Teacher) -> list[Tensor]:
        deltas = self.deltas
        if self.fit.mask == "gradient":
            found = scores.rms_gradients(
                self.model, self.weights, self.behaviour, teacher, self._calibration(CALIBRATION)
            )
            score = [delta.abs() * rms for delta, rms in zip(deltas, found, strict=True)]
        elif self.fit.mask == "activation":

            def forward() -> None:
                for part in self._calibration(CALIBRATION):
                    self.behaviour.outputs(self.model, part)

            norms = scores.input_norms(self.model, self.weights, forward)
            pairs = zip(deltas, self.weights, strict=True)
            score = [scores.by_input(delta, weight, norms.get(i)) for i, (delta, weight) in enumerate(pairs)]
        else:
            score = [delta.abs() for delta in deltas]
        return self._select(score, self.most if self.fit.mask == "falling" else self.counts)

    def _select(self, score: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
        if self.whole_model:
            return scores.largest_of_all(score, sum(counts))
        return [scores.largest(s, count) for s, count in zip(score, counts, strict=True)]

    def _calibration(self, number: int) -> list[list[int]]:
        """A few batches."""
        number = min(number, max(1, len(self.train) // self.micro))
        return list(islice(batches(self.train, self.behaviour.lengths, self.micro, self.fit.seed), number))

    def _write_quantised(self, nonzeros: Nonzeros) -> None:
        nonzeros.write(Quantiser(self.codec, nonzeros.counts, nonzeros.values.device)(nonzeros.values))

    def _measure(self, teacher: Teacher) -> Measures:
        return measure_all(self.model, self.behaviour, teacher, self.held_out, self.micro)


def _at(deltas: Sequence[Tensor], positions: Sequence[Tensor]) -> Tensor:
    return torch.cat([delta[p] for delta, p in zip(deltas, positions, strict=True)])


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes"


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
            f" and gives the same result; --fit-tokens {max(1, fit.tokens // 2)} cuts texts"
        ) from None
