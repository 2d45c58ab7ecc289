"""`HotSwap`: switches adapters in a live model's weights, exactly, all or nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any, NoReturn

from shiradelta.errors import ArgumentError, TargetError
from shiradelta.hotswap.base_check import fit_of
from shiradelta.hotswap.devices import Streams, devices_for
from shiradelta.hotswap.distributed import Distribution
from shiradelta.hotswap.layers import different_tensors
from shiradelta.hotswap.loaded import Loaded, Strengths, changed_strengths, check_loaded, targets_of, without
from shiradelta.hotswap.matching import Apart, Names
from shiradelta.hotswap.outside import NO_COPIES, Watch, survive_forks
from shiradelta.hotswap.patched import PatchedWeights
from shiradelta.hotswap.prepare import Preparation
from shiradelta.hotswap.ranks import ranks_for, with_those_elsewhere
from shiradelta.hotswap.reports import LoadReport, RebaseReport, SwitchReport, adapters_line, adapters_table
from shiradelta.hotswap.selftest import SelfTested
from shiradelta.hotswap.strengths import by_part, call_of, strengths_of
from shiradelta.io.reader import Source
from shiradelta.models.layout import LAYOUTS, Layout
from shiradelta.models.live import live_tensors
from shiradelta.models.pipelines import model_in
from shiradelta.models.strengths import Strength
from shiradelta.signing.keys import Keys
from shiradelta.util.arguments import (
    ANY,
    BOOL,
    NAMES,
    NUMBER,
    OPEN,
    STRENGTH,
    SWITCHED,
    TEXT,
    TEXTS,
    as_patterns,
    checked,
)
from shiradelta.util.deprecated import warn_renamed
from shiradelta.util.interrupts import interrupts_held_back, uninterrupted


class HotSwap(SelfTested):
    """Switches adapters in the weights of a live model, and reverts to the base bit for bit.

    The weights always equal, bit for bit, the base plus the active adapters (spec/FORMAT.md, section 6), whatever was
    active before; after `revert` they equal the base.  Overwritten elements are saved and put back; nothing is ever
    subtracted.  Tensors stay at their addresses, so compiled models and CUDA graphs keep working.

    A switch that fails leaves the weights as they were.  So does one that an exception from outside reaches, such as
    Ctrl-C: it is raised when the weights are whole again, and `active` says what they are.  Methods may be called from
    several threads, but the caller must not run the model on a CPU during a switch.  On CUDA, work is queued on the
    current stream or the given one: work queued there earlier sees the old weights, later work the new ones.

    After something else has written the weights, all methods refuse to read or write them until `rebase`; docs/live.md
    says what is noticed.

    Args:
        model: a torch module, a pipeline of transformers or diffusers, or a mapping of names to torch tensors, NumPy
            arrays and modules.  A uint16 array stands for bfloat16 where a delta says so.
        names: a mapping or a function from the file's names to the model's, if they differ.  Names in memory, names
            in the checkpoint, and either with another prefix (`base_model.model.`) are found without it.
        backend: "libshd" or "numpy" (CPU), "torch" (any device), "triton" (CUDA and ROCm), or "auto" for the fastest
            available.  All give the same bits.
        allow_shared: take weights in memory that other processes share.  Nothing else may write them.
        layout: names of tensors in the checkpoint -> where they lie in memory, where the model cannot tell: a serving
            engine's fused weights, for example (docs/distributed.md).
        group: a process group of torch.distributed whose processes each have a part of the model, and make the same
            calls; None for the ranks that the model's DTensors are spread over.
        timeout: seconds to wait for the other processes, from 0.001 to 1e8.

    Raises:
        TargetError: `model` is not a model, or a layout names memory that is not the model's.
        ArgumentError: a layout does not fit its tensor; no process can wait for such a time, or is in the group.
        DeltaError: the backend is unknown.
    """

    @checked(model=ANY, names=NAMES, allow_shared=BOOL, layout=LAYOUTS, group=ANY, timeout=NUMBER)
    def __init__(
        self,
        model: Any,
        names: Names | None = None,
        backend: str = "auto",
        *,
        allow_shared: bool = False,
        layout: Mapping[str, Layout] | None = None,
        group: Any = None,
        timeout: float = 60,
    ) -> None:
        self._kind = type(model).__name__
        model = model_in(model)
        targets = live_tensors(model, allow_shared=allow_shared, layout=layout)
        self._ranks = ranks_for(targets, group, timeout)
        self._targets = with_those_elsewhere(targets, self._ranks)
        self._devices = devices_for(self._targets.values(), backend)
        self._preparation = Preparation(self._targets, names, backend, self._devices, lambda: self._weights.stacks)
        self._adapters: dict[str, Loaded] = {}
        self._lock = threading.RLock()  # of the thread that uses the session
        self._apart = Apart()
        self._watch = Watch(model)
        self._fit = partial(fit_of, self._preparation, self._ranks, self._watch)
        self._weights = PatchedWeights(self._devices, self._watch, self._ranks)
        self._distribution = Distribution(model, self._targets, backend, group, timeout)
        survive_forks(self)

    # ---------------------------------------------------------------------------------------- state

    @property
    def active(self) -> dict[str, float]:
        """Adapter -> strength, for the adapters that are active now."""
        with self._lock:
            self._weights.settle()
            return self._weights.active

    @property
    def loaded(self) -> dict[str, LoadReport]:
        """Adapter -> the report of its `load`, for all adapters that are loaded."""
        with self._lock:
            return {name: adapter.report for name, adapter in self._adapters.items()}

    @property
    def nbytes(self) -> int:
        """Memory of all loaded adapters and of the saved elements."""
        with self._lock:
            self._weights.settle()
            return sum(adapter.report.nbytes for adapter in self._adapters.values()) + self._weights.nbytes

    def changed(self) -> int:
        """Number of weights whose bits differ from the base's now.

        Raises:
            TargetError: the model was moved, changed from outside, or is in an unknown state.
        """
        with self._lock, self._devices.ordered(reads=True):
            self._weights.settle()
            self._weights.check_usable()
            every = self._weights.layers
            for held in different_tensors(every.values()):
                held.check_memory()
                held.check_model()
            self._watch.check()
            return sum(backend.changed(layers) for backend, layers in every.items())

    def __getitem__(self, name: str) -> float:
        """The strength of a loaded adapter; 0 if it is not active.  Raises ArgumentError if it is not loaded."""
        with self._lock:
            check_loaded([name], self._adapters)
            return self.active.get(name, 0.0)

    @checked(name=TEXT, strength=STRENGTH)
    def __setitem__(self, name: str, strength: Strength) -> None:
        """Makes a loaded adapter active at a strength, beside the others; 0 takes it out.  Errors are `switch`'s.

        {part: strength} is for the adapters "name/part" that `shiradelta.load` makes of several strengths.
        """
        with self._lock:
            self.switch(changed_strengths(by_part(name, strength), self.active, self._adapters))

    def __delitem__(self, name: str) -> None:
        """Takes an adapter out of the weights, and unloads it."""
        with self._lock:
            self[name] = 0.0
            self.unload(name)

    def __iter__(self) -> Iterator[str]:
        """The names of the loaded adapters."""
        return iter(self.loaded)

    def __repr__(self) -> str:
        return f"<HotSwap on {self._kind}: {adapters_line(self.loaded, self.active)}>"

    def _repr_html_(self) -> str:
        """A table for notebooks."""
        return adapters_table(f"HotSwap on {self._kind}", self.loaded, self.active)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise ArgumentError(NO_COPIES)

    def _after_fork(self) -> None:
        """Goes on in a process that was forked, with its own copy of the weights."""
        was_used = not self._lock.acquire(blocking=False)
        if was_used:
            self._lock = threading.RLock()
            self._lock.acquire()
        self._weights.after_fork(was_used)
        self._lock.release()

    # ---------------------------------------------------------------------------------------- loading

    @checked(source=OPEN, only=TEXTS, strict=BOOL)
    def load(
        self,
        name: str,
        source: Source,
        *,
        check: bool = True,
        allow_dtype: bool = False,
        skip: str | Sequence[str] | None = (),
        only: Sequence[str] | None = None,
        key: Keys | None = None,
        limit: int | str | None = None,
        strict: bool | None = None,
    ) -> LoadReport:
        """Loads an adapter: reads and checks it, and copies it, compressed, to the device.  The weights do not change.

        Args:
            name: what to call the adapter; the name must be free.
            source: a path, also `user/repo[@revision][/file]` on the Hub; bytes, or a binary file.
            check: refuse a base whose fingerprint differs.  A delta that fits the present weights and not the base is a
                successor of the active adapters: the report's `beneath` has them, and it is active on top of them only.
            allow_dtype: take an adapter that was made against a base of another dtype; it cannot be checked then.
            skip: glob patterns of the file's names.  A tensor that the model does not have, or that cannot be written,
                is an error unless a pattern matches it; it is left out then, and the report's `unmatched` lists it.
            only: the file's names of the tensors to load; None for all.
            key: a file of public keys, or several: refuse what is not signed by one of them (see `verify_signature`).
            limit: the most memory that decoding a tensor, or all that it holds, may take; see `open_delta`.
            strict: deprecated; False is `skip="*"`, and True is the default now.

        Raises:
            ArgumentError: a pattern matches no tensor that would be refused without it.
            BaseMismatchError: the adapter does not fit the model.
            TargetError: a tensor cannot be written (quantised, on the meta device), was moved, changed from outside,
                or has adapters of another session on it.
            FormatError: the file is refused.
            DeltaError: the name is taken.
            LimitError: a tensor takes more memory than `limit` allows.
            SignatureError: the file is not signed by any of the keys.
        """
        if strict is not None:
            warn_renamed(f"strict={strict}", "no argument, which means the same" if strict else 'skip="*"')
            skip = skip if strict else "*"
        with ExitStack() as stack:
            if not self._ranks.alone:  # all processes make the same calls in the same order
                stack.enter_context(self._lock)
            began, what = perf_counter(), f"load({name!r})"

            def read() -> Loaded:
                self._free_name(name)
                patterns = as_patterns(skip)
                return self._preparation.read(name, source, key, allow_dtype, patterns, only, limit, self._lock)

            adapter = self._ranks.agree(what, read)
            stack.enter_context(self._lock)
            self._weights.settle()
            levels = self._weights.levels

            def check_model() -> None:
                self._weights.check_usable()
                self._free_name(name)
                self._apart.check(adapter.label, targets_of([adapter, *self._adapters.values()]))
                self._watch.check()

            self._ranks.agree(what, check_model)
            with self._followed(adapter) as follow:
                unchecked, fit = self._fit(what, adapter, check, levels, follow)
                if check:
                    self._ranks.agree(what, lambda: self._weights.others.check(targets_of([adapter])))
                report = replace(adapter.report, unchecked=unchecked, seconds=perf_counter() - began)
                adapter = replace(adapter, report=report, readings={})  # they were checked
                if fit is not None and fit.fits_present:
                    adapter = adapter.on((level.adapters for level in levels), fit.is_successor)
                self._adapters = {**self._adapters, name: adapter}
            return adapter.report

    @contextmanager
    def _followed(self, adapter: Loaded) -> Iterator[Callable[[], None]]:
        """A function that watches the tensors of an adapter, too; only those of loaded ones are if the block raises."""
        try:
            yield lambda: self._watch.follow(targets_of([*self._adapters.values(), adapter]))
        except BaseException:
            self._watch.follow(targets_of(self._adapters.values()))
            raise

    def load_async(self, name: str, source: Source, **options: Any) -> Future[LoadReport]:
        """Calls `load` in a thread; the future has its report, or raises its error.

        Raises:
            ArgumentError: the model is spread over processes, which make the same calls in the same order.
        """
        if not self._ranks.alone:
            raise ArgumentError("load_async cannot keep the order of calls in several processes; use load")
        executor = ThreadPoolExecutor(1, thread_name_prefix="shiradelta-load")
        future = executor.submit(self.load, name, source, **options)
        executor.shutdown(wait=False)
        return future

    @checked()
    def unload(self, name: str) -> None:
        """Removes an adapter from memory.

        Raises:
            DeltaError: the adapter is active, not loaded, or beneath a successor that is loaded.
        """
        with self._lock:
            self._weights.settle()

            def others() -> dict[str, Loaded]:
                check_loaded([name], self._adapters)
                if name in self._weights.active:
                    raise ArgumentError(f"adapter {name!r} is active; switch to another or revert before unloading it")
                return without(name, self._adapters)

            self._adapters = self._ranks.agree(f"unload({name!r})", others)
            self._watch.follow(targets_of(self._adapters.values()))

    def _free_name(self, name: str) -> None:
        if not name:
            raise ArgumentError("the adapter's name is empty; give one, by which switch() finds it")
        if name in self._adapters:
            raise ArgumentError(
                f"an adapter {name!r} is loaded already; take it out (del swap[{name!r}]), or take another name"
            )

    # -------------------------------------------------------------------------------------- switching

    @checked(adapters=SWITCHED, stream=ANY)
    def switch(
        self, adapters: str | Mapping[str, float] | None, strength: float | None = None, stream: Any = None
    ) -> SwitchReport:
        """Makes exactly these adapters active.  On every error the weights stay as they were.

        An exception from outside that comes in the last microseconds finds the adapters active: `active` says so.

        A successor brings the adapters that it was made for, and is applied to what they give; its strength is 1.  It
        is taken out before them.

        Args:
            adapters: a name, or name -> strength; None or an empty mapping for the base.
            strength: alpha, if `adapters` is one name; None for 1.
            stream: the CUDA stream to queue the work on; None for the current one.

        Raises:
            ArgumentError: a strength beside a mapping, which has its own.
            DeltaError: an adapter that is not loaded, a strength that is not allowed, or a successor beside others than
                those that it was made for.
            TargetError: the model was moved, changed from outside, or is in an unknown state.
        """
        wanted = strengths_of(adapters, strength)
        with self._lock:
            self._weights.settle()
            before, streams = self._weights.levels, self._devices.streams(stream)
            make_plan = partial(self._weights.plan, wanted, self._adapters)
            if self._ranks.alone:
                plan = make_plan()
                if self._weights.is_active(plan):  # nothing is written, so no exception can come at a wrong moment
                    self._watch.check()
                    return self._weights.report(self._adapters)
                make_plan = partial(list, plan)
            switch = partial(self._switch, wanted, make_plan, streams)
            try:
                if self._devices.only_queue and self._ranks.alone:
                    # Work that is queued is no faster on another thread, but begins later.
                    with interrupts_held_back():
                        return switch()
                (report,) = uninterrupted(switch)
                return report
            except BaseException:
                if self._ranks.alone:  # otherwise all processes have decided together
                    uninterrupted(partial(self._weights.take_back, before, streams))
                raise

    def revert(self, stream: Any = None) -> SwitchReport:
        """Puts the base back, bit for bit.

        Where the model was distributed since (`fully_shard`, `parallelize_module`), all processes call this, and each
        puts back its own part.  The session cannot be used afterwards.

        Raises:
            TargetError: the model was moved, changed from outside, or is in an unknown state.
        """
        return self.switch(None, stream=stream)

    @checked()
    def rebase(self, *, check: bool = True) -> RebaseReport:
        """Takes the weights as they are now as the base, whoever wrote them.  Afterwards nothing is active.

        Nothing is written, and saved elements are dropped.  An adapter that is still on a tensor becomes part of the
        base, so revert before other code writes the weights, or have it write all of them.  Afterwards all adapters are
        deltas of the new base, successors too.

        Args:
            check: refuse a base that an adapter's fingerprint does not fit, if `load` compared it.

        Raises:
            BaseMismatchError: an adapter was made for another base.  Everything stays as it was.
            TargetError: a tensor was moved or replaced.
        """
        with self._lock:
            self._weights.settle()
            unchecked = {
                name: self._fit("rebase()", adapter, check and adapter.was_compared, [])[0]
                for name, adapter in self._adapters.items()
            }
            changed = {target.name for target in self._watch.changed()}
            active = {target.name for target in self._weights.targets}
            self._weights.forget()
            self._adapters = {name: adapter.on((), False) for name, adapter in self._adapters.items()}
            self._watch.accept()
            real = (target for target in self._targets.values() if target.refusal is None and target.device != "meta")
            self._weights.others.accept(real)
            return RebaseReport(tuple(sorted(changed)), tuple(sorted(active - changed)), unchecked)

    @contextmanager
    def applied(
        self, adapters: str | Mapping[str, float] | None, strength: float | None = None, stream: Any = None
    ) -> Iterator[SwitchReport]:
        """A context in which these adapters are active; its end makes the previous ones active again.

        Other threads that switch wait for its end.  Arguments and errors are those of `switch`.
        """
        with self._lock:
            self._weights.settle()
            if not strengths_of(adapters, strength):  # `switch` would end a session whose model was distributed
                self._ranks.agree("applied()", self._watch.check)
            go_back = partial(self._go_back, self._weights.active, self._devices.streams(stream))
            try:
                yield self.switch(adapters, strength, stream)
            finally:
                try:
                    uninterrupted(go_back)
                except BaseException:  # it may have come before the work began
                    uninterrupted(go_back)
                    raise

    def _go_back(self, active: Strengths, streams: Streams) -> SwitchReport:
        return self._switch(active, partial(self._weights.plan, active, self._adapters), streams)

    def _switch(
        self, wanted: Strengths, make_plan: Callable[[], Sequence[Strengths]], streams: Streams
    ) -> SwitchReport:
        try:
            return self._weights.switch(make_plan, call_of(wanted), self._adapters, streams)
        except TargetError:
            if wanted or not self._weights.levels or not self._distribution.is_there():
                raise
            self._weights.end(partial(self._distribution.put_back, self._weights.layers, self._watch, self._ranks))
            return self._weights.report(self._adapters)
