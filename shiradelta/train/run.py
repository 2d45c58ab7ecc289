"""The plain case from end to end: a model's folder and a file of examples in, a `.shd` out."""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shiradelta.errors import DeltaError, ShiraDeltaError, SourceError
from shiradelta.format import registry
from shiradelta.format.codecs import VALUE_OPTIONS
from shiradelta.models import loading
from shiradelta.models.checkpoint import Checkpoint, open_checkpoint
from shiradelta.models.names import match_names
from shiradelta.nonzeros.pruning import PRUNE_FROM, PRUNE_UNTIL
from shiradelta.nonzeros.schedule import cycle
from shiradelta.nonzeros.unfinished import UnfinishedRun
from shiradelta.nonzeros.weight import flat
from shiradelta.select.shares import parse_sparsity
from shiradelta.text.batches import batches, by_length, mean_over, split
from shiradelta.text.examples import KINDS
from shiradelta.text.jsonl import read_rows
from shiradelta.text.pooling import find_pooling
from shiradelta.train.gradients import Tell
from shiradelta.train.masks import can_be_larger
from shiradelta.train.targets import find_weights
from shiradelta.train.tuner import Tuner, attach
from shiradelta.util.files import check_target
from shiradelta.util.memory import advising_on_memory
from shiradelta.util.plots import check_plot, new_figure, save

#: Batches that gradients are summed over for a mask; of all examples, at most so many are kept from training.
CALIBRATION, HELD_OUT = 16, 256
EVALUATIONS = 20
CLIP = 1.0
_MASK = ".positions"


@dataclass(frozen=True)
class Settings:
    """Of a run; `shiradelta train --help` says what they are.

    Raises:
        DeltaError: one that cannot be.
    """

    sparsity: float | str = 0.01
    mask: str = "snip"
    targets: tuple[str, ...] = ()
    scope: str = "tensor"
    avoid: tuple[str, ...] = ()
    fall_from: float | None = None
    steps: int = 400
    batch: int = 32
    rate: float = 0.04
    tokens: int = 256
    seed: int = 0
    values: str = "int4"

    def __post_init__(self) -> None:
        parse_sparsity(self.sparsity)
        if not 0 < self.rate < math.inf:
            raise DeltaError(f"a learning rate of {self.rate} trains nothing; give one above 0, such as 0.04")
        for name in ("steps", "batch", "tokens"):
            if getattr(self, name) < 1:
                raise DeltaError(f"{name} is {getattr(self, name)}; give 1 or more")
        if self.fall_from is not None and not 1 <= self.fall_from < math.inf:
            raise DeltaError(f"a density that falls from {self.fall_from:g} x does not fall; give 1 (none) or more")
        VALUE_OPTIONS.find(self.values)

    @property
    def fall(self) -> tuple[int, float]:
        """Steps in which the density falls, and from how many times the sparsity; 0 if it does not."""
        falls = can_be_larger(self.mask, parse_sparsity(self.sparsity)[1])
        begin = (PRUNE_FROM if falls else 1) if self.fall_from is None else self.fall_from
        return (math.ceil(PRUNE_UNTIL * self.steps) if begin > 1 else 0), begin


@dataclass
class Report:
    """What came out.

    Attributes:
        before, trained, after: loss on the examples held out, of the base, of what was trained, and of the file as it
            is read, whose values may have 4 bits.
        history: (step, loss on a batch as a running mean, loss on the examples held out).
    """

    out: str
    tensors: int
    nnz: int
    numel: int
    examples: int
    held_out: int
    steps: int
    before: float
    trained: float
    after: float
    seconds: float
    file_bytes: int
    history: list[tuple[int, float, float]] = field(default_factory=list)


