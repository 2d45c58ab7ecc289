"""The self-test of a session: whether an engine computes with the weights that switches write.

Some engines copy weights: oneDNN packs them, inductor freezes them, AOTInductor compiles them in.  A switch then has no
effect on what they compute, and nothing says so.  The test changes one tensor after another, as a switch does, and
compares the effect on the engine's output with that on a reference's.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from enum import IntEnum
from io import BytesIO
from itertools import count
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from shiradelta.errors import ArgumentError, TargetError
from shiradelta.format import registry
from shiradelta.format.codecs import F32
from shiradelta.format.delta import TensorDelta
from shiradelta.hotswap.loaded import Loaded
from shiradelta.hotswap.ranks import Ranks
from shiradelta.hotswap.reports import LoadReport, SelfTestReport, SwitchReport
from shiradelta.io.writer import DeltaWriter
from shiradelta.models.live import Target
from shiradelta.models.names import Shape
from shiradelta.util.arguments import ANY, CALL, checked
from shiradelta.util.text import brief

#: Runs a model on an input and returns its output: tensors or arrays, also in sequences and mappings.
Run = Callable[[], Any]
_Outputs = NDArray[np.float64]

#: For messages.
_CALL = "selftest()"
#: The most elements of a tensor that a probe changes; they are spread over all of it.
_ELEMENTS = 1 << 18
#: How strongly probes change a tensor, one try after another.  Elsewhere than routing and rounding, all tries agree.
_STRENGTHS = (1.0, 0.25, 2.0)
#: Of the reference's output, the least effect that says something.
_LEAST = 1e-4
#: How much larger than the difference between engine and reference an effect has to be to be compared.
_CLEAR = 16
#: Of the effect on the reference, the error that rounding explains.
_ROUNDING = 0.25


class _Verdict(IntEnum):
    """What outputs tell of a tensor; of several processes or tries the largest counts."""

    UNSEEN = 0
    FOLLOWED = 1
    STALE = 2


class _Session(Protocol):
    """What the test needs of a `HotSwap`."""

    _lock: threading.RLock
    _adapters: dict[str, Loaded]
    _targets: dict[str, Target]
    _ranks: Ranks

    def load(self, name: str, source: bytes) -> LoadReport: ...
    def unload(self, name: str) -> None: ...
    def applied(self, adapters: str | None, strength: float | None = None) -> AbstractContextManager[SwitchReport]: ...


class SelfTested:
    """A session that can be tested."""

    @checked(run=CALL, reference=ANY)
    def selftest(self: _Session, run: Run, reference: Run | None = None) -> SelfTestReport:
        """Tests that an engine computes with the weights that switches write, and not with copies of its own.

        Each tensor that a loaded adapter changes is changed in turn, at up to 262,144 elements, by a switch of the
        session; `run` and `reference` are called before and after it.  Afterwards the weights and `active` are as
        before, bit for bit.  docs/live.md says which engines were tried.

        Args:
            run: runs the engine on a fixed input; without arguments.  Returns tensors or arrays, also in sequences and
                mappings.
            reference: computes the same from the model's own weights, without copies; None for `run` with
                `torch.compile` and the fast path of `torch.nn.MultiheadAttention` switched off.

        Returns:
            Which tensors the output follows, and of which it tells nothing.

        Raises:
            TargetError: the output does not follow a tensor as the reference's does; or, without a reference, does not
                depend on one at all.  The message names it.
            TargetError: outputs are not finite, or the engine's and the reference's differ in the base already.
            ArgumentError: no adapter is loaded, the reference is no function, or an output is no array.
        """
        if reference is not None and not callable(reference):
            raise ArgumentError(f"reference is {type(reference).__name__}; give a function without arguments, or None")
        with self._lock:
            if not self._adapters:
                raise ArgumentError("no adapter is loaded, so no tensor is to be tested; load one first")
            pair = _Pair(run, reference)
            found: dict[_Verdict, list[str]] = {verdict: [] for verdict in _Verdict}
            with self.applied(None):
                self._ranks.agree(_CALL, pair.record_base)
                probe = _unused(self._adapters)
                for name, (stored, shape) in _tested(self._adapters.values()).items():
                    dtype = self._targets[name].dtype
                    verdict = _Verdict.UNSEEN
                    if dtype in registry.ADD_DTYPES:
                        try:
                            self.load(probe, _probe(stored, shape, dtype))
                            verdict = _verdict(self, probe, pair)
                        finally:
                            if probe in self._adapters:
                                self.unload(probe)
                    found[verdict].append(name)
        if stale := found[_Verdict.STALE]:
            some = brief(", ".join(map(repr, stale)), 400)
            raise TargetError(
                f"the output does not follow {len(stale)} of {sum(map(len, found.values()))} tensors: {some}; the"
                " engine computes with copies, so make it anew after each switch, or without packing, freezing or"
                " constants (docs/live.md)"
            )
        if not found[_Verdict.FOLLOWED]:
            raise TargetError(
                "the output tells nothing of any tensor that the adapters change; give another input, or a reference"
            )
        return SelfTestReport(tuple(found[_Verdict.FOLLOWED]), tuple(found[_Verdict.UNSEEN]))


class _Pair:
    """An engine and its reference.

    Attributes:
        is_own: whether the reference is one of the caller's own.
    """

    def __init__(self, run: Run, reference: Run | None) -> None:
        self._run, self._reference = run, reference or run
        self.is_own = reference is not None

    def _outputs(self) -> tuple[_Outputs, _Outputs]:
        ran = _flat(self._run())
        with ExitStack() if self.is_own else _eager():
            return ran, _flat(self._reference())

    def record_base(self) -> None:
        """Notes the outputs with the present weights.

        Raises:
            TargetError: they cannot be compared.
        """
        ran, wanted = self._outputs()
        if ran.shape != wanted.shape or not ran.size:
            raise ArgumentError(
                f"run gives {ran.size:,} numbers and the reference {wanted.size:,}; give functions that return the same"
                " tensors"
            )
        if not (np.isfinite(ran).all() and np.isfinite(wanted).all()):
            raise TargetError("the outputs are not finite, so they cannot be compared; return others")
        self._base = ran, wanted
        self._scale = _norm(wanted)
        self._difference = _norm(ran - wanted)
        if self._difference > _ROUNDING * self._scale:
            raise TargetError(
                "the engine's output and the reference's differ in the base already; use the same input, call eval() on"
                " the model, and make the engine again if other weights were active when it was made"
            )

    def compare(self) -> _Verdict:
        """Whether the engine's output has changed as the reference's."""
        ran, wanted = self._outputs()
        if ran.shape != wanted.shape or not (np.isfinite(ran).all() and np.isfinite(wanted).all()):
            return _Verdict.UNSEEN
        changed, to_change = ran - self._base[0], wanted - self._base[1]
        effect = _norm(to_change)
        if not changed.any() and (effect > _LEAST * self._scale or (not self.is_own and not effect)):
            return _Verdict.STALE
        if effect <= max(_CLEAR * self._difference, _LEAST * self._scale):
            return _Verdict.UNSEEN
        return _Verdict.STALE if _norm(changed - to_change) > _ROUNDING * effect else _Verdict.FOLLOWED


def _verdict(session: _Session, probe: str, pair: _Pair) -> _Verdict:
    """Tries a probe at several strengths, until the output follows one."""
    found = _Verdict.UNSEEN
    for strength in _STRENGTHS:
        with session.applied(probe, strength):
            verdict = max(session._ranks.gather(session._ranks.agree(_CALL, pair.compare)))
        if verdict is _Verdict.FOLLOWED:
            return verdict
        found = max(found, verdict)
    return found


def _unused(names: Container[str]) -> str:
    """A name for a probe that no adapter has."""
    return next(name for name in map("probe {}".format, count()) if name not in names)


def _tested(adapters: Iterable[Loaded]) -> Mapping[str, tuple[str, Shape]]:
    """The model's tensors that adapters change -> their names and shapes in a file."""
    found: dict[str, tuple[str, Shape]] = {}
    for adapter in adapters:
        for stored, name in adapter.report.matched.items():
            if (record := adapter.table.named(stored)).nnz:
                found.setdefault(name, (stored, record.shape))
    return found


