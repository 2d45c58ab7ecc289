"""The method "refit" with the whole model in memory."""

from __future__ import annotations

from functools import partial
from itertools import chain

from shiradelta.fit.fitted import FitJob, Fitted
from shiradelta.fit.refit.least_squares import left_out, left_out_warnings, own_linears, refit
from shiradelta.fit.rounding import write_rounded
from shiradelta.fit.subject import Subject
from shiradelta.nonzeros.vector import Nonzeros


def fit(job: FitJob, subject: Subject, nonzeros: Nonzeros, result: Fitted) -> None:
    """Refits mask and values of linear layers in closed form; afterwards the weights hold them."""
    result.texts, result.generated = subject.texts.numbers(chain(*subject.calibration))
    left = solve(job, subject, nonzeros)
    result.warnings += left_out_warnings(left_out(subject.model, subject.fitted, left))
    write_rounded(nonzeros, subject.fitted, job.codec)


def solve(job: FitJob, subject: Subject, nonzeros: Nonzeros) -> list[int]:
    """Refits `nonzeros`; the weights hold the base afterwards.  Returns the indices of the tensors that keep theirs."""
    covered = subject.fitted.covered
    linears = [module for module in own_linears(subject.model) if module.weight in covered]
    return refit(
        linears,
        partial(subject.behaviour.outputs, subject.model),
        subject.teacher.in_place,
        nonzeros,
        partial(subject.fitted.quantiser, codec=job.codec),
        subject.calibration,
        subject.behaviour.token_weights,
        partial(job.progress, "least squares by layer"),
        subject.model if job.fit.forward is None else None,
    )
