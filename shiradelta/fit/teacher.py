"""The fine-tuned model: the student's own module, with the fine-tune's weights in it while it runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from shiradelta.fit.behaviour import Behaviour, Outputs

#: Outputs on all examples are cached if they take at most this many bytes; otherwise every step computes them again.
CACHE_BYTES = 4 << 30


class Teacher:
    """Computes the fine-tune's outputs; caches them if the outputs of all examples fit.

    Args:
        model: the student's module.
        tuned: weight -> the fine-tune's weights.
        behaviour: the outputs to compare.
    """

    def __init__(self, model: nn.Module, tuned: Mapping[Tensor, Tensor], behaviour: Behaviour) -> None:
        self._model, self._tuned, self._behaviour = model, dict(tuned), behaviour
        self._known = torch.zeros(len(behaviour.lengths), dtype=torch.bool)
        self._kept: Outputs | None = None

    def outputs(self, indices: Sequence[int]) -> Outputs:
        """The fine-tune's outputs on some examples, without gradients."""
        if self._kept is not None and bool(self._known[indices].all()):
            rows = self._behaviour.rows(indices)
            assert rows is not None
            return [kept[at] for kept, at in zip(self._kept, _beside(self._kept, rows), strict=True)]
        with self.in_place(), torch.no_grad():
            outputs = self._behaviour.outputs(self._model, indices)
        self._keep(outputs, indices)
        return outputs

    def _keep(self, outputs: Outputs, indices: Sequence[int]) -> None:
        rows = self._behaviour.rows(indices)
        if rows is None:
            return
        if self._kept is None:
            sizes = [(total, *output.shape[1:]) for output, (_, total) in zip(outputs, rows, strict=True)]
            pairs = zip(outputs, rows, strict=True)
            if sum(output.nbytes // max(len(output), 1) * total for output, (_, total) in pairs) > CACHE_BYTES:
                return
            self._kept = [output.new_empty(size) for output, size in zip(outputs, sizes, strict=True)]
        for kept, output, at in zip(self._kept, outputs, _beside(self._kept, rows), strict=True):
            kept[at] = output
        self._known[indices] = True

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block, the model has the fine-tune's weights."""
        with exchanged(self._tuned):
            yield


def _beside(outputs: Outputs, rows: Sequence[tuple[Tensor, int]]) -> Iterator[Tensor]:
    """The indices that `Behaviour.rows` gives, on the devices of the outputs; each is moved once."""
    moved: dict[tuple[int, torch.device], Tensor] = {}
    for output, (at, _) in zip(outputs, rows, strict=True):
        key = id(at), output.device
        if key not in moved:
            moved[key] = at.to(output.device, non_blocking=True)
        yield moved[key]


@contextmanager
def exchanged(weights: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Within the block, parameters have other weights.  Pointers are exchanged; nothing is copied."""
    before = {parameter: parameter.data for parameter in weights}
    for parameter, other in weights.items():
        parameter.data = other
    try:
        yield
    finally:
        for parameter, own in before.items():
            parameter.data = own
