"""The entry point of `vllm.general_plugins`, which vLLM calls in every worker."""

from __future__ import annotations

import os
from typing import Any

#: What `WeightTransferConfig(backend=...)` calls the engine.
BACKEND = "shd"
#: With the value 1, linear layers keep their weights on CPUs; see `_keep_weights`.
UNPACKED = "SHIRADELTA_VLLM_UNPACKED"


def register() -> None:
    """Makes the weight transfer engine known to vLLM; without effect in a release that has none."""
    try:
        from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    except ImportError:
        return
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, "shiradelta.serving.vllm", "SwapEngine")
    if os.environ.get(UNPACKED) == "1":
        _keep_weights()


def _keep_weights() -> None:
    """Lets vLLM compute with the weights as they were loaded.

    Where a CPU has AVX-512, vLLM packs the weight of each linear layer for its kernels once, computes with the copy,
    and drops the weight, so that nothing is left that could be switched.
    """
    from torch.nn.functional import linear
    from vllm.model_executor.layers import utils

    def dispatch(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = linear

    utils.dispatch_cpu_unquantized_gemm = dispatch
