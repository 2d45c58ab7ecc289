"""The input and the result of a fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shiradelta.errors import SourceError
from shiradelta.fit.settings import Fit
from shiradelta.format.arithmetic import Float32
from shiradelta.format.delta import TensorDelta
from shiradelta.select.topk import NOT_FINITE, Rows, Selection, row_shape
from shiradelta.util.progress import Progress

if TYPE_CHECKING:
    from shiradelta.fit.gain import Gain


@dataclass(frozen=True)
class FitTarget:
    """One tensor to fit: its dense delta, and how many of its weights may change.

    Attributes:
        name: the tensor's, in the base's files; a weight's in memory, where it is joined from several tensors.
        dtype: the base's, by torch's name.
        shape: the tensor's.
        rows: gives a function (first row, last row) -> those rows of the dense delta, which `row_shape` cuts.
        count: how many weights may change.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    rows: Callable[[], Rows]
    count: int

    def dense(self) -> Float32:
        """The whole delta, flat.

        Raises:
            SourceError: it is not finite.
        """
        delta = self.rows()(0, row_shape(self.shape)[0]).reshape(-1)
        if not np.all(np.isfinite(delta)):
            raise SourceError(f"tensor {self.name!r} {NOT_FINITE}")
        return delta


@dataclass(frozen=True)
class OldBase:
    """The base that a delta was made for, where it is fitted to a new one: as dense deltas on the new base.

    Attributes:
        root: the old base's file or folder.
        base: give the old base, in every tensor.
        tuned: give the old base with the old delta, which is the teacher, in every tensor.
        delta: the old delta by itself, in the tensors that it changes.
    """

    root: Path
    base: Sequence[FitTarget]
    tuned: Sequence[FitTarget]
    delta: Sequence[FitTarget]


@dataclass(frozen=True, kw_only=True)
class FitJob:
    """Everything that a fit gets.

    Attributes:
        fit: the settings.
        targets: the tensors to fit.
        exact: further changes of the file, by name; the student and the teacher both have them.
        base, source: where the model and its fine-tune are.
        old: the base that the source was made for, if it is not `base`.
        codec: the value codec.
        whole_model: nonzeros may move between tensors.
        out: the file to write; the state of an interrupted run is kept beside it.
        progress: called with (what, done, total).
    """

    fit: Fit
    targets: Sequence[FitTarget]
    exact: Sequence[tuple[str, TensorDelta]]
    base: Path
    source: Path
    codec: str
    whole_model: bool
    out: Path
    progress: Progress
    old: OldBase | None = None


#: The key of a fit's main measure, which `Fitted.measure` says in words, among all measures.
DISTANCE = "distance"


@dataclass
class Fitted:
    """The result of a fit.

    Attributes:
        tensors: name -> positions and values, not yet quantised.
        measure: the unit of the distances, in words.
        texts, held_out: number of texts to fit on, and of held-out texts to measure on.
        generated: number of texts to fit on beside these that the fine-tune generated.
        base, topk, fitted: distance from the fine-tune of the base, of plain top-k, and of the fit, as a reader of the
            file would measure them.
        old_delta: distance of the new base with the old delta as it was; None without a new base.
        apart: measure -> what `HeldOut.apart` and `HeldOut.added` tell; empty without a new base.
        steps: optimizer steps.
        mask: the mask of `Fit.mask` that the result comes from; empty where nothing was trained.
        seconds: time that the fit took.
        text_share: share of the target that was the text's next token.
        gain: losses on the held-out texts, and how much of the fine-tune's gain is kept; None if that is unknown.
        further: other measures of base, top-k and fit, by name.
        history: (step, distance).
        warnings: what a user should know.
        trials: (sparsity, share of the gain, its standard error) of each trial, where a share was aimed at.
    """

    tensors: dict[str, Selection]
    measure: str
    texts: int
    held_out: int
    generated: int = 0
    base: float = 0.0
    topk: float = 0.0
    fitted: float = 0.0
    old_delta: float | None = None
    steps: int = 0
    seconds: float = 0.0
    text_share: float = 0.0
    gain: Gain | None = None
    further: dict[str, dict[str, float]] = field(default_factory=dict)
    apart: dict[str, dict[str, float]] = field(default_factory=dict)
    history: list[tuple[int, float]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    trials: list[tuple[float, float, float]] = field(default_factory=list)
    mask: str = ""

    def note(self, state: str, measures: Mapping[str, float]) -> None:
        """Records measures of a state, "base", "topk", "old_delta" or "fitted", as `Behaviour.compare` names them."""
        for name, value in measures.items():
            if name == DISTANCE:
                setattr(self, state, value)
            else:
                self.further.setdefault(name, {})[state] = value

    def note_apart(self, what: str, measures: Mapping[str, float]) -> None:
        """Records how far two models are from each other that `HeldOut` has compared."""
        for name, value in measures.items():
            self.apart.setdefault(self.measure if name == DISTANCE else name, {})[what] = value

    def as_dict(self) -> dict[str, Any]:
        """Everything but tensors and warnings, for JSON."""
        found = {key: value for key, value in vars(self).items() if key not in ("tensors", "warnings")}
        return {**found, "gain": None if self.gain is None else self.gain.as_dict()}

    @property
    def metadata(self) -> dict[str, str]:
        """Metadata of the file."""
        return {
            **({} if self.gain is None else self.gain.metadata),
            "distance": f"{self.fitted:.6g}",
            "distance_base": f"{self.base:.6g}",
            "distance_topk": f"{self.topk:.6g}",
            **({} if self.old_delta is None else {"distance_old_delta": f"{self.old_delta:.6g}"}),
            "distance_measure": f"{self.measure}, {self.held_out} examples held out",
            **{
                name: ", ".join(f"{value:.4g} {of}" for of, value in values.items())
                for name, values in self.further.items()
            },
            **{f"apart_{key}": f"{value:.6g}" for key, value in self.apart.get(self.measure, {}).items()},
            "fit_texts": str(self.texts),
            **({"fit_generated": str(self.generated)} if self.generated else {}),
            "fit_steps": str(self.steps),
            **({"fit_mask": self.mask} if self.mask else {}),
            **({"fit_text_share": f"{self.text_share:.3g}"} if self.text_share else {}),
        }
