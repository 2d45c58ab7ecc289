"""Activations that a backward pass computes again, layer by layer, once memory has run out (arXiv:1604.06174)."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from shiradelta.models.forward import forward_replaced
from shiradelta.models.placement import layers_of
from shiradelta.util.memory import is_out_of_memory

R = TypeVar("R")


class Recomputation:
    """Runs steps; from the first that runs out of memory on, layers keep their inputs only.

    transformers' own needs models in training mode, and drops activations out there.  Here the layers' forward passes
    are replaced, for the time of a step.

    Args:
        model: any module; one without lists of layers keeps its activations.
        log: called with a line when layers begin to compute them again.
    """

    def __init__(self, model: nn.Module, log: Callable[[str], None]) -> None:
        self._model, self._log = model, log
        self._is_on = False

    def run(self, step: Callable[[], R]) -> R:
        """Runs a step, a second time if memory runs out the first time; it has to begin by clearing what it adds to."""
        if not self._is_on:
            try:
                return step()
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error) or not layers_of(self._model):
                    raise
            # Not in the handler, where the error still holds the tensors of the pass.
            self._free()
            self._is_on = True
            self._log("memory ran out, so layers keep their inputs only, and backward passes compute the rest again")
        with self._replaced():
            return step()

    @staticmethod
    def _free() -> None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @contextmanager
    def _replaced(self) -> Iterator[None]:
        """Within the block, layers compute their activations again, and models fill no caches, which would be twice."""
        every: Iterator[Any] = (getattr(module, "config", None) for module in self._model.modules())
        caches = {id(config): (config, config.use_cache) for config in every if hasattr(config, "use_cache")}
        for config, _ in caches.values():
            config.use_cache = False
        try:
            with forward_replaced(layers_of(self._model), lambda _, forward: partial(_again, forward)):
                yield
        finally:
            for config, before in caches.values():
                config.use_cache = before


def _again(forward: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """A layer's forward pass, of which a backward pass finds the inputs only."""
    if not torch.is_grad_enabled():
        return forward(*arguments, **keywords)
    return checkpoint(forward, *arguments, use_reentrant=False, **keywords)
