"""The weights of a part of the model in each state: base, top-k, fitted, tuned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from shiradelta.fit.rounding import write_rounded
from shiradelta.fit.stored import Piece
from shiradelta.fit.teacher import exchanged
from shiradelta.fit.tuned_weights import Rounding, TunedWeights
from shiradelta.nonzeros.vector import Nonzeros
from shiradelta.select.topk import Selection

#: The same model with different weights; the teacher is "tuned".
STUDENTS = ("base", "topk", "fitted")
STATES = (*STUDENTS, "tuned")


class StateWeights:
    """A part of the model, filled with the base's weights, and its weights in each state.

    Args:
        parameters: the part's parameters by name.
        pieces: parameter's name -> what tensors to fit share with it.
        codec: the value codec.

    Attributes:
        weights: the weights to fit.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], pieces: Mapping[str, Sequence[Piece]], codec: str
    ) -> None:
        self._codec = codec
        self.weights = TunedWeights()
        for name, weight in parameters.items():
            if name in pieces:
                self.weights.add(name, weight, pieces[name])
        students = ("topk", "fitted") if self.weights.targets else ()
        self._nonzeros = {state: self.weights.topk() for state in students}

    @property
    def fitted(self) -> Nonzeros | None:
        """The student's nonzeros: top-k until they are refitted.  None if nothing is fitted."""
        return self._nonzeros.get("fitted")

    def quantiser(self, positions: Mapping[int, Tensor]) -> Rounding:
        """Rounds values of some weights, by their index, as a reader will see them."""
        return self.weights.quantiser(positions, self._codec)

    @contextmanager
    def of(self, state: str) -> Iterator[None]:
        """Within the block, the weights are those of the state."""
        nonzeros = self._nonzeros.get(state)
        if nonzeros is not None:
            write_rounded(nonzeros, self.weights, self._codec)
        try:
            with exchanged(self.weights.tuned if state == "tuned" else {}):
                yield
        finally:
            if nonzeros is not None:
                nonzeros.write(None)

    def selections(self) -> dict[str, Selection]:
        """The student's nonzeros by the targets' names, as they go into the file."""
        return {} if self.fitted is None else self.weights.selections(self.fitted)
