"""What a request to a serving engine does with adapters: all of it, or nothing."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shiradelta.errors import ArgumentError, ShiraDeltaError
from shiradelta.hotswap.session import HotSwap
from shiradelta.io.reader import Source
from shiradelta.models.checkpoint import open_checkpoint
from shiradelta.models.compatibility import spec_of
from shiradelta.serving.recorded import ServedModel, recorded_layout


@dataclass
class SwapRequest:
    """What is to be done, in this order.

    Attributes:
        load: name -> path of a `.shd` file, which all workers can read.
        data: name -> the bytes of a `.shd` file, in base64.
        active: name -> strength, for exactly the adapters that are to be active; None to leave them as they are.
        unload: names of adapters to remove.
    """

    load: Mapping[str, str] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)
    active: Mapping[str, float] | None = None
    unload: Sequence[str] = ()


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
        specs = {name: spec_of(slot) for name, slot in open_checkpoint(checkpoint).items()}
        self.swap = HotSwap(model, layout=recorded_layout(model, specs), group=group)

    def do(self, request: SwapRequest) -> dict[str, Any]:
        """Does what a request says; on every error nothing has changed.

        Returns:
            What `about` says afterwards.

        Raises:
            ArgumentError: a name is taken, not loaded or still active; or bytes are not base64.
            ShiraDeltaError: as `HotSwap.load` and `switch`.
        """
        swap = self.swap
        left = dict(swap.active if request.active is None else request.active)
        for name in request.unload:
            if name in left or name not in {*swap.loaded, *request.load, *request.data}:
                what = "is to be active" if name in left else "is not loaded"
                raise ArgumentError(f"adapter {name!r} {what}, and is to be unloaded; leave it out of one of the two")
        sources: dict[str, Source] = dict(request.load)
        sources.update({name: _bytes(name, text) for name, text in request.data.items()})
        loaded: list[str] = []
        try:
            for name, source in sources.items():
                swap.load(name, source)
                loaded.append(name)
            if request.active is not None:
                swap.switch(request.active)
        except BaseException:
            for name in loaded:
                with suppress(ShiraDeltaError):  # the first error counts
                    swap.unload(name)
            raise
        for name in request.unload:
            swap.unload(name)
        return self.about()

    def about(self) -> dict[str, Any]:
        """The adapters that are loaded, with their strengths; 0 for one that is not active.  For JSON."""
        active = self.swap.active
        return {
            "adapters": {
                name: {"strength": active.get(name, 0.0), "nonzeros": report.nonzeros, "bytes": report.nbytes}
                for name, report in self.swap.loaded.items()
            }
        }


def _bytes(name: str, text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError, TypeError):
        raise ArgumentError(f"data of adapter {name!r} is no base64; encode the file's bytes") from None