def run(
    model_folder: Path,
    examples_file: Path,
    out: Path,
    settings: Settings,
    device: str | None = None,
    plot: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
    progress: Tell = lambda what, done, total: None,
) -> Report:
    """Trains an adapter; started again, an interrupted run goes on, to the same file.

    Args:
        model_folder: as transformers loads it; trained in the dtype that it is stored in.
        examples_file: JSON Lines (`shiradelta.text.examples`).
        out: the file to write; beside it the state of an interrupted run is kept, `OUT.train`.
        settings: of the run.
        device: "cpu", "cuda", ...; None takes a GPU if there is one.
        plot: a PNG to draw the losses to.
        say: is told what is worth knowing.
        progress: is told how far it is.

    Raises:
        SourceError: the model or the examples cannot be used.
        TargetError: the file or the plot cannot be written there; told before the work.
        ShiraDeltaError: training gave NaN; out of memory.
    """
    check_target(out, registry.MAGIC, "a .shd file")
    if plot is not None:
        check_plot(plot)
    advice = (
        f": --batch {max(1, settings.batch // 2)} halves what a step takes, or cut examples with --tokens"
        f" {max(1, settings.tokens // 2)}"
    )
    with advising_on_memory(advice):
        return _Run(model_folder, examples_file, out, settings, device, say, progress).go(plot)


