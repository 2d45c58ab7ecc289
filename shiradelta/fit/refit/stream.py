"""The closed form, layer by layer, for models of which memory holds a few layers.

The blocks of the model are filled from the files one after the other.  What goes from one to the next is kept: hidden
states of the fine-tune, of the student, and, for the texts held out, of the base and of plain top-k as well.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shiradelta.fit.behaviour import Outputs, check_scales
from shiradelta.fit.fitted import Fitted, Order, Target
from shiradelta.fit.quantise import Quantiser
from shiradelta.fit.refit.least_squares import Enough, own_linears, refit
from shiradelta.fit.refit.skeleton import CannotStreamError, Skeleton
from shiradelta.fit.teacher import exchanged
from shiradelta.fit.text_behaviour import TextBehaviour
from shiradelta.models import loading
from shiradelta.models.dtypes import torch_dtype
from shiradelta.models.names import rename_all
from shiradelta.nonzeros.vector import Nonzeros
from shiradelta.select.largest_torch import largest
from shiradelta.select.topk import Selection
from shiradelta.text.batches import batches, by_length, mean_over, split
from shiradelta.text.pooling import find_pooling
from shiradelta.text.texts import read_texts

#: Batches for the moments.
CALIBRATION = 8
#: Hidden states beyond this many bytes lie in mapped files instead of in memory.
MEMORY = 1 << 30
#: The same model with different weights; the teacher is "tuned".
STUDENTS = ("base", "topk", "fitted")
STATES = (*STUDENTS, "tuned")

#: Indices of the examples of one forward pass.
Part = tuple[int, ...]


def stream(order: Order) -> Fitted:
    """Refits the targets; what memory does not hold lies beside the file to be written.

    Raises:
        CannotStreamError: the model has to be in memory as a whole.
        SourceError: something that is given cannot be used.
    """
    with tempfile.TemporaryDirectory(prefix=".shiradelta-", dir=order.out.absolute().parent) as scratch:
        return _Stream(order, HiddenStates(Path(scratch)))()


class HiddenStates:
    """(state, part) -> what enters the next block, on the CPU; in memory, and beyond `MEMORY` in mapped files."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._bytes = folder, 0
        self._kept: dict[tuple[str, Part], Tensor] = {}

    def __getitem__(self, key: tuple[str, Part]) -> Tensor:
        return self._kept[key]

    def __setitem__(self, key: tuple[str, Part], hidden: Tensor) -> None:
        if key not in self._kept:
            self._bytes += hidden.nbytes
            if self._bytes <= MEMORY:
                self._kept[key] = torch.empty_like(hidden, device="cpu")
            else:
                file = str(self._folder / str(len(self._kept)))
                mapped = torch.from_file(file, True, hidden.numel(), dtype=hidden.dtype)
                self._kept[key] = mapped.view(hidden.shape)
        self._kept[key].copy_(hidden)


class _Weights:
    """A part of the model, filled with the base's weights, and what they are in each of the states."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], targets: Mapping[str, Target], codec: str) -> None:
        self._codec = codec
        self._targets: list[Target] = []
        self._energy: list[float] = []
        self._tuned: dict[nn.Parameter, Tensor] = {}
        positions, values = [], []
        for name, weight in parameters.items():
            if name not in targets:
                continue
            delta = torch.from_numpy(targets[name].dense()).to(weight.device)
            if changed := int(delta.count_nonzero()):
                self._targets.append(targets[name])
                self._energy.append(float(delta.square().sum()))
                self._tuned[weight] = (weight.data.float() + delta.view(weight.shape)).to(weight.dtype)
                positions.append(largest(delta.abs(), min(targets[name].count, changed)))
                values.append(delta[positions[-1]])
        stored = [torch_dtype(target.dtype) for target in self._targets]
        self._nonzeros: dict[str, Nonzeros] = {}
        for state in ("topk", "fitted") if positions else ():
            self._nonzeros[state] = Nonzeros(list(self._tuned), stored, positions)
            self._nonzeros[state].values = torch.cat(values)

    @property
    def fitted(self) -> Nonzeros | None:
        """The student's; top-k until they are refitted."""
        return self._nonzeros.get("fitted")

    def rounded(self, values: Tensor) -> Tensor:
        """Values of one tensor as a reader will see them."""
        return Quantiser(self._codec, [len(values)], values.device)(values)

    @contextmanager
    def of(self, state: str) -> Iterator[None]:
        """Within, the weights are those of the state."""
        nonzeros = self._nonzeros.get(state)
        if nonzeros is not None:
            nonzeros.write(Quantiser(self._codec, nonzeros.counts, nonzeros.values.device)(nonzeros.values))
        try:
            with exchanged(self._tuned if state == "tuned" else {}):
                yield
        finally:
            if nonzeros is not None:
                nonzeros.write(None)

    def selections(self) -> dict[str, Selection]:
        """What goes into the file."""
        if self.fitted is None:
            return {}
        return {
            target.name: Selection(
                self.fitted.positions[part.span].cpu().numpy(), self.fitted.values[part.span].cpu().numpy(), energy
            )
            for target, part, energy in zip(self._targets, self.fitted.parts, self._energy, strict=True)
        }


