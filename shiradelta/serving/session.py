"""What a request to a serving engine does with adapters: all of it, or nothing."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shiradelta.errors import ArgumentError, BaseMismatchError, ShiraDeltaError, TargetError
from shiradelta.format.arithmetic import Array
from shiradelta.format.codecs.bits import bits_dtype
from shiradelta.hotswap.levels import planned
from shiradelta.hotswap.loaded import check_loaded
from shiradelta.hotswap.session import HotSwap
from shiradelta.io.reader import Source, open_delta
from shiradelta.models.checkpoint import open_checkpoint
from shiradelta.models.compatibility import spec_of
from shiradelta.models.layout import Layout
from shiradelta.models.memory import bare
from shiradelta.serving.recorded import ServedModel, recorded_layout
from shiradelta.util.arguments import BOOL, NUMBER, TEXT, TEXTS, ArgumentKind, is_path
from shiradelta.util.text import brief

#: What a request's fields have to be.
_FIELDS = {
    "load": ArgumentKind("a mapping of names to paths", lambda value: _maps(value, is_path)),
    "data": ArgumentKind("a mapping of names to files' bytes", lambda value: _maps(value, _is_data)),
    "rebase": BOOL,
    "active": ArgumentKind(
        "a mapping of names to strengths", lambda value: value is None or _maps(value, NUMBER.holds)
    ),
    "unload": ArgumentKind("a list of names", lambda value: not isinstance(value, str) and TEXTS.holds(value)),
}
#: Elements of a region that are compared with the checkpoint's.
_SAMPLES = 256


@dataclass
class SwapRequest:
    """What is to be done, in this order.

    Attributes:
        load: name -> path of a `.shd` file, which all workers can read.
        data: name -> the bytes of a `.shd` file, as they are or in base64.
        rebase: whether what is active before becomes the base, and is removed; then no other adapter may be loaded.
        active: name -> strength, for exactly the adapters that are to be active; None to leave them as they are.
        unload: names of adapters to remove.
    """

    load: Mapping[str, str] = field(default_factory=dict)
    data: Mapping[str, str | bytes] = field(default_factory=dict)
    rebase: bool = False
    active: Mapping[str, float] | None = None
    unload: Sequence[str] = ()

    def active_after(self, before: Mapping[str, float]) -> dict[str, float]:
        """The adapters that it makes active, with their strengths, where `before` are."""
        kept = {} if self.rebase else before
        return dict(kept if self.active is None else self.active)

    def digest(self) -> bytes:
        """SHA-256 of what it says."""
        data = {name: hashlib.sha256(_bytes(name, one)).hexdigest() for name, one in self.data.items()}
        return hashlib.sha256(json.dumps(asdict(self) | {"data": data}, default=os.fspath).encode()).digest()

    def check(self) -> None:
        """Checks that the fields are what they have to be.  Raises ArgumentError."""
        for name, kind in _FIELDS.items():
            value = getattr(self, name)
            if not kind.holds(value):
                raise ArgumentError(f"a request's {name} is {brief(repr(value), 80)}; give {kind.what}")
        for name in self.load:
            if name in self.data:
                raise ArgumentError(f"adapter {name!r} is in load and in data; give one file of each name")


def known_fields(request: Any, *more: str) -> dict[str, Any]:
    """The fields of a request, where it has no others than a `SwapRequest` and these.  Raises ArgumentError."""
    known = [*(one.name for one in fields(SwapRequest)), *more]
    if not isinstance(request, dict) or (unknown := sorted(request.keys() - set(known), key=str)):
        what = f"fields {', '.join(map(str, unknown))}" if isinstance(request, dict) else type(request).__name__
        raise ArgumentError(f"a request has {what}, which is not known; it is an object of {', '.join(known)}")
    return request


class ServedWeights:
    """The weights of an engine's model in one worker, and the adapters on them.

    Args:
        model: the model.
        checkpoint: the folder that it was loaded from.
        group: the process group of the workers that have it; None for this process alone.
    """

    def __init__(self, model: ServedModel, checkpoint: str | Path, group: Any = None) -> None:
        if not Path(checkpoint).exists():
            raise ArgumentError(
                f"checkpoint {str(checkpoint)!r} is no folder here; give that of the model's safetensors"
            )
        stored = open_checkpoint(checkpoint)
        layout = recorded_layout(model, {name: spec_of(slot) for name, slot in stored.items()})
        # Some layers move elements after loading, within the same memory.
        self._layout = {name: one for name, one in layout.items() if _holds(one, stored.bits(name))}
        self.swap = HotSwap(model, self._name, layout=self._layout, group=group)
        self._last = b""

    def _name(self, name: str) -> str:
        """A name of the checkpoint's, or one that no model has where memory has no such elements."""
        return name if name in self._layout else f"{name} (not in memory as in the checkpoint)"

    def do(self, request: SwapRequest) -> dict[str, Any]:
        """Does what a request says; on every error no weight has changed.

        Where a request is the same as the one before it, nothing is loaded or unloaded again: its sender may not have
        heard that it was done.

        Returns:
            What `about` says afterwards.

        Raises:
            ArgumentError: a field is of the wrong type; a name is taken, not loaded or still active; or bytes are not
                base64.
            TargetError: an adapter changes a tensor that is not in memory as in the checkpoint, such as a repacked one.
            ShiraDeltaError: as `HotSwap.load` and `switch`.
        """
        request.check()
        key = request.digest()
        if key == self._last:
            request = SwapRequest(active=request.active_after(self.swap.active))
        self._last = b""
        self._do(request)
        self._last = key
        return self.about()

    def _do(self, request: SwapRequest) -> None:
        swap, unwanted = self.swap, dict.fromkeys(request.unload)
        fused = list(swap.active) if request.rebase else []
        left = request.active_after(swap.active)
        for name in unwanted:
            if name in left or name not in {*swap.loaded, *request.load, *request.data}:
                what = "is to be active" if name in left else "is not loaded"
                raise ArgumentError(f"adapter {name!r} {what}, and is to be unloaded; leave it out of one of the two")
        for name in swap.loaded if request.rebase else ():
            if name not in fused:
                raise ArgumentError(f"adapter {name!r} was made for the base, which is to change; unload it before")
        sources: dict[str, Source] = dict(request.load)
        sources.update({name: _bytes(name, text) for name, text in request.data.items()})
        loaded: list[str] = []
        try:
            for name, source in sources.items():
                self._load(name, source)
                loaded.append(name)
            if request.rebase:
                self._check_after_rebase(left, fused)
                swap.switch(swap.active)  # refused if something else has written the weights
                swap.rebase(check=False)  # those that were loaded now are for what is on the weights
                for name in fused:
                    swap.unload(name)
            if request.rebase or request.active is not None:
                swap.switch(left)
        except BaseException:
            for name in loaded:
                with suppress(ShiraDeltaError):  # the first error counts
                    swap.unload(name)
            raise
        for name in unwanted:
            if name not in fused:
                swap.unload(name)

    def _check_after_rebase(self, wanted: Mapping[str, float], fused: Sequence[str]) -> None:
        """Checks what is to be active on the new base: the old one cannot be had again.

        Raises:
            DeltaError: an adapter will not be loaded, or they cannot be active together.
        """
        left = {name: one.on((), False) for name, one in self.swap._adapters.items() if name not in fused}
        check_loaded(wanted, left)
        planned(wanted, left)

    def _load(self, name: str, source: Source) -> None:
        try:
            self.swap.load(name, source)
        except BaseMismatchError as error:
            with open_delta(source) as delta:
                other = next((tensor for tensor in delta if tensor not in self._layout), None)
            if other is None:
                raise
            raise TargetError(
                f"tensor {other!r} is not in memory as in the checkpoint: it is not in the checkpoint, or its layer"
                " computes or repacks weights; apply the delta to the checkpoint (shiradelta apply) and load that"
            ) from error

    def about(self) -> dict[str, Any]:
        """The adapters that are loaded, with their strengths; 0 for one that is not active.  For JSON."""
        active = self.swap.active
        return {
            "adapters": {
                name: {"strength": active.get(name, 0.0), "nonzeros": report.nonzeros, "bytes": report.nbytes}
                for name, report in self.swap.loaded.items()
            }
        }