class _Run:
    def __init__(
        self,
        folder: Path,
        examples_file: Path,
        out: Path,
        settings: Settings,
        device: str | None,
        say: Callable[[str], None],
        progress: Tell,
    ) -> None:
        self.settings, self.out, self.say, self.progress = settings, out, say, progress
        checkpoint = open_checkpoint(folder)
        loader, _ = loading.model_class(folder, folder)
        tokenizer = loading.load_tokenizer(folder)
        kind, rows = read_rows(examples_file, KINDS.values())
        if kind.predicts and not loader.can_generate():
            raise SourceError(
                f"{folder}: {loader.__name__} does not predict the next token, which {' and '.join(kind.keys)}"
                " train; for an encoder, give pairs: anchor and positive"
            )
        self.device = loading.pick_device(device)
        dtype = _stored_dtype(checkpoint)
        # What is made under float16 may overflow; its weights are used as they are, products are made in bfloat16.
        mixed = dtype == torch.float16
        self.casting: Any = torch.autocast(self.device.type, torch.bfloat16) if mixed else nullcontext()
        self.model = loading.load_model(folder, folder, self.device, dtype).eval()
        self.examples = kind.examples(rows, tokenizer, self.model, settings.tokens, find_pooling(folder))
        self.train, self.held_out = split(len(rows), HELD_OUT, settings.seed)
        identity = [str(folder.resolve()), rows, vars(settings)]
        self.unfinished = UnfinishedRun(out.with_name(out.name + ".train"), identity)
        self.checkpoint = checkpoint
        self.history: list[tuple[int, float, float]] = []

    def go(self, plot: Path | None) -> Report:
        start = time.monotonic()
        settings = self.settings
        resumed = self._resumed()
        before = self.history[0][2] if self.history else self._measure()
        tuner = self._attach(resumed)
        optimizer = torch.optim.AdamW(
            [{"params": [values], "unit": unit} for values, unit in zip(tuner.parameters(), self.units, strict=True)],
            weight_decay=0.0,
        )
        step = 0
        if resumed is not None:
            step = self._take_up(resumed, tuner, optimizer)
            self.say(f"going on from step {step} of {settings.steps}, found in {self.unfinished.path}")
        what = f"training {tuner.nnz:,} of {tuner.numel:,} weights on {len(self.train):,} examples, {self.device}"
        self.say(f"{what}; their number falls to a share of {settings.sparsity}" if settings.fall[0] else what)
        self._train(tuner, optimizer, step, before)
        about = {
            "mask": settings.mask,
            "fall_from": f"{settings.fall[1]:g}",
            "steps": str(settings.steps),
            "examples": str(len(self.train)),
        }
        tuner.save(self.out, settings.values, about)
        tensors, nnz, numel = len(tuner.values), tuner.nnz, tuner.numel
        after = self._measure_file(tuner)
        self.unfinished.remove()
        if plot is not None:
            draw(plot, self.history)
        return Report(
            str(self.out),
            tensors,
            nnz,
            numel,
            len(self.train),
            len(self.held_out),
            settings.steps,
            before,
            self.history[-1][2],
            after,
            round(time.monotonic() - start, 1),
            self.out.stat().st_size,
            self.history,
        )

    def _attach(self, resumed: dict[str, Tensor] | None) -> Tuner:
        settings = self.settings
        targets: list[str] | None = list(settings.targets) or None
        mask: str | dict[str, Tensor] = settings.mask
        if resumed is not None:
            mask = {name.removesuffix(_MASK): where for name, where in resumed.items() if name.endswith(_MASK)}
        weights = find_weights(self.model, targets)
        stream = batches(self.train, self.examples.lengths, settings.batch, settings.seed + 1)
        fall, begin = settings.fall
        anew = fall if resumed is None else 0  # else it falls on, from a mask that is there
        tuner = attach(
            self.model,
            settings.sparsity,
            mask,
            targets,
            list(islice(stream, CALIBRATION)),
            loss=self._loss,
            scope=settings.scope,
            avoid=settings.avoid,
            seed=settings.seed,
            fall=anew,
            fall_from=begin if anew else PRUNE_FROM,
            progress=self.progress,
        )
        if fall and not anew:
            share, _ = parse_sparsity(settings.sparsity)
            tuner.fall(fall, share, weights.values() if settings.scope == "model" else None)
        self._check_stored(tuner)
        self.units = [_rms(weights[name]) for name in tuner.values]
        return tuner

    def _check_stored(self, tuner: Tuner) -> None:
        """The file is made for the folder's bits, so they have to be those that are trained on."""
        shapes = {view.name: view.shape for views in tuner.views.values() for view in views}
        found = match_names(shapes, self.checkpoint)
        for name, weight in tuner.weights.items():
            own = str(weight.dtype).removeprefix("torch.")
            for view in tuner.views[name]:
                slot = self.checkpoint[found[view.name]] if view.name in found else None
                if slot is None or slot.dtype.name != own:
                    where = (
                        "not in the folder" if slot is None else f"stored as {slot.dtype.name}, and trained as {own}"
                    )
                    raise SourceError(f"{self.checkpoint.root}: {view.name!r} is {where}; leave it out of --targets")

    def _loss(self, model: nn.Module, indices: Sequence[int]) -> Tensor:
        with self.casting:
            return self.examples.loss(model, indices)

    def _measure(self) -> float:
        """The mean loss on the examples held out."""
        parts = by_length(self.held_out, self.examples.lengths, self.settings.batch)
        return mean_over(parts, lambda part: {"loss": self._loss(self.model, part).item()})["loss"]

    def _measure_file(self, tuner: Tuner) -> float:
        """The same with the file's values, which may have 4 bits."""
        from shiradelta.hotswap.session import HotSwap

        tuner.detach()
        swap = HotSwap(self.model)
        swap.load("file", self.out)
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
                    self.history.append((step, mean, self._measure() if step else before))
                if self.unfinished.is_due():
                    self._save(tuner, optimizer, step)
                    kept = step
                mean = 0.9 * mean + 0.1 * self._step(tuner, optimizer, step, indices)
                self.progress(f"loss {mean:.3f}", step + 1, settings.steps)
            self.history.append((settings.steps, mean, self._measure()))
        except KeyboardInterrupt:
            if kept:
                where = self.unfinished.path
                self.say(f"the same command goes on from step {kept} of {settings.steps}, kept in {where}")
            raise

    def _step(self, tuner: Tuner, optimizer: torch.optim.Optimizer, step: int, indices: Sequence[int]) -> float:
        for group in optimizer.param_groups:
            group["lr"] = self.settings.rate * group["unit"] * cycle(step, self.settings.steps)
        optimizer.zero_grad()
        loss = self._loss(self.model, indices)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(tuner.parameters(), CLIP)
        found = loss.item()
        if not math.isfinite(found) or not torch.isfinite(norm):
            raise ShiraDeltaError(
                f"training gave NaN at step {step}; give a smaller --rate, such as {self.settings.rate / 4:.2g}"
            )
        optimizer.step()
        return found

    # ---------------------------------------------------------------------------------------- going on

    def _save(self, tuner: Tuner, optimizer: torch.optim.Optimizer, step: int) -> None:
        tensors = tuner.state_dict()
        for name, values in tuner.values.items():
            for what in ("exp_avg", "exp_avg_sq"):
                if what in optimizer.state[values]:
                    tensors[f"{name}.{what}"] = optimizer.state[values][what].cpu()
        self.unfinished.save(tensors, {"step": step, "history": self.history, "base": _digest(tuner)})

    def _resumed(self) -> dict[str, Tensor] | None:
        """The tensors of this run's state, if there is one."""
        state = self.unfinished.load(self.say)
        if state is None:
            return None
        tensors, found = state
        self._first, self._base = int(found["step"]), found["base"]
        self.history = [(int(step), float(loss), float(held)) for step, loss, held in found["history"]]
        return tensors

    def _take_up(self, state: dict[str, Tensor], tuner: Tuner, optimizer: torch.optim.Optimizer) -> int:
        if _digest(tuner) != self._base:
            raise SourceError(
                f"{self.checkpoint.root}: its weights are not those that the interrupted run began with; revert it, or"
                f" take away {self.unfinished.path} to start anew"
            )
        tuner.load_state_dict({name: t for name, t in state.items() if not name.endswith((".exp_avg", ".exp_avg_sq"))})
        for name, values in tuner.values.items():
            if f"{name}.exp_avg" not in state:
                continue  # one that the loss does not depend on
            optimizer.state[values] = {
                "step": torch.tensor(float(self._first)),
                "exp_avg": state[f"{name}.exp_avg"].to(values.device),
                "exp_avg_sq": state[f"{name}.exp_avg_sq"].to(values.device),
            }
        return self._first


