"""`HotSwap`: adapters in and out of a live model's weights, exactly, all or nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from shiradelta import arithmetic, wire
from shiradelta.codecs.base import Bytes
from shiradelta.digest import tensor_digest
from shiradelta.engine.backends import new_backend
from shiradelta.engine.interrupts import interrupts_held_back
from shiradelta.engine.live import Target, is_array, live_tensors
from shiradelta.engine.live_backend import Layer, LiveBackend, Patch
from shiradelta.engine.matching import Names, check_fingerprint, check_fit, check_overlaps, match
from shiradelta.engine.reading import read_whole
from shiradelta.errors import BaseMismatchError, DeltaError, FormatError, TargetError
from shiradelta.reader import Source, StoredTensor, open_delta


@dataclass(frozen=True)
class LoadReport:
    """What `load` found.

    Attributes:
        name: the adapter's.
        matched: the file's names -> the model's.
        unmatched: the file's names that the model does not have.
        unchecked: matched tensors that no fingerprint was compared for: the file has none, or another dtype.
        nonzeros: elements that the matched tensors change.
        nbytes: memory that the adapter takes while it is loaded.
    """

    name: str
    matched: Mapping[str, str]
    unmatched: tuple[str, ...]
    unchecked: tuple[str, ...]
    nonzeros: int
    nbytes: int


@dataclass(frozen=True)
class SwitchReport:
    """What a switch left on the model.

    Attributes:
        active: adapter -> strength.
        tensors: that adapters are on.
        nonzeros: of all adapters together.
        nbytes: memory of the elements that were saved.
    """

    active: Mapping[str, float]
    tensors: int
    nonzeros: int
    nbytes: int


@dataclass(frozen=True)
class _Adapter:
    digest: bytes
    patches: Mapping[Target, Patch]
    report: LoadReport


class HotSwap:
    """Adapters for the weights of a live model.

    The weights are at every moment bitwise what the base and the active adapters give (spec/FORMAT.md, section
    6), whatever came before; after `revert` they are bitwise the base.  What is overwritten is saved, and put back;
    nothing is ever subtracted.  Tensors stay at their addresses, so compiled models and CUDA graphs go on working.

    A switch that fails leaves the weights as they were.  Methods may be called from several threads; a model that
    runs meanwhile on a CPU has to be kept from doing so by the caller.  On CUDA work is queued on the current
    stream, or the one that is given: what is queued there before sees the old weights, what comes after the new.

    Args:
        model: a torch module, or a mapping of names to torch tensors, NumPy arrays and modules.  A uint16 array
            stands for bfloat16 where a delta says so.
        names: where a file's names differ from the model's: a mapping or a function from one to the other.
            Prefixes such as `model.` or `base_model.model.` are found without.
        backend: "libshd" and "numpy" (CPU), "torch" (any device), "triton" (CUDA and ROCm), or "auto" for the best
            there is.  All give the same bits.

    Raises:
        TargetError: something that is no model.
        DeltaError: an unknown backend.
    """

    def __init__(self, model: Any, names: Names | None = None, backend: str = "auto") -> None:
        self._targets = live_tensors(model)
        self._names = names
        self._choice = backend
        devices = {target.device for target in self._targets.values()} - {"meta"} or {"cpu"}
        self._backends = {device: new_backend(backend, device) for device in sorted(devices)}
        self._adapters: dict[str, _Adapter] = {}
        self._active: dict[str, float] = {}
        self._layers: dict[Target, list[Layer]] = {}
        self._lock = threading.RLock()
        self._broken: str | None = None

    # ---------------------------------------------------------------------------------------- looking

    @property
    def active(self) -> dict[str, float]:
        """Adapter -> strength, of those that are on the weights now."""
        with self._lock:
            return dict(self._active)

    @property
    def loaded(self) -> dict[str, LoadReport]:
        """Adapter -> what `load` found, of all that are loaded."""
        with self._lock:
            return {name: adapter.report for name, adapter in self._adapters.items()}

    @property
    def nbytes(self) -> int:
        """Memory of all adapters that are loaded and of the elements that are saved."""
        with self._lock:
            return sum(adapter.report.nbytes for adapter in self._adapters.values()) + self._saved_bytes()

    def changed(self) -> int:
        """Weights whose bits differ from the base's now."""
        with self._lock, self._ordered(None):
            self._usable()
            return sum(self._backend(target).changed([stack]) for target, stack in self._layers.items() if stack)

    # ---------------------------------------------------------------------------------------- loading

    def load(
        self, name: str, source: Source, check: bool = True, allow_dtype: bool = False, strict: bool = False
    ) -> LoadReport:
        """Reads and checks an adapter and copies it, compressed, beside the weights, which stay as they are.

        Args:
            name: what to call it; not one that is loaded.
            source: a path, bytes, or a binary file.
            check: refuse a base whose fingerprint differs.  What is active is looked through.
            allow_dtype: take an adapter that was made against a base of another dtype; it cannot be checked then.
            strict: refuse it if the model lacks one of its tensors.

        Raises:
            BaseMismatchError: it does not fit the model; nothing matched.
            TargetError: a tensor cannot be written: quantised, on meta, moved.
            FormatError: the file is refused.
            DeltaError: the name is taken.
        """
        self._free_name(name)
        label, data = read_whole(source, next(iter(self._backends.values())).buffer)
        try:
            adapter = self._prepare(name, label, data, allow_dtype, strict)
        except FormatError as error:
            error.file = error.file or label
            raise
        with self._lock:
            self._usable()
            self._free_name(name)
            check_overlaps(label, {*adapter.patches, *(t for other in self._adapters.values() for t in other.patches)})
            unchecked = self._check(adapter, label, check)
            report = LoadReport(**{**vars(adapter.report), "unchecked": unchecked})
            self._adapters[name] = _Adapter(adapter.digest, adapter.patches, report)
            return report

    def load_async(self, name: str, source: Source, **options: bool) -> Future[LoadReport]:
        """`load` in a thread of its own; the future has its report, or raises what it raises."""
        executor = ThreadPoolExecutor(1, thread_name_prefix="shiradelta-load")
        future = executor.submit(self.load, name, source, **options)
        executor.shutdown(wait=False)
        return future

    def unload(self, name: str) -> None:
        """Forgets an adapter that is not active.

        Raises:
            DeltaError: it is not loaded, or active.
        """
        with self._lock:
            self._known([name])
            if name in self._active:
                raise DeltaError(f"adapter {name!r} is active; switch to another or revert before unloading it")
            del self._adapters[name]

    def _free_name(self, name: str) -> None:
        if name in self._adapters:
            raise DeltaError(f"an adapter {name!r} is loaded already; unload it first, or take another name")

    def _prepare(self, name: str, label: str, data: Bytes, allow_dtype: bool, strict: bool) -> _Adapter:
        """All of loading that does not look at the weights."""
        delta = open_delta(data, self._choice if self._choice in ("numpy", "libshd") else "auto")
        matched, unmatched = match(delta, self._targets, self._names, label, strict)
        fits: dict[Target, tuple[StoredTensor, str]] = {}
        for own, other in matched.items():
            target, tensor = self._targets[other], delta[own]
            dtype = check_fit(f"{label}: tensor {own!r}", tensor, target, allow_dtype)
            twin = fits.setdefault(target, (tensor, dtype))[0]
            if twin is not tensor and tensor_digest(twin) != tensor_digest(tensor):
                raise BaseMismatchError(
                    f"{label}: tensor {own!r} is tied to another, and the delta changes the two differently; untie the"
                    " model before loading"
                )
        groups: dict[LiveBackend, list[tuple[StoredTensor, Target, str]]] = {}
        for target, (tensor, dtype) in fits.items():
            groups.setdefault(self._backend(target), []).append((tensor, target, dtype))
        patches, nbytes = [], 0
        for backend, tensors in groups.items():
            held = backend.hold(data, tensors)
            nbytes += backend.nbytes(held)
            patches += held
        report = LoadReport(name, matched, unmatched, (), sum(p.record.nnz for p in patches), nbytes)
        return _Adapter(bytes.fromhex(delta.digest), {patch.target: patch for patch in patches}, report)

    def _check(self, adapter: _Adapter, label: str, check: bool) -> tuple[str, ...]:
        """Compares the fingerprints; returns the names of what has none to compare."""
        known = {
            target: patch
            for target, patch in adapter.patches.items()
            if patch.record.base_fingerprint is not None and patch.record.dtype.name == patch.dtype
        }
        for target in adapter.patches:
            target.check_address()
        if check:
            with self._ordered(None):
                for backend, patches in self._grouped(known.values()):
                    for patch, found in zip(patches, backend.fingerprints(patches, self._layers), strict=True):
                        check_fingerprint(label, patch, found)
        names = adapter.report.matched
        return tuple(name for name, other in names.items() if not check or self._targets[other] not in known)

    # -------------------------------------------------------------------------------------- switching

    def switch(
        self, adapters: str | Mapping[str, float] | None, strength: float = 1.0, stream: Any = None
    ) -> SwitchReport:
        """Makes exactly these adapters active, instead of those that are.

        Args:
            adapters: a name, or name -> strength; None or an empty mapping for the base.
            strength: alpha, where one name is given.
            stream: the CUDA stream to queue the work on; None for the current one.

        Raises:
            DeltaError: a name that is not loaded, or strengths that are not allowed.
            TargetError: the model was moved, or is in an unknown state.
            On every error the weights are as before.
        """
        wanted = {adapters: strength} if isinstance(adapters, str) else dict(adapters or {})
        with self._lock:
            self._usable()
            self._check_strengths(wanted)
            if wanted != self._active:
                self._commit(wanted, stream)
            return SwitchReport(
                dict(self._active),
                len(self._layers),
                sum(self._adapters[name].report.nonzeros for name in self._active),
                self._saved_bytes(),
            )

    def revert(self, stream: Any = None) -> SwitchReport:
        """Puts the base back, bit for bit."""
        return self.switch(None, stream=stream)

    @contextmanager
    def applied(
        self, adapters: str | Mapping[str, float] | None, strength: float = 1.0, stream: Any = None
    ) -> Iterator[SwitchReport]:
        """A block in which these adapters are active, and after which those from before are again.

        Other threads that want to switch wait for its end.
        """
        with self._lock:
            before = dict(self._active)
            report = self.switch(adapters, strength, stream)
            try:
                yield report
            finally:
                self.switch(before, stream=stream)

    def _check_strengths(self, wanted: Mapping[str, float]) -> None:
        self._known(wanted)
        digests: dict[bytes, str] = {}
        for name, strength in wanted.items():
            arithmetic.scaled(np.zeros(0, np.float32), strength)
            adapter = self._adapters[name]
            if strength != 1 and any(not patch.record.adds for patch in adapter.patches.values()):
                raise DeltaError(f"adapter {name!r} sets whole values, which have no strength; leave it at 1")
            twin = digests.setdefault(adapter.digest, name)
            if twin != name:
                raise DeltaError(f"adapters {twin!r} and {name!r} are the same delta; give it one strength")

    def _known(self, names: Mapping[str, float] | Sequence[str]) -> None:
        for name in names:
            if name not in self._adapters:
                some = ", ".join(self._adapters) or "none"
                raise DeltaError(f"adapter {name!r} is not loaded ({some} are); load it first")

    def _usable(self) -> None:
        if self._broken is not None:
            raise TargetError(self._broken)

    def _commit(self, wanted: Mapping[str, float], stream: Any) -> None:
        before, after = self._layers, {}
        with self._ordered(stream):
            after = self._new_layers(wanted)
            for target in {**before, **after}:
                target.check_address()
            with interrupts_held_back() as deliver_interrupts:
                try:
                    self._restore(before)
                    deliver_interrupts()
                    self._apply(after)
                    deliver_interrupts()
                except BaseException:
                    self._roll_back(before, after)
                    raise
                self._layers, self._active = after, dict(wanted)
            self._written({**before, **after})

    def _new_layers(self, wanted: Mapping[str, float]) -> dict[Target, list[Layer]]:
        """What is to be on each tensor, with memory for what it overwrites."""
        order = sorted(wanted, key=lambda name: self._adapters[name].digest)
        layers: dict[Target, list[Layer]] = {}
        for name in order:
            adapter = self._adapters[name]
            for backend, patches in self._grouped(p for p in adapter.patches.values() if p.record.nnz):
                for patch, saved in zip(patches, backend.room(patches), strict=True):
                    layers.setdefault(patch.target, []).append(Layer(patch, wanted[name], saved))
        for target, stack in layers.items():
            if len(stack) == 1:
                continue
            stack.sort(key=lambda layer: layer.patch.record.adds)  # stable: SETs first
            sets = [layer.patch for layer in stack if not layer.patch.record.adds]
            for i, one in enumerate(sets):
                if any(self._backend(target).share_positions(one, other) for other in sets[:i]):
                    raise DeltaError(
                        f"two adapters set the same elements of tensor {target.name!r}; only one of them can be active"
                    )
        return layers

    def _restore(self, layers: Mapping[Target, Sequence[Layer]]) -> None:
        flat = [layer for stack in layers.values() for layer in stack]
        for backend, group in self._grouped(flat, lambda layer: layer.patch.target):
            backend.restore(group)

    def _apply(self, layers: Mapping[Target, Sequence[Layer]]) -> None:
        for backend, stacks in self._grouped(layers.values(), lambda stack: stack[0].patch.target):
            backend.apply(stacks)

    def _roll_back(self, before: Mapping[Target, Sequence[Layer]], after: dict[Target, list[Layer]]) -> None:
        """From anywhere in a commit to where it started; every step may have been done already."""
        try:
            self._restore({target: [x for x in stack if x.filled] for target, stack in after.items()})
            after.clear()  # what it takes to get back is not more than what it took to get there
            self._restore(before)
            self._apply(before)
        except BaseException as error:
            self._broken = (
                f"the weights are in an unknown state, because undoing a failed switch failed too ({error}); load the"
                " model again"
            )
            raise TargetError(self._broken) from error

    def _written(self, targets: Mapping[Target, object]) -> None:
        """Tells autograd that tensors have changed."""
        holders = [target.holder for target in targets if not is_array(target.holder)]
        if holders:
            from torch.autograd.graph import increment_version

            increment_version([holder for holder in holders if not holder.is_inference()])

    # --------------------------------------------------------------------------------------- backends

    def _backend(self, target: Target) -> LiveBackend:
        """The backend of the device that a tensor is on."""
        return self._backends[target.device]

    def _grouped(self, items: Any, target_of: Callable[[Any], Target] = lambda patch: patch.target) -> Any:
        """(backend, those of the items whose targets it has)."""
        if len(self._backends) == 1:
            return [(backend, list(items)) for backend in self._backends.values()]
        groups: dict[LiveBackend, list[Any]] = {}
        for item in items:
            groups.setdefault(self._backend(target_of(item)), []).append(item)
        return groups.items()

    @contextmanager
    def _ordered(self, stream: Any) -> Iterator[None]:
        with ExitStack() as stack:
            for backend in self._backends.values():
                stack.enter_context(backend.ordered(stream))
            yield

    def _saved_bytes(self) -> int:
        layers = (layer for stack in self._layers.values() for layer in stack)
        return sum(layer.patch.record.nnz * wire.DTYPE_OF_NAME[layer.patch.dtype].size for layer in layers)