class _Stream:
    def __init__(self, order: Order, hidden: HiddenStates) -> None:
        fit, targets, base, source, codec = order.fit, order.targets, order.base, order.source, order.codec
        self._fit, self._codec, self._hidden, self._progress = fit, codec, hidden, order.progress
        texts = read_texts(fit.texts)
        train, held_out = split(len(texts), fit.held_out, fit.seed)
        tokenizer = loading.load_tokenizer(base, source)
        self._device = loading.pick_device(fit.device)
        dtype = loading.pick_dtype(self._device, (target.dtype for target in targets))
        self._skeleton = Skeleton(base, source, dict(order.whole), self._device, dtype)
        self._model, self._blocks = self._skeleton.model, self._skeleton.blocks
        rest = self._skeleton.fill(self._skeleton.of_rest())
        pooling = find_pooling(base, source)
        self._behaviour = TextBehaviour(tokenizer, texts, self._model, fit.tokens, pooling)

        first_names = {id(p): name for name, p in self._model.named_parameters()}
        every = dict(self._model.named_parameters(remove_duplicate=False))
        found = rename_all([target.name for target in targets], every)
        missing = [target.name for target in targets if target.name not in found]
        if missing:
            raise CannotStreamError(f"it has no tensor {missing[0]!r}")
        self._targets = {first_names[id(every[found[target.name]])]: target for target in targets}
        self._rest = _Weights(rest, self._targets, codec)
        lengths, size = self._behaviour.lengths, fit.micro or fit.batch
        self._held_out = [tuple(part) for part in by_length(held_out, lengths, size)]
        number = max(1, min(CALIBRATION * fit.batch, len(train)) // size)
        self._calibration = [tuple(part) for part in islice(batches(train, lengths, size, fit.seed), number)]
        self._state = "fitted"
        #: part -> (arguments, keywords) of each block, beside the hidden states.
        self._calls: dict[Part, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        self._tuple = False  # whether blocks return their hidden states in one

    def __call__(self) -> Fitted:
        start = time.monotonic()
        self._fit.say(
            f"least squares by layer on {sum(map(len, self._calibration)):,} texts: {len(self._blocks)} layers on"
            f" {self._device}, one in memory at a time"
        )
        try:
            late = self._embed()
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise CannotStreamError(f"its layers cannot be called alone ({error})") from error
        tensors: dict[str, Selection] = {}
        for index in range(len(self._blocks)):
            self._progress("least squares by layer", index, len(self._blocks))
            tensors.update(self._refit_block(index))
        with self._patched(self._leave):
            if self._rest.fitted is not None:
                refit(
                    late,
                    self._outputs,
                    partial(self._rest_as, "tuned"),
                    self._rest.fitted,
                    self._rest.rounded,
                    self._calibration,
                )
            measures = self._measures()
        tensors.update(self._rest.selections())
        check_scales([measures["base"][self._behaviour.measure]])
        used, held_out = (sum(map(len, parts)) for parts in (self._calibration, self._held_out))
        result = Fitted(tensors, self._behaviour.measure, used, held_out)
        for state, measure in measures.items():
            result.note(state, measure)
        result.seconds = time.monotonic() - start
        return result

    # ------------------------------------------------------------------------ before the blocks

    def _embed(self) -> list[nn.Module]:
        """Runs what comes before the blocks; returns the linear layers that come after them."""
        parts = [("tuned", part) for part in (*self._held_out, *self._calibration)]
        parts += [("fitted", part) for part in (*self._held_out, *self._calibration)]
        parts += [(state, part) for state in ("base", "topk") for part in self._held_out]
        early = self._look(parts[0][1])
        with self._patched(self._enter):
            for state, part in parts:
                self._part = part
                with self._rest_as(state), suppress(Enough):
                    self._outputs(part)
        inside = {id(module) for module in self._blocks.modules()}
        return [m for m in own_linears(self._model) if id(m) not in inside and m not in early]

    def _look(self, part: Part) -> set[nn.Module]:
        """Runs the first block, to see what it returns; returns the linear layers before it."""
        early: set[nn.Module] = set()
        hooks = [
            module.register_forward_pre_hook(lambda module, inputs: early.add(module))
            for module in own_linears(self._model)
        ]
        first: list[Any] = []

        def stop(index: int, hidden: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
            first.extend((hidden, arguments, keywords))
            raise Enough

        try:
            with self._patched(stop), suppress(Enough):
                self._outputs(part)
        finally:
            for hook in hooks:
                hook.remove()
        if not first:
            raise CannotStreamError("its layers are not called in order")
        hidden, arguments, keywords = first
        filled = self._skeleton.fill(self._skeleton.of_block(0))
        with torch.no_grad():
            result = self._blocks[0](hidden, *arguments, **keywords)
        self._skeleton.empty(filled)
        self._tuple = isinstance(result, tuple)
        if not isinstance(self._unwrapped(result), Tensor) or self._unwrapped(result).shape != hidden.shape:
            raise CannotStreamError("its layers return more than hidden states")
        return early

    def _enter(self, index: int, hidden: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        """In place of a block: takes note of the call, and of what enters the first."""
        calls = self._calls.setdefault(self._part, [])
        if index == 0:
            self._hidden[self._state, self._part] = hidden
        if len(calls) == index:
            calls.append((arguments, keywords))
        elif not _same(calls[index], (arguments, keywords)):
            raise CannotStreamError("its layers get more from the embeddings than hidden states")
        if index == len(self._blocks) - 1:
            raise Enough
        return hidden

    # ---------------------------------------------------------------------------- block by block

    def _refit_block(self, index: int) -> dict[str, Selection]:
        filled = self._skeleton.fill(self._skeleton.of_block(index))
        weights = _Weights(filled, self._targets, self._codec)
        run = partial(self._run, index)

        @contextmanager
        def teacher() -> Iterator[None]:
            with self._as("tuned"), weights.of("tuned"):
                yield

        if weights.fitted is not None:
            linears = own_linears(self._blocks[index])
            refit(linears, run, teacher, weights.fitted, weights.rounded, self._calibration)
        for state in STATES:
            parts = self._held_out + (self._calibration if state in ("fitted", "tuned") else [])
            with self._as(state), weights.of(state):
                for part in parts:
                    self._hidden[state, part] = run(part)
        self._skeleton.empty(filled)
        return weights.selections()

    @torch.no_grad()
    def _run(self, index: int, part: Sequence[int]) -> Tensor:
        """What a block makes of the state's hidden states."""
        arguments, keywords = self._calls[tuple(part)][index]
        hidden = self._hidden[self._state, tuple(part)].to(self._device)
        return self._unwrapped(self._blocks[index](hidden, *arguments, **keywords))

    def _unwrapped(self, result: Any) -> Tensor:
        found: Tensor = result[0] if self._tuple else result
        return found

    # ----------------------------------------------------------------------------- after the blocks

    def _leave(self, index: int, hidden: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        """In place of a block: what left the last one."""
        return self._hidden[self._state, self._part].to(hidden) if index == 0 else hidden

    def _measures(self) -> dict[str, dict[str, float]]:
        """State -> its measures on the texts held out, by name."""

        def compare(part: Sequence[int]) -> dict[tuple[str, str], float]:
            with self._rest_as("tuned"):
                tuned = self._outputs(part)
            found = {}
            for state in STUDENTS:
                with self._rest_as(state):
                    measured = self._behaviour.compare(part, self._outputs(part), tuned)
                found.update({(state, name): value for name, value in measured.items()})
            return found

        means: dict[str, dict[str, float]] = {state: {} for state in STUDENTS}
        for (state, name), value in mean_over(self._held_out, compare).items():
            means[state][name] = value
        return means

    @torch.no_grad()
    def _outputs(self, part: Sequence[int]) -> Outputs:
        self._part = tuple(part)
        return self._behaviour.outputs(self._model, list(part))

    # ----------------------------------------------------------------------------------- states

    @contextmanager
    def _as(self, state: str) -> Iterator[None]:
        before, self._state = self._state, state
        try:
            yield
        finally:
            self._state = before

    @contextmanager
    def _rest_as(self, state: str) -> Iterator[None]:
        with self._as(state), self._rest.of(state):
            yield

    @contextmanager
    def _patched(self, forward: Callable[..., Tensor]) -> Iterator[None]:
        """Within, blocks have another forward pass, that gets their number first."""

        def called(index: int, *arguments: Any, **keywords: Any) -> Any:
            if not arguments:
                arguments = (keywords.pop("hidden_states"),)
            result = forward(index, *arguments, **keywords)
            return (result,) if self._tuple else result

        for index, block in enumerate(self._blocks):
            block.forward = partial(called, index)
        try:
            yield
        finally:
            for block in self._blocks:
                del block.forward


def _same(one: Any, other: Any) -> bool:
    """Whether two calls have the same arguments."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return True
