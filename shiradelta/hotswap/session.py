"""`HotSwap`: adapters in and out of a live model's weights, exactly, all or nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from shiradelta.backends.choose import AUTO, FILE_BACKENDS
from shiradelta.errors import BaseMismatchError, DeltaError, FormatError, TargetError
from shiradelta.format import arithmetic
from shiradelta.format.codecs.base import Bytes
from shiradelta.format.digest import tensor_digest
from shiradelta.hotswap.choose import new_backend
from shiradelta.hotswap.layers import Held, Layer, Patch
from shiradelta.hotswap.matching import Names, check_fit, check_overlaps, match
from shiradelta.hotswap.protocol import LiveBackend
from shiradelta.hotswap.reading import read_whole
from shiradelta.io.reader import Source, StoredTensor, open_delta
from shiradelta.models.fingerprint import Remedies, check_fingerprint
from shiradelta.models.live import Target, live_tensors
from shiradelta.util.interrupts import interrupts_held_back

#: What is on the weights of each kind of memory, in the order of the adapters' digests.
Layers = dict[LiveBackend, list[Layer]]
_REMEDIES = Remedies("give the base, without the delta in it", "check=False to take it for this one")


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
    held: Mapping[LiveBackend, Held]
    report: LoadReport

    def patches(self) -> Iterator[Patch]:
        """In all kinds of memory."""
        return (patch for held in self.held.values() for patch in held.patches)


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
        self._layers: Layers = {}
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
        """Weights whose bits differ from the base's now.

        Raises:
            TargetError: the model was moved, or is in an unknown state.
        """
        with self._lock, self._ordered(None, reads=True):
            self._usable()
            for held in _on_different_tensors(self._layers):
                held.check_memory()
                held.check_model()
            return sum(backend.changed(layers) for backend, layers in self._layers.items())

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
            everything = [adapter, *self._adapters.values()]
            check_overlaps(label, {patch.target for one in everything for patch in one.patches()})
            unchecked = self._check(adapter, label, check)
            report = LoadReport(**{**vars(adapter.report), "unchecked": unchecked})
            self._adapters[name] = _Adapter(adapter.digest, adapter.held, report)
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
        delta = open_delta(data, self._choice if self._choice in FILE_BACKENDS else AUTO)
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
        held = {backend: backend.hold(data, tensors) for backend, tensors in groups.items()}
        nonzeros = sum(tensor.nnz for tensor, _ in fits.values())
        report = LoadReport(name, matched, unmatched, (), nonzeros, sum(one.nbytes for one in held.values()))
        return _Adapter(bytes.fromhex(delta.digest), held, report)

    def _check(self, adapter: _Adapter, label: str, check: bool) -> tuple[str, ...]:
        """Compares the fingerprints; returns the names of what has none to compare."""
        known: set[Target] = set()
        for backend, held in adapter.held.items():
            held.check_model()
            mine = [
                (number, patch)
                for number, patch in enumerate(held.patches)
                if patch.record.base_fingerprint is not None and patch.record.dtype.name == patch.dtype
            ]
            known.update(patch.target for _, patch in mine)
            if check and mine:
                with self._ordered(None, reads=True):
                    found = backend.fingerprints(held, self._layers.get(backend, []))
                for number, patch in mine:
                    record = patch.record
                    fingerprints = found[number], record.base_fingerprint, record.result_fingerprint
                    check_fingerprint(f"{label}: tensor {record.name!r}", *fingerprints, _REMEDIES)
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
            wanted = self._checked(wanted)
            if _bits(wanted) != _bits(self._active):
                self._commit(wanted, stream)
            return SwitchReport(
                dict(self._active),
                len(frozenset().union(*(layer.held.targets for layers in self._layers.values() for layer in layers))),
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
            try:
                yield self.switch(adapters, strength, stream)
            finally:
                try:
                    with interrupts_held_back():
                        self.switch(before, stream=stream)
                except BaseException:  # one that came before signals were held back
                    self.switch(before, stream=stream)
                    raise

    def _checked(self, wanted: Mapping[str, float]) -> dict[str, float]:
        """Adapters that go together, with strengths that they can have."""
        self._known(wanted)
        digests: dict[bytes, str] = {}
        for name, strength in wanted.items():
            arithmetic.alpha_of(strength)
            adapter = self._adapters[name]
            if strength != 1 and any(not patch.record.adds for patch in adapter.patches()):
                raise DeltaError(f"adapter {name!r} sets whole values, which have no strength; leave it at 1")
            twin = digests.setdefault(adapter.digest, name)
            if twin != name:
                raise DeltaError(f"adapters {twin!r} and {name!r} are the same delta; give it one strength")
        return {name: float(strength) for name, strength in wanted.items()}

    def _known(self, names: Mapping[str, float] | Sequence[str]) -> None:
        for name in names:
            if name not in self._adapters:
                some = ", ".join(self._adapters) or "none"
                raise DeltaError(f"adapter {name!r} is not loaded ({some} are); load it first")

    def _usable(self) -> None:
        if self._broken is not None:
            raise TargetError(self._broken)

    def _commit(self, wanted: Mapping[str, float], stream: Any) -> None:
        before = self._layers
        with self._ordered(stream):
            after = self._new_layers(wanted)
            touched = _on_different_tensors(before, after)
            for held in touched:
                held.check_memory()
            with interrupts_held_back() as deliver_interrupts:
                try:
                    for backend in {**before, **after}:
                        backend.replace(before.get(backend, []), after.get(backend, []))
                        deliver_interrupts()
                    for held in touched:  # while a device does what is queued
                        held.check_model()
                    _tell_autograd(touched)
                    deliver_interrupts()
                except BaseException:
                    self._roll_back(before, after)
                    raise
                self._layers, self._active = after, dict(wanted)

    def _new_layers(self, wanted: Mapping[str, float]) -> Layers:
        """What is to be on the tensors, with room for what it overwrites."""
        order = sorted(wanted, key=lambda name: self._adapters[name].digest)
        chosen: dict[LiveBackend, list[tuple[Held, float]]] = {}
        for name in order:
            for backend, held in self._adapters[name].held.items():
                chosen.setdefault(backend, []).append((held, wanted[name]))
        return {
            backend: self._with_room(backend, pairs, self._layers.get(backend, [])) for backend, pairs in chosen.items()
        }

    def _with_room(
        self, backend: LiveBackend, chosen: Sequence[tuple[Held, float]], before: Sequence[Layer]
    ) -> list[Layer]:
        """Layers in memory of their own; in the same, if only strengths are others than before."""
        if [held for held, _ in chosen] == [layer.held for layer in before]:
            pairs = zip(chosen, before, strict=True)
            return [Layer(held, strength, old.room, old.filled) for (held, strength), old in pairs]
        if len(chosen) > 1:
            _check_sets(backend, [held for held, _ in chosen])
        return [Layer(held, strength, backend.room(held.room)) for held, strength in chosen]

    def _roll_back(self, before: Layers, after: Layers) -> None:
        """From anywhere in a commit to where it started; every step may have been done already."""
        try:
            for backend, layers in after.items():
                backend.restore(layers)
            after.clear()  # what it takes to get back is not more than what it took to get there
            for backend, layers in before.items():
                backend.restore(layers)
                backend.replace([], layers)
        except BaseException as error:
            self._broken = (
                f"the weights are in an unknown state, because undoing a failed switch failed too ({error}); load the"
                " model again"
            )
            raise TargetError(self._broken) from error

    # --------------------------------------------------------------------------------------- backends

    def _backend(self, target: Target) -> LiveBackend:
        """The backend of the device that a tensor is on."""
        return self._backends[target.device]

    def _ordered(self, stream: Any, reads: bool = False) -> ExitStack:
        """`ordered` of all backends."""
        with ExitStack() as stack:
            for backend in self._backends.values():
                stack.enter_context(backend.ordered(stream, reads))
            return stack.pop_all()

    def _saved_bytes(self) -> int:
        return sum(layer.held.room for layers in self._layers.values() for layer in layers)


def _on_different_tensors(*states: Layers) -> list[Held]:
    """Of the adapters that are for the same tensors one."""
    found: list[Held] = []
    for layers in states:
        for held in (layer.held for one in layers.values() for layer in one):
            if not any(held.has_same_tensors(other) for other in found):
                found.append(held)
    return found


def _tell_autograd(helds: Iterable[Held]) -> None:
    """That their tensors have changed."""
    counted = [held.counted for held in helds if held.counted]
    if counted:
        from torch.autograd.graph import increment_version

        for tensors in counted:
            increment_version(tensors)


def _bits(strengths: Mapping[str, float]) -> dict[str, bytes]:
    """Tells apart what gives other results: -0 is not 0."""
    return {name: np.float32(strength).tobytes() for name, strength in strengths.items()}


def _check_sets(backend: LiveBackend, helds: Sequence[Held]) -> None:
    """Raises DeltaError if two adapters set the same element."""
    setting: dict[Target, list[Patch]] = {}
    for held in helds:
        for patch in held.patches:
            if not patch.record.adds and patch.record.nnz:
                setting.setdefault(patch.target, []).append(patch)
    for target, patches in setting.items():
        for i, one in enumerate(patches):
            if any(backend.share_positions(one, other) for other in patches[:i]):
                raise DeltaError(
                    f"two adapters set the same elements of tensor {target.name!r}; only one of them can be active"
                )
