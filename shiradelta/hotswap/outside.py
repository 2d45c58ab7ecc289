"""Notices weights that something else than the session has written: a trainer, `load_state_dict`, another session.

A torch tensor counts the operations that write it, and its version tells.  Some writes are not counted: through
`.data`, by fused optimizers, by collectives, by kernels that take an address.  NumPy arrays, and tensors that were made
in inference mode, count nothing.  So a few elements are compared as well, where that waits for no device.
"""

from __future__ import annotations

import math
import os
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, chain
from operator import attrgetter, is_not, itemgetter, methodcaller
from typing import Any, Protocol
from weakref import WeakSet

import numpy as np

from shiradelta.errors import TargetError
from shiradelta.models.live import Target
from shiradelta.models.memory import is_array, is_sharded, own_part
from shiradelta.models.places import Places, Things

#: What to do if nothing is known of the weights.
RELOAD = "load the model's weights again, then call rebase()"
#: Why a session cannot be used that another thread used when the process was forked.
FORKED = (
    "the weights are in an unknown state in this process, because it was forked while another thread used the HotSwap;"
    f" {RELOAD}"
)
#: Why sessions cannot be copied.
NO_COPIES = (
    "a HotSwap cannot be copied or pickled, because it holds saved weights of its model; make a new one for the other"
    " model"
)
#: Number of elements of a tensor that are compared.
_ELEMENTS = 32
#: Number of tensors with versions whose elements are compared: uncounted writes mostly are of the whole model.
_TENSORS = 16
#: (device, first byte, byte after the last, tensor).
_Span = tuple[str, int, int, Target]
_ADDRESS, _VERSION = methodcaller("data_ptr"), attrgetter("_version")
#: What spans are sorted by.
_PLACE = itemgetter(slice(3))

#: Guards what sessions know of each other.
_registry = threading.Lock()
_watches: WeakSet[Watch] = WeakSet()
#: Sessions whose lock a forked process takes over.
_sessions: WeakSet[Forkable] = WeakSet()


class _Readings:
    """What was read of tensors, to compare with what is read later.

    Args:
        read: reads all tensors at once, from what `follow` is given for each.
    """

    def __init__(self, read: Callable[[Sequence[Any]], list[Any]]) -> None:
        self._read = read
        self._targets: list[Target] = []
        self._sources: list[Any] = []
        self._known: list[Any] = []

    def follow(self, sources: Mapping[Target, Any]) -> None:
        """Follows these tensors, and no others.  What is known of those that were followed before stays."""
        known = dict(zip(self._targets, self._known, strict=True))
        new = [target for target in sources if target not in known]
        known |= zip(new, self._read([sources[target] for target in new]), strict=True)
        self._targets, self._sources = list(sources), list(sources.values())
        self._known = [known[target] for target in sources]

    def are_same(self) -> bool:
        """Whether all tensors still read as they did."""
        return self._read(self._sources) == self._known

    def changed(self) -> Iterator[Target]:
        """The tensors that read differently now."""
        now = self._read(self._sources)
        return (target for target, a, b in zip(self._targets, now, self._known, strict=True) if a != b)

    def record(self) -> None:
        """Takes what is read now as known."""
        self._known = self._read(self._sources)


