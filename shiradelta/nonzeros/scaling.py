"""How the change of a weight is made of the trained values and of further numbers, such as a length for each row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor


class Scaling(ABC):
    """Makes the change at the nonzeros of one weight from two parameters: the values, and the scales.

    Attributes:
        name: what the scales are called in states and in the names of parameters.
    """

    name: ClassVar[str]

    @abstractmethod
    def start(self) -> Tensor:
        """The scales before training, float32."""

    @property
    @abstractmethod
    def unit(self) -> float:
        """What a relative learning rate of 1 is for the scales."""

    @abstractmethod
    def changes(self, values: Tensor, scales: Tensor) -> Tensor:
        """What is added to the base at the nonzeros, float32 [n], differentiable.

        The same arguments give the same bits, so that a file holds what the weights were while they were trained.

        Args:
            values: float32 [n].
            scales: float32, of the shape of `start`.
        """

    @abstractmethod
    def move(self, weight: Tensor) -> None:
        """Follows the weight's nonzeros to another mask; the weight has to hold the base."""

    @abstractmethod
    def scales_at(self, values: Tensor) -> Tensor:
        """The scales with which the values [n] themselves are the change, up to rounding."""