def _probe(name: str, shape: Shape, dtype: str) -> bytes:
    """A file that adds normal numbers to elements all over a tensor.

    Numbers of one size would cancel out in what follows a layer, such as a normalisation.
    """
    numel = math.prod(shape)
    step = -(-numel // _ELEMENTS) | 1 if numel > _ELEMENTS else 1  # odd: not the same column again and again
    positions = np.arange(0, numel, step)
    values = np.random.default_rng(0).standard_normal(positions.size).astype(np.float32)
    writer, output = DeltaWriter(BytesIO(), F32.option, False, "auto"), BytesIO()
    writer.add(name, TensorDelta(shape, positions, values, dtype))
    writer.finish(output)
    return output.getvalue()


@contextmanager
def _eager() -> Iterator[None]:
    """Switches off what of torch may have weights of its own, where torch is loaded."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    was_on = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        # Its import takes seconds, and what was compiled has imported it.
        with torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else ExitStack():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_on)


def _flat(output: Any) -> _Outputs:
    """All numbers of an output, copied."""
    return np.concatenate([np.zeros(0), *_numbers(output)])


def _numbers(output: Any) -> Iterator[_Outputs]:
    if isinstance(output, Mapping):
        output = list(output.values())
    if output is None:
        return
    if isinstance(output, list | tuple):
        for one in output:
            yield from _numbers(one)
    elif hasattr(output, "detach"):
        output = output.full_tensor() if hasattr(output, "full_tensor") else output  # of one that is in pieces
        yield output.detach().double().cpu().numpy().reshape(-1).copy()
    elif isinstance(output, np.ndarray) and output.dtype.kind in "biuf":
        yield output.astype(np.float64).reshape(-1)
    else:
        raise ArgumentError(f"the output has a {type(output).__name__}; return tensors or arrays of numbers")


def _norm(vector: _Outputs) -> float:
    return float(np.linalg.norm(vector))