def _rms(parameter: Tensor) -> float:
    """Of a weight; a bias that is zero everywhere has the unit that weights mostly have."""
    return float(flat(parameter).float().square().mean().sqrt()) or 0.02


def _digest(tuner: Tuner) -> str:
    """Of the base's weights at the mask."""
    found = hashlib.sha256()
    for _, base in sorted(tuner.base.items()):
        found.update(base.cpu().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of most of a checkpoint's weights.

    Raises:
        SourceError: one that cannot be trained: quantised.
    """
    sizes: Counter[str] = Counter()
    for slot in checkpoint.values():
        sizes[slot.dtype.name] += slot.numel
    name = sizes.most_common(1)[0][0]
    if name not in registry.ADDABLE:
        raise SourceError(
            f"{checkpoint.root}: its weights are stored as {name}: quantised, or more than float32 can tell; train on"
            " the model in bfloat16, float16 or float32"
        )
    found: torch.dtype = getattr(torch, name)
    return found


def draw(path: Path, history: Sequence[tuple[int, float, float]]) -> None:
    """Writes the losses as a PNG.

    Raises:
        TargetError: it cannot be written.
    """
    figure = new_figure(7, 4)
    axes = figure.subplots()
    steps, means, held = zip(*history, strict=True)
    axes.plot(steps, means, marker=".", label="training, running mean")
    axes.plot(steps, held, marker=".", label="held out")
    axes.axhline(held[0], color="gray", linestyle=":", label=f"base {held[0]:.3g}")
    axes.set(xlabel="step", ylabel="loss")
    axes.locator_params(axis="x", integer=True)
    axes.legend()
    save(figure, path)
