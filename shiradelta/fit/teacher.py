"""The fine-tuned model: the student's own module with other weights in it, for as long as it is asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .behaviour import Behaviour, Outputs

#: Outputs are kept up to this size; beyond it, they are made again in every step.
CACHE_BYTES = 4 << 30


class Teacher:
    """Answers what the fine-tune gives; answers are kept as long as they fit."""

    def __init__(self, model: nn.Module, tuned: Mapping[nn.Parameter, Tensor], behaviour: Behaviour) -> None:
        self._model, self._tuned, self._behaviour = model, dict(tuned), behaviour
        self._kept: dict[int, Outputs] = {}
        self._bytes = 0

    def outputs(self, indices: Sequence[int]) -> Outputs:
        """Of some examples; no gradients."""
        if all(index in self._kept for index in indices):
            return [torch.cat(rows) for rows in zip(*(self._kept[index] for index in indices), strict=True)]
        with self.in_place(), torch.no_grad():
            outputs = self._behaviour.outputs(self._model, indices)
        slices = self._behaviour.slices(outputs, indices)
        size = sum(rows.nbytes for rows in outputs)
        if slices is not None and self._bytes + size <= CACHE_BYTES:
            self._kept.update(zip(indices, slices, strict=True))
            self._bytes += size
        return outputs

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the model is the teacher."""
        with exchanged(self._tuned):
            yield


@contextmanager
def exchanged(weights: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Within, parameters have other weights: pointers are exchanged, nothing is copied."""
    before = {parameter: parameter.data for parameter in weights}
    for parameter, other in weights.items():
        parameter.data = other
    try:
        yield
    finally:
        for parameter, own in before.items():
            parameter.data = own