def served(model: ServedModel, checkpoint: str) -> ServedWeights:
    """The weights of this worker's model, which other workers may have parts of."""
    import torch.distributed as dist

    many = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return ServedWeights(model, checkpoint, dist.group.WORLD if many else None)


def synchronize(device: Any) -> None:
    """Waits for a device's work."""
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize()


def _holds(layout: Layout, stored: Array) -> bool:
    """Whether memory has the elements of a tensor in the checkpoint, by samples of each region."""
    flat = stored.reshape(-1)
    for region in layout.regions:
        box = region.box("", tuple(layout.shape))
        at = np.unique(np.linspace(0, box.numel - 1, _SAMPLES).astype(np.int64))
        here = bare(region.memory)[tuple(torch.from_numpy(axis) for axis in np.unravel_index(at, box.shape))]
        bits = here.cpu().view(bits_dtype(here.element_size())).numpy().view(flat.dtype)
        if not np.array_equal(bits, flat[box.positions(at)]):
            return False
    return True


def _maps(value: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, Mapping) and all(map(TEXT.holds, value)) and all(map(holds, value.values()))


def _is_data(value: Any) -> bool:
    return isinstance(value, str | bytes)


def _bytes(name: str, text: str | bytes) -> bytes:
    if isinstance(text, bytes):
        return text
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError, TypeError):
        raise ArgumentError(f"data of adapter {name!r} is no base64; encode the file's bytes") from None
