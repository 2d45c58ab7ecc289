"""The entry point of `vllm.general_plugins`, which vLLM calls in every worker."""

from __future__ import annotations

#: What `WeightTransferConfig(backend=...)` calls the engine.
BACKEND = "shd"


def register() -> None:
    """Makes the weight transfer engine known to vLLM; without effect in a release that has none."""
    try:
        from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    except ImportError:
        return
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, "shiradelta.serving.vllm", "SwapEngine")
