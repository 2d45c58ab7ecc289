"""The method "refit" layer by layer, for models of which only a few layers fit into memory.

The blocks of the model are filled from the files one after the other.  Hidden states pass from one block to the next:
those of the fine-tune, of the student, and, for the texts held out, of the base and of plain top-k as well.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shiradelta.fit.behaviour import Outputs, check_scales
from shiradelta.fit.fit_texts import FitTexts
from shiradelta.fit.fitted import DISTANCE, FitJob, Fitted
from shiradelta.fit.gain import Evidence
from shiradelta.fit.refit.hidden_states import HiddenStates, Part
from shiradelta.fit.refit.least_squares import Enough, left_out, left_out_warnings, own_linears, refit
from shiradelta.fit.refit.skeleton import CannotStreamError, Skeleton
from shiradelta.fit.refit.state_weights import STATES, STUDENTS, StateWeights
from shiradelta.fit.text_behaviour import not_run
from shiradelta.models import loading
from shiradelta.models.forward import forward_replaced
from shiradelta.models.placement import pick_devices
from shiradelta.select.topk import Selection
from shiradelta.text.batches import by_length, mean_over
from shiradelta.text.pooling import find_pooling


def stream(job: FitJob) -> Fitted:
    """Refits the targets; hidden states that exceed the memory are kept beside the output file.

    Raises:
        CannotStreamError: the model has to be in memory as a whole.
        SourceError: the texts, the model or the fine-tune cannot be used.
    """
    with tempfile.TemporaryDirectory(prefix=".shiradelta-", dir=job.out.absolute().parent) as scratch:
        return _Stream(job, HiddenStates(Path(scratch)))()


class _Stream:
    def __init__(self, job: FitJob, hidden: HiddenStates) -> None:
        self._fit, self._codec, self._hidden, self._progress = job.fit, job.codec, hidden, job.progress
        texts = FitTexts(job.fit)
        if texts.media:
            raise CannotStreamError(f"its examples have a {texts.media} each")
        processor = texts.processor(job.base, job.source)
        self._device = pick_devices(job.fit.device, lambda device: 0)[0]
        dtype = loading.pick_dtype(self._device, (target.dtype for target in job.targets))
        self._skeleton = Skeleton(job.base, job.source, dict(job.exact), self._device, dtype)
        self._model, self._blocks = self._skeleton.model, self._skeleton.blocks
        rest = self._skeleton.fill(self._skeleton.of_rest())
        pooling = find_pooling(job.base, job.source)
        self._behaviour = texts.behaviour(processor, self._model, pooling)
        self._evidence = Evidence(self._behaviour)

        self._pieces, self._tied = self._skeleton.pieces(job.targets)
        self._rest = StateWeights(rest, self._pieces, job.codec)
        lengths = self._behaviour.lengths
        self._held_out = [tuple(part) for part in by_length(texts.held_out, lengths, job.fit.per_pass)]
        self._calibration = [tuple(part) for part in texts.calibration(lengths)]
        self._warnings = not_run(job.base, job.source)
        self._state = "fitted"
        #: part -> (arguments, keywords) of each block, without the hidden states.
        self._calls: dict[Part, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        self._left: list[str] = []
        self._tuple = False  # whether blocks return their hidden states in one

    def __call__(self) -> Fitted:
        start = time.monotonic()
        self._fit.log(
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
                left = refit(
                    [module for module in late if module.weight in self._rest.weights.covered],
                    self._outputs,
                    partial(self._rest_as, "tuned"),
                    self._rest.fitted,
                    self._rest.quantiser,
                    self._calibration,
                    self._behaviour.token_weights,
                )
                self._left += left_out(self._model, self._rest.weights, left)
            measures = self._measures()
        tensors.update(self._rest.selections())
        tensors.update({name: tensors[first] for name, first in self._tied.items() if first in tensors})
        check_scales([measures["base"][DISTANCE]])
        used, held_out = (sum(map(len, parts)) for parts in (self._calibration, self._held_out))
        result = Fitted(tensors, self._behaviour.measure, used, held_out)
        result.warnings = self._warnings + left_out_warnings(self._left)
        for state, measure in measures.items():
            result.note(state, measure)
        result.gain = self._evidence.gain()
        result.seconds = time.monotonic() - start
        return result

    # ------------------------------------------------------------------------ before the blocks

    def _embed(self) -> list[nn.Module]:
        """Runs the layers before the blocks; returns the linear layers after them."""
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
        """Runs the first block to see the form of its result; returns the linear layers before it."""
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
        """Replaces a block: records the call, and the hidden states that enter the first block."""
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
        weights = StateWeights(filled, self._pieces, self._codec)
        run = partial(self._run, index)

        @contextmanager
        def teacher() -> Iterator[None]:
            with self._as("tuned"), weights.of("tuned"):
                yield

        if weights.fitted is not None:
            linears = [m for m in own_linears(self._blocks[index]) if m.weight in weights.weights.covered]
            left = refit(
                linears,
                run,
                teacher,
                weights.fitted,
                weights.quantiser,
                self._calibration,
                self._behaviour.token_weights,
            )
            self._left += left_out(self._blocks[index], weights.weights, left)
        for state in STATES:
            parts = self._held_out + (self._calibration if state in ("fitted", "tuned") else [])
            with self._as(state), weights.of(state):
                for part in parts:
                    self._hidden[state, part] = run(part)
        self._skeleton.empty(filled)
        return weights.selections()

    @torch.no_grad()
    def _run(self, index: int, part: Sequence[int]) -> Tensor:
        """The output of a block for the hidden states of the current state."""
        arguments, keywords = self._calls[tuple(part)][index]
        hidden = self._hidden[self._state, tuple(part)].to(self._device)
        return self._unwrapped(self._blocks[index](hidden, *arguments, **keywords))

    def _unwrapped(self, result: Any) -> Tensor:
        found: Tensor = result[0] if self._tuple else result
        return found

    # ----------------------------------------------------------------------------- after the blocks

    def _leave(self, index: int, hidden: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        """Replaces a block: returns the hidden states that left the last block."""
        return self._hidden[self._state, self._part].to(hidden) if index == 0 else hidden

    def _measures(self) -> dict[str, dict[str, float]]:
        """State -> its measures on the held-out texts, by name."""

        def compare(part: Sequence[int]) -> dict[tuple[str, str], float]:
            with self._rest_as("tuned"):
                tuned = self._outputs(part)
            self._evidence.add("tuned", part, tuned)
            found = {}
            for state in STUDENTS:
                with self._rest_as(state):
                    outputs = self._outputs(part)
                self._evidence.add(state, part, outputs)
                measured = self._behaviour.compare(part, outputs, tuned)
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
        """Within the block, the model's blocks have another forward pass, which gets their number first."""

        def called(index: int, *arguments: Any, **keywords: Any) -> Any:
            if not arguments:
                arguments = (keywords.pop("hidden_states"),)
            result = forward(index, *arguments, **keywords)
            return (result,) if self._tuple else result

        with forward_replaced(self._blocks, lambda index, _: partial(called, index)):
            yield


#: Types whose values tell all about them.
_PLAIN = (bool, int, float, str, bytes, torch.dtype, torch.device)


def _same(one: Any, other: Any) -> bool:
    """Whether two calls have the same arguments; objects of unknown types are the same only if they are identical."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return isinstance(one, _PLAIN) and bool(one == other)
