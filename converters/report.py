"""The report of a conversion."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from shiradelta.format.arithmetic import Float32
from shiradelta.format.delta import TensorDelta
from shiradelta.format.operations import OPERATIONS, Operation
from shiradelta.util import text
from shiradelta.util.html import html_table

if TYPE_CHECKING:
    from shiradelta.fit.fitted import Fitted

#: Below this share of the energy a warning says that top-k loses most of the fine-tune.
LITTLE = 0.5
#: With fewer texts than this, a warning asks for more.
FEW_TEXTS = 200


@dataclass(frozen=True)
class TensorReport:
    """The report of one converted tensor.

    `energy` is the squared norm of the whole delta, `lost` that of its difference from what the file holds.
    `inexact` counts the elements that are not the fine-tune's, bit for bit, once the delta is on the base; None if the
    source does not say what the fine-tune's elements are, as a LoRA does not.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    nnz: int
    numel: int
    energy: float
    lost: float
    inexact: int | None = None

    @classmethod
    def of(
        cls,
        name: str,
        tensor: TensorDelta,
        stored: TensorDelta,
        energy: float,
        selected: Float32,
        inexact: int | None = None,
    ) -> TensorReport:
        """Compares the selected differences with what the file holds: quantised if added, exact if set."""
        kept = selected.astype(np.float64)
        held = stored.values().astype(np.float64) if tensor.operation.adds else kept
        rounding = kept - held
        lost = max(energy - float(kept @ kept), 0.0) + float(rounding @ rounding)
        return cls(name, tensor.op, tensor.shape, tensor.nnz, tensor.numel, energy, lost, inexact)

    @property
    def operation(self) -> Operation:
        """What the delta does to the tensor."""
        return OPERATIONS[self.op]

    @property
    def energy_kept(self) -> float:
        """1 - |delta - stored|^2 / |delta|^2; 1 for an exact tensor."""
        return 1 - self.lost / self.energy if self.energy else 1.0