class Watch:
    """The tensors that a session's adapters change, as the session last wrote or checked them."""

    def __init__(self, model: Any) -> None:
        self._model, self._places = model, Places(model)
        self._things: dict[Target, list[Any]] = {}  # what the model has in each tensor's places
        self._tensors = self._modules = Things((), (), ())
        self._counting: list[Any] = []
        self._addresses: list[int] = []
        self._versions, self._samples = _Readings(_versions), _Readings(_sampled)
        self._parts = _Readings(_versions)  # of DTensors, which count only what is written to them as a whole
        self._spans: list[_Span] = []  # in the order of the addresses
        self._foreign: set[Target] = set()  # what other sessions have written
        with _registry:
            _watches.add(self)

    def follow(self, targets: Iterable[Target]) -> None:
        """Watches these tensors, and no others.  What is known of those that were watched before stays."""
        every = dict.fromkeys(targets)
        if every.keys() == self._things.keys():
            return
        self._things = {target: self._things.get(target) or target.now() for target in every}
        objects = {target: things[0] for target, things in self._things.items() if not is_array(target.tensor)}
        counted = {target: tensor for target, tensor in objects.items() if not tensor.is_inference()}
        on_cpu = [target for target in every if target.device == "cpu"]
        counted_there = [target for target in on_cpu if target in counted]
        few = set(counted_there[:: -(-len(counted_there) // _TENSORS)] if counted_there else [])
        sampled = [target for target in on_cpu if target in few or target not in counted]
        self._versions.follow(counted)
        self._parts.follow({target: own_part(tensor) for target, tensor in counted.items() if is_sharded(tensor)})
        self._samples.follow({target: _sampler(target) for target in sampled})
        self._follow_places()
        self._counting = [own_part(tensor) for tensor in objects.values()]
        self._addresses = [target.address for target in objects]
        self._spans = sorted([(*target.memory, target) for target in every], key=_PLACE)
        self._foreign.intersection_update(every)

    def _follow_places(self) -> None:
        places = list(chain.from_iterable([target.places for target in self._things]))
        things = list(chain.from_iterable([things for target, things in self._things.items() if target.places]))
        self._tensors, self._modules = Things.distinct(places, things), self._places.above(places)

    def _has(self, now: Places, target: Target) -> bool:
        """Whether the model has a tensor everywhere that it had it, through as many modules."""
        if not target.is_there():
            return False
        return now is self._places or all(now.ways(place) >= self._places.ways(place) for place in target.places)

    def check_model(self, targets: Iterable[Target]) -> None:
        """Checks that the model has the tensors everywhere that it had them when the session was made.

        Raises:
            TargetError: a tensor, or a module that it is in, was moved or replaced.
        """
        now = self._places if self._places.has_same_modules() else Places(self._model)
        for target in targets:
            if not self._has(now, target):
                raise target.moved_error()

    def check(self) -> None:
        """Checks that nothing else has written, moved or replaced the tensors, as far as that can be told.

        Raises:
            TargetError: something has.
        """
        if list(map(_ADDRESS, self._counting)) != self._addresses or not self._are_same():
            raise self._error()

    def _are_same(self) -> bool:
        """`check` but for the addresses.  This is on the way of every switch; the loops run in C."""
        return (
            self._tensors.are_there() and (self._modules.are_there() or self._are_elsewhere()) and self._are_unwritten()
        )

    def _are_unwritten(self) -> bool:
        return not self._foreign and self._versions.are_same() and self._parts.are_same() and self._samples.are_same()

    def check_unwritten(self) -> None:
        """Checks that nothing else has written the tensors, whatever the model has in their places now.

        Raises:
            TargetError: something has.
        """
        if not self._are_unwritten():
            raise _written_error(list(dict.fromkeys(self._written())))

    def _are_elsewhere(self) -> bool:
        """Whether the model has all modules of the tensors, though other modules are around them, such as PEFT's."""
        now = Places(self._model)
        if not all(self._has(now, target) for target in self._things):
            return False
        self._places = now
        self._modules = self._places.above(chain.from_iterable(target.places for target in self._things))
        return True

    def _error(self) -> TargetError:
        changed, now = self.changed(), Places(self._model)
        for target in changed:
            if not self._has(now, target):
                return target.moved_error()
        return _written_error(changed)

    def changed(self) -> list[Target]:
        """The tensors that something else has written, moved or replaced, as far as that can be told."""
        now = Places(self._model)
        moved = (
            target
            for target, known in self._things.items()
            if not self._has(now, target) or any(map(is_not, target.now(), known))
        )
        return list(dict.fromkeys(chain(moved, self._written())))

    def _written(self) -> Iterator[Target]:
        """The tensors that something else has written, as far as that can be told; some of them several times."""
        return chain(self._versions.changed(), self._parts.changed(), self._samples.changed(), self._foreign)

    def claim(self) -> None:
        """Announces that the session is about to write its tensors, to all sessions that have the same memory.

        Of several that do so at once in threads the first goes on.  Addresses are left to the session, which looks at
        them while a device works.

        Raises:
            TargetError: something else has written or replaced a tensor, or is writing it.
        """
        with _registry:
            if not self._are_same():
                raise self._error()
            for other in list(_watches):
                if other is not self:
                    other._foreign.update(other._within(self._spans))

    def record(self) -> None:
        """Takes the tensors as they are now as what the session has written."""
        self._versions.record()
        self._parts.record()
        self._samples.record()

    def accept(self) -> None:
        """Takes the tensors as they are now, whoever has written or replaced them."""
        every = [target for *_, target in self._spans]
        self.follow([])
        self.follow(every)

    def _within(self, spans: Sequence[_Span]) -> Iterator[Target]:
        """The tensors that have memory in common with one of the spans."""
        starts = [span[:2] for span in spans]
        reach = list(accumulate(((device, end) for device, _, end, _ in spans), max))
        for device, start, end, target in self._spans:
            before = bisect_left(starts, (device, end))
            if before and reach[before - 1] > (device, start):
                yield target


def _written_error(changed: Sequence[Target]) -> TargetError:
    """The error for tensors that something else has written."""
    others = f" (and {len(changed) - 1} others)" if len(changed) > 1 else ""
    return TargetError(
        f"tensor {changed[0].name!r}{others} was changed from outside since HotSwap last wrote or checked it; call"
        " rebase() to take the weights as they are now as the base, or make a new HotSwap"
    )


def _versions(tensors: Sequence[Any]) -> list[Any]:
    """How often torch has written the tensors."""
    return list(map(_VERSION, tensors))


def _sampled(samplers: Sequence[Callable[[], object]]) -> list[Any]:
    """The elements that the samplers read."""
    try:
        return [read() for read in samplers]
    except RuntimeError:  # the memory of one was given back
        return [None] * len(samplers)


def reading_of(target: Target) -> Callable[[Any], object]:
    """What tells of the model's own tensor or array whether it was written: its version, or a few elements."""
    if is_array(target.tensor):
        return lambda array: _sampler_of(array)()
    return lambda tensor: None if tensor.is_inference() else tensor._version


def _sampler(target: Target) -> Callable[[], object]:
    """Reads a few elements of a CPU tensor, which are spread over it."""
    return _sampler_of(target.tensor)


def _sampler_of(tensor: Any) -> Callable[[], object]:
    numel = math.prod(tensor.shape)
    step = numel // _ELEMENTS | 1  # odd, so that it does not always meet the same column
    if is_array(tensor):
        bits = tensor.view(f"u{tensor.itemsize}")
        if bits.flags.c_contiguous:
            return bits.reshape(-1)[step // 2 :: step].tobytes  # type: ignore[no-any-return]
        index = np.unravel_index(np.arange(step // 2, numel, step), bits.shape)
        return lambda: bits[index].tobytes()
    from shiradelta.format.codecs.bits import bits_dtype

    bits = tensor.view(bits_dtype(tensor.element_size()))
    if bits.is_contiguous():
        return bits.view(-1)[step // 2 :: step].tolist  # type: ignore[no-any-return]
    at = tuple(axis.tolist() for axis in np.unravel_index(np.arange(step // 2, numel, step), tuple(bits.shape)))
    return lambda: bits[at].tolist()


class Forkable(Protocol):
    """A session with a lock."""

    def _after_fork(self) -> None:
        """Called in the new process, which has the thread that forked only."""


def survive_forks(session: Forkable) -> None:
    """Has `session._after_fork` called in each process that is forked from this one."""
    with _registry:
        _sessions.add(session)


def _after_fork() -> None:
    global _registry
    _registry = threading.Lock()
    for session in list(_sessions):
        session._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
