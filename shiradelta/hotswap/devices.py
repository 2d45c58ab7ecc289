"""The devices of a model, each with its backend: loading to them, room on them, and the order of their work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from shiradelta.format.codecs.base import Bytes
from shiradelta.hotswap.choose import new_backend
from shiradelta.hotswap.fits import Fits
from shiradelta.hotswap.layers import Held, Layer, Stack
from shiradelta.hotswap.matching import check_sets
from shiradelta.hotswap.protocol import LiveBackend
from shiradelta.io.restored import Elements
from shiradelta.models.live import Target

#: Layers on the weights, for each backend: of one level in the order of the adapters' digests.
Layers = dict[LiveBackend, list[Layer]]
#: The stream that each backend queues its work on.
Streams = Mapping[LiveBackend, Any]


class Devices:
    """The backends of a model's devices.

    Args:
        backends: device -> its backend.
    """

    def __init__(self, backends: Mapping[str, LiveBackend]) -> None:
        self._backends = backends

    @property
    def only_queue(self) -> bool:
        """Whether all work is queued on other devices than the CPU."""
        return "cpu" not in self._backends

    def buffer(self, size: int) -> Bytes:
        """Memory to read a file into."""
        return next(iter(self._backends.values())).buffer(size)

    def all_elements(self, target: Target, below: Stack) -> Elements:
        """All elements of a tensor beneath a stack, for a delta that is read with them only."""
        return self._backends[target.device].all_elements(target, below)

    def reads_on_base(self, target: Target) -> bool:
        """Whether `hold` takes a delta of this tensor that is read with its base only."""
        return target.extent is None and self._backends[target.device].reads_on_base

    def hold(self, files: Iterable[Fits]) -> dict[LiveBackend, Held]:
        """`hold` of each backend, of what fits its device."""
        groups: dict[LiveBackend, list[Fits]] = {}
        for one in files:
            devices = one.columns.targets.devices
            for device in sorted(devices):
                here = one if len(devices) == 1 else one.on(device)
                groups.setdefault(self._backends[device], []).append(here)
        return {backend: backend.hold(own) for backend, own in groups.items()}

    def streams(self, stream: Any) -> Streams:
        """The stream of each backend: the given one if it is its device's, or this thread's current one."""
        return {backend: backend.stream(stream) for backend in self._backends.values()}

    def ordered(self, streams: Streams | None = None, reads: bool = False) -> ExitStack:
        """`ordered` of all backends, on this thread's current streams if none are given."""
        with ExitStack() as stack:
            for backend, stream in (self.streams(None) if streams is None else streams).items():
                stack.enter_context(backend.ordered(stream, reads))
            return stack.pop_all()


def devices_of(targets: Iterable[Target]) -> list[str]:
    """Where the memory of tensors is, of their parts, too; the CPU where there is none."""
    found = {leaf.device for target in targets for leaf, _ in target.leaves()}
    return sorted(found - {"meta"}) or ["cpu"]


def devices_for(targets: Iterable[Target], backend: str) -> Devices:
    """The devices of tensors, each with the backend of a name.

    Raises:
        DeltaError: the backend is unknown, or not available.
    """
    return Devices({device: new_backend(backend, device) for device in devices_of(targets)})


def new_layers(wanted: Iterable[tuple[Mapping[LiveBackend, Held], float]], before: Layers) -> Layers:
    """Layers for deltas with their strengths, with room for the elements that they overwrite.

    They have the rooms of `before` if only strengths differ.

    Args:
        wanted: (a delta as each backend holds it, its strength), in the order of the digests.
        before: what is on the weights.

    Raises:
        DeltaError: two deltas set the same element.
    """
    chosen: dict[LiveBackend, list[tuple[Held, float]]] = {}
    for helds, strength in wanted:
        for backend, held in helds.items():
            chosen.setdefault(backend, []).append((held, strength))
    return {backend: _with_room(backend, pairs, before.get(backend, [])) for backend, pairs in chosen.items()}


def _with_room(backend: LiveBackend, chosen: Sequence[tuple[Held, float]], before: Sequence[Layer]) -> list[Layer]:
    if [held for held, _ in chosen] == [layer.held for layer in before]:
        pairs = zip(chosen, before, strict=True)
        return [Layer(held, strength, old.room, old.filled) for (held, strength), old in pairs]
    if len(chosen) > 1:
        check_sets(backend, [held for held, _ in chosen])
    return [Layer(held, strength, backend.room(held.room)) for held, strength in chosen]
