"""The method "refit" with the whole model in memory."""

from __future__ import annotations

from functools import partial

from shiradelta.fit.fitted import FitJob, Fitted
from shiradelta.fit.refit.least_squares import left_out, left_out_warnings, own_linears, refit
from shiradelta.fit.rounding import write_rounded
from shiradelta.fit.subject import Subject
from shiradelta.nonzeros.vector import Nonzeros


def fit(job: FitJob, subject: Subject, nonzeros: Nonzeros, result: Fitted) -> None:
    """Refits mask and values of linear layers in closed form; afterwards the weights hold them."""
    calibration = subject.calibration
    result.texts = sum(map(len, calibration))

    covered = subject.fitted.covered
    linears = [module for module in own_linears(subject.model) if module.weight in covered]
    left = refit(
        linears,
        partial(subject.behaviour.outputs, subject.model),
        subject.teacher.in_place,
        nonzeros,
        partial(subject.fitted.quantiser, codec=job.codec),
        calibration,
        partial(job.progress, "least squares by layer"),
    )
    result.warnings += left_out_warnings(left_out(subject.model, subject.fitted, left))
    write_rounded(nonzeros, subject.fitted, job.codec)
