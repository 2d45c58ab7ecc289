"""HotSwap in the workers of vLLM: a weight transfer engine, and an extension of the worker.

vLLM imports this module itself; `shiradelta.serving.plugin` tells it where it is.
"""

# mypy: disable-error-code="import-not-found, import-untyped, misc, no-any-unimported"
from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from shiradelta.errors import ArgumentError, TargetError
from shiradelta.serving.plugin import UNPACKED
from shiradelta.serving.session import ServedWeights, SwapRequest, known_fields, served, synchronize

try:
    from vllm.distributed.weight_transfer.base import (
        WeightTransferEngine,
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
    )
except ModuleNotFoundError:  # the extension of the worker needs none of these
    WeightTransferEngine = WeightTransferInitInfo = WeightTransferUpdateInfo = object


@dataclass
class SwapInit(WeightTransferInitInfo):
    """`init_info` of the engine.

    Attributes:
        checkpoint: the folder that the model was loaded from; None for the one that vLLM was given.
    """

    checkpoint: str | None = None


@dataclass
class SwapUpdate(SwapRequest, WeightTransferUpdateInfo):
    """`update_info` of the engine: a `SwapRequest`."""


class SwapEngine(WeightTransferEngine):
    """Adapters in `.shd` files, on the weights of one worker: `WeightTransferConfig(backend="shd")`.

    Requests pause before an update and the prefix cache is reset after it by whoever sends it, as vLLM has it for every
    engine.
    """

    init_info_cls = SwapInit
    update_info_cls = SwapUpdate
    supports_draft_weight_update = False

    def init_transfer_engine(self, init_info: SwapInit) -> None:
        """Finds where this worker has the checkpoint's tensors."""
        self._served = _found(self.model, init_info.checkpoint or self.model_config.model)

    def start_weight_update(self) -> None:
        """Does nothing: an update is whole in itself."""

    def finish_weight_update(self) -> None:
        """Does nothing, as `start_weight_update`."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Does what a `SwapRequest` says, in all workers or in none; it is done when this returns."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: SwapUpdate) -> None:
        """Does what a request says."""
        if not hasattr(self, "_served"):
            raise ArgumentError("the engine was not initialised; call init_weight_transfer_engine first")
        self._served.do(update_info)
        synchronize(self.device)

    def shutdown(self) -> None:
        """Does nothing: the weights go with the worker."""

    @staticmethod
    def trainer_send_weights(iterator: Iterator[Any], trainer_args: Any) -> NoReturn:
        """Refuses: a trainer writes a `.shd` file, and sends its path or its bytes in an update."""
        raise ArgumentError("a trainer sends no tensors here; write a .shd file and send its path in update_info")


class SwapExtension:
    """Methods for `collective_rpc`: `worker_extension_cls="shiradelta.serving.vllm.SwapExtension"`."""

    def shd_init(self, checkpoint: str | None = None) -> dict[str, Any]:
        """Finds the weights of a checkpoint, the folder that vLLM was given if none is.  Returns `shd_info`."""
        self._shd = _found(self.get_model(), checkpoint or self.model_config.model)  # type: ignore[attr-defined]
        return self._shd.about()

    def shd_update(self, request: dict[str, Any]) -> dict[str, Any]:
        """Does what a `SwapRequest`, given as a dict, says.  Returns `shd_info`."""
        found = self._initialised().do(SwapRequest(**known_fields(request)))
        synchronize(self.device)  # type: ignore[attr-defined]
        return found

    def shd_info(self) -> dict[str, Any]:
        """The adapters that are loaded, with their strengths."""
        return self._initialised().about()

    def _initialised(self) -> ServedWeights:
        if not hasattr(self, "_shd"):
            raise ArgumentError("the adapters' session was not made; call shd_init first")
        return self._shd


def _found(model: Any, checkpoint: str) -> ServedWeights:
    """As `served`; if it refuses on a CPU, says what may help."""
    try:
        return served(model, checkpoint)
    except TargetError as error:
        if next(model.parameters()).device.type != "cpu" or os.environ.get(UNPACKED) == "1":
            raise
        raise TargetError(f"{error}, or start vLLM with {UNPACKED}=1, which keeps weights as they are loaded") from None
