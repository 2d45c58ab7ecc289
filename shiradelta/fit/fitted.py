"""What is to be fitted, and what comes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shiradelta.errors import SourceError
from shiradelta.fit import Fit
from shiradelta.format.arithmetic import Float32
from shiradelta.format.delta import TensorDelta
from shiradelta.select.topk import NOT_FINITE, Rows, Selection


@dataclass(frozen=True)
class Target:
    """One tensor to be fitted: its dense delta, and how many of its weights may change."""

    name: str
    dtype: str
    matrix: tuple[int, int]
    rows: Callable[[], Rows]
    count: int

    def dense(self) -> Float32:
        """The whole delta, flat.  Raises SourceError where it is not finite."""
        delta = self.rows()(0, self.matrix[0]).reshape(-1)
        if not np.all(np.isfinite(delta)):
            raise SourceError(f"tensor {self.name!r} {NOT_FINITE}")
        return delta


@dataclass(frozen=True)
class Order:
    """All that a fit is told.

    Attributes:
        fit: the settings.
        targets: what to fit.
        whole: what the file changes beside them, by name; it is the student's and the teacher's.
        base, source: where the model and its fine-tune are.
        codec: of the values.
        whole_model: nonzeros may move between tensors.
        out: the file to be written, beside which the state is kept.
        progress: is told (what is done, how much of it, of how much).
    """

    fit: Fit
    targets: Sequence[Target]
    whole: Sequence[tuple[str, TensorDelta]]
    base: Path
    source: Path
    codec: str
    whole_model: bool
    out: Path
    progress: Callable[[str, int, int], None]


@dataclass
class Fitted:
    """What came out.

    Attributes:
        tensors: name -> positions and values, not yet quantised.
        measure: what the distances are.
        base, topk, fitted: distances from the fine-tune, of files as they would be read.
        further: other measures of the same three, by name.
        text_share: of the target, what the texts themselves say.
        history: (step, distance).
    """

    tensors: dict[str, Selection]
    measure: str
    texts: int
    held_out: int
    base: float = 0.0
    topk: float = 0.0
    fitted: float = 0.0
    steps: int = 0
    seconds: float = 0.0
    text_share: float = 0.0
    further: dict[str, dict[str, float]] = field(default_factory=dict)
    history: list[tuple[int, float]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def note(self, state: str, measures: Mapping[str, float]) -> None:
        """Records what was measured of "base", "topk" or "fitted"."""
        for name, value in measures.items():
            if name == self.measure:
                setattr(self, state, value)
            else:
                self.further.setdefault(name, {})[state] = value

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {key: value for key, value in vars(self).items() if key not in ("tensors", "warnings")}

    @property
    def metadata(self) -> dict[str, str]:
        """For the file."""
        return {
            "distance": f"{self.fitted:.6g}",
            "distance_base": f"{self.base:.6g}",
            "distance_topk": f"{self.topk:.6g}",
            "distance_measure": f"{self.measure}, {self.held_out} texts held out",
            **{
                name: ", ".join(f"{value:.4g} {of}" for of, value in values.items())
                for name, values in self.further.items()
            },
            "fit_texts": str(self.texts),
            "fit_steps": str(self.steps),
            **({"fit_text_share": f"{self.text_share:.3g}"} if self.text_share else {}),
        }