@dataclass(repr=False)
class ConversionReport:
    """The report of a conversion: what it kept, by tensor and in all.

    Attributes:
        source, out: where it read and wrote.
        sparsity, values: how much was to be selected, and the value codec.
        tensors: the changed tensors.
        skipped: tensor or module that is not converted -> why.
        lost: those of the skipped tensors that the file lacks because a pattern allows it -> squared norm of their
            change; None where it is unknown.
        warnings: what the user should know.
        energy_left_out: squared norm of the tensors without a selected change, and of those that are lost.
        file_bytes: the file's size.
        fit: the figures of a fit, where there was one.
        lossless: everything that differs is in the file, and what it gives was compared with the source.
        inexact_left_out: elements of the tensors without a selected change that are not the fine-tune's; None if
            unknown.
    """

    source: str
    out: str
    sparsity: float
    values: str
    tensors: list[TensorReport] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    lost: dict[str, float | None] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    energy_left_out: float = 0.0
    file_bytes: int = 0
    fit: Fitted | None = None
    lossless: bool = False
    inexact_left_out: int | None = 0

    def __repr__(self) -> str:
        return f"<ConversionReport {self._about}>"

    def _repr_html_(self) -> str:
        """A table for notebooks."""
        return html_table(self._about, self.rows)

    @property
    def _about(self) -> str:
        tensors = text.count(self.tensors, "tensor")
        return f"{text.brief(self.out)}: {tensors}, {text.size(self.file_bytes)}, {self.summary}"

    def leave_out(self, tensor: TensorReport) -> None:
        """Takes a tensor of which nothing is selected."""
        if tensor.energy:
            self.skipped[tensor.name] = "none of its changes is among the largest"
        else:  # zeros may have changed their sign
            self.skipped[tensor.name] = "nothing changes that can be added" if tensor.inexact else "nothing changes"
        self.energy_left_out += tensor.energy
        if tensor.inexact is None and tensor.energy:
            self.inexact_left_out = None
        elif self.inexact_left_out is not None:
            self.inexact_left_out += tensor.inexact or 0

    @property
    def nnz(self) -> int:
        """Nonzeros in the file."""
        return sum(tensor.nnz for tensor in self.tensors)

    @property
    def numel(self) -> int:
        """Elements of the tensors that the file does not hold whole."""
        return sum(tensor.numel for tensor in self.tensors if not tensor.operation.creates)

    @property
    def bits_per_nonzero(self) -> float:
        """Bits of the whole file, by nonzero."""
        return self.file_bytes * 8 / self.nnz if self.nnz else 0.0

    @property
    def energy_kept(self) -> float | None:
        """The share of the fine-tune's squared norm that the file holds; None where what is lost is unknown."""
        if None in self.lost.values():
            return None
        energy = sum((tensor.energy for tensor in self.tensors), self.energy_left_out)
        lost = sum((tensor.lost for tensor in self.tensors), self.energy_left_out)
        return 1 - lost / energy if energy else 1.0

    @property
    def error(self) -> float | None:
        """The relative error of the delta in the file: |stored - delta| / |delta|, Frobenius norms of all tensors.

        None where what is lost is unknown.
        """
        return None if self.energy_kept is None else float((1 - self.energy_kept) ** 0.5)

    @property
    def inexact(self) -> int | None:
        """Elements of converted tensors that are not the fine-tune's, bit for bit, once the file is on the base.

        None if the source does not say what the fine-tune's elements are.
        """
        counts = [self.inexact_left_out, *(tensor.inexact for tensor in self.tensors)]
        known = [count for count in counts if count is not None]
        return sum(known) if len(known) == len(counts) else None

    @property
    def exact(self) -> bool | None:
        """Whether base and file give the fine-tune's weights, bit for bit; None if the source does not tell them.

        A LoRA and a difference say how weights change.  What they become depends on who adds the change: PEFT's product
        of factors rounds as its dtype, library and device do.
        """
        inexact = self.inexact
        return None if inexact is None else not inexact and not self.lost

    @property
    def exactness(self) -> str:
        """The same in words."""
        if self.exact is None:
            return "exactness unknown, as the source says how weights change, not what they become"
        if self.exact:
            return "exact"
        elements = text.count(self.inexact, "element differs", "elements differ") if self.inexact else ""
        tensors = text.count(self.lost, "tensor is skipped", "tensors are skipped") if self.lost else ""
        return f"not exact: {' and '.join(filter(None, (elements, tensors)))}"

    @property
    def summary(self) -> str:
        """How much of the fine-tune is kept, in a line."""
        worse = "" if self.worse is None else "; worse than the base or top-k, see above"
        return f"{self._kept}{worse}; {self.exactness}"

    @property
    def _kept(self) -> str:
        fit = self.fit
        if self.lossless:
            return "the source's weights, compared bit for bit"
        if fit is None:
            unknown = [name for name, energy in self.lost.items() if energy is None]
            if self.energy_kept is None:
                lost = text.count(unknown, "skipped tensor")
                return f"unknown share of the update's energy kept, as nothing tells the change of {lost}"
            return f"{self.energy_kept:.1%} of the update's energy kept (relative error {self.error:.3f})"
        if fit.gain is not None and fit.gain.kept is not None:
            closer = f", {fit.gain.kept} of {fit.gain.share_of} kept"
        else:
            closer = f", {1 - fit.fitted / fit.base:.0%} of the way" if fit.base and fit.fitted < fit.base else ""
        made = f" and {fit.generated:,} generated" if fit.generated else ""
        return f"fitted on {text.count(fit.texts, 'example')}{made} in {fit.seconds:.0f} s{closer}"

    @property
    def rows(self) -> list[list[str]]:
        """The rows of a table for people: what changes."""
        known = any(t.inexact is not None for t in self.tensors)
        rows = [["tensor", "op", "shape", "nonzeros", "density", "energy kept", *(["inexact"] if known else [])]]
        for t in self.tensors:
            density = text.percent(t.nnz / max(t.numel, 1))
            kept = "-" if self.fit else f"{t.energy_kept:.1%}"
            inexact = ["-" if t.inexact is None else f"{t.inexact:,}"] if known else []
            rows.append([t.name, t.op, text.shape(t.shape), f"{t.nnz:,}", density, kept, *inexact])
        return rows

    @property
    def measures(self) -> list[list[str]]:
        """The rows of a table: how far from the fine-tune the base, plain top-k and the fit are."""
        fit = self.fit
        if fit is None:
            return []
        found = {fit.measure: {state: getattr(fit, state) for state in self._states}, **fit.further}
        return [
            [f"against the fine-tune, {text.count(fit.held_out, 'example')} held out", *self._states.values()],
            *([name, *(f"{values[state]:.4g}" for state in self._states)] for name, values in found.items()),
        ]

    @property
    def _states(self) -> dict[str, str]:
        """The models that a fit has measured: names in its figures -> heads of columns."""
        moves = self.fit is not None and self.fit.old_delta is not None
        old = {"old_delta": "old delta"} if moves else {}
        return {"base": "new base" if moves else "base", "topk": "top-k", **old, "fitted": "fitted"}

    @property
    def apart(self) -> list[list[str]]:
        """The rows of a table, where a delta is fitted to a new base: the bases' difference, and what deltas add."""
        fit = self.fit
        if fit is None or not fit.apart:
            return []
        heads = {
            "new_base": "new base from the old",
            "old_delta": "old delta adds to the old",
            "fitted": "fitted adds to the new",
        }
        return [
            [f"two models apart, {text.count(fit.held_out, 'example')} held out", *heads.values()],
            *([name, *(f"{values[what]:.4g}" for what in heads)] for name, values in fit.apart.items()),
        ]

    @property
    def losses(self) -> list[list[str]]:
        """The rows of a table: losses on held-out examples, and the share of the fine-tune's gain that is kept."""
        gain = None if self.fit is None else self.fit.gain
        if gain is None:
            return []
        states = {**self._states, "tuned": "fine-tune"}
        rows = [
            [f"loss, {text.count(gain.examples, 'example')} held out", *states.values()],
            [gain.measure, *(f"{gain.losses[state]:.4g}" for state in states)],
        ]
        if gain.kept is not None:
            shares = [gain.shares[state] for state in self._states if state != "base"]
            rows.append([f"share of {gain.share_of}", "0%", *(f"{share.kept:.1%}" for share in shares), "100%"])
            rows.append(["its standard error", "-", *(f"{share.error:.1%}" for share in shares), "-"])
        return rows

    @property
    def trials(self) -> list[list[str]]:
        """The rows of a table: what each sparsity kept, where a share of the gain was aimed at."""
        if self.fit is None or self.fit.gain is None or not self.fit.trials:
            return []
        rows = [[text.percent(sparsity), f"{share:.1%}", f"{error:.1%}"] for sparsity, share, error in self.fit.trials]
        return [["trial", f"share of {self.fit.gain.share_of}", "its standard error"], *rows]

    @property
    def worse(self) -> str | None:
        """Than what the result of a fit is worse, and what to do; None if it is not, or nothing was fitted.

        Where the loss of held-out examples is known, by more than two standard errors of the difference.
        """
        fit = self.fit
        if fit is None:
            return None
        if fit.gain is None:
            found = {state: getattr(fit, state) for state in self._states}
            than = [state for state in found if fit.fitted > found[state]]
            measure = fit.measure
        else:
            found, measure, than = fit.gain.losses, fit.gain.measure, [*fit.gain.worse_than]
        if not than:
            return None
        names = {"base": "its base", "topk": "plain top-k", "old_delta": "the old delta as it was"}
        against = " and ".join(f"{names[state]} ({found[state]:.4g})" for state in than)
        return (
            f"the result ({found['fitted']:.4g}) is worse than {against} by {measure}: give more examples, of the"
            " kind that the model will see, more steps, or a larger sparsity"
        )

    def complete(self) -> None:
        """Adds the warnings that follow from the figures."""
        fit = self.fit
        if self.worse is not None:
            self.warnings.insert(0, self.worse)
        elif fit is not None and fit.fitted > fit.topk:
            self.warnings.append(
                f"fitting made it less like the fine-tune than top-k ({fit.measure}: {fit.fitted:.3g} against"
                f" {fit.topk:.3g}), though not worse by its loss; give more examples, or more steps"
            )
        if fit is not None and fit.gain is not None and fit.gain.kept is None:
            self.warnings.append(f"{fit.gain.nothing}, so no share of it is told; give examples of its own task")
        if fit is not None and self.worse is None and fit.texts < FEW_TEXTS:
            self.warnings.append(f"fitted on {text.count(fit.texts, 'example')} only; some thousands come closer")
        kept = self.energy_kept
        if self.fit is None and kept is not None and kept < LITTLE:
            self.warnings.append(
                f"only {kept:.0%} of the update's energy is kept: top-k alone loses most of this fine-tune;"
                " --fit TEXTS brings most of it back, a larger --sparsity some"
            )

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        plain = {key: value for key, value in vars(self).items() if key not in ("tensors", "fit")}
        return {
            **plain,
            "tensors": [
                {**asdict(tensor), "energy_kept": None if self.fit else tensor.energy_kept} for tensor in self.tensors
            ],
            "nnz": self.nnz,
            "numel": self.numel,
            "bits_per_nonzero": self.bits_per_nonzero,
            "energy_kept": self.energy_kept if self.fit is None else None,
            "error": self.error if self.fit is None else None,
            "exact": self.exact,
            "exactness": self.exactness,
            "inexact": self.inexact,
            "worse": self.worse,
            "fit": None if self.fit is None else self.fit.as_dict(),
        }
