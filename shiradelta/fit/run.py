"""Runs a fit: from a fine-tune's dense deltas and some texts to fitted sparse ones."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from shiradelta.fit.choices import METHODS
from shiradelta.fit.fitted import FitJob, Fitted
from shiradelta.fit.own_model import restored
from shiradelta.fit.refit.skeleton import CannotStreamError
from shiradelta.fit.rounding import write_rounded
from shiradelta.fit.settings import Fit
from shiradelta.fit.subject import Subject
from shiradelta.util.memory import advising_on_memory


def run(job: FitJob) -> Fitted:
    """Fits the targets of a job.

    Raises:
        SourceError: the texts, the model or the fine-tune cannot be used.
        DivergedError: training gave NaN.
        ShiraDeltaError: memory ran out.
    """
    fit, method = job.fit, METHODS.find(job.fit.method)
    with advising_on_memory(_advice(fit)):
        if method.streamed is not None and fit.model is None and fit.forward is None:
            try:
                if job.old is not None:
                    raise CannotStreamError("it is measured beside the old base")
                if fit.generate:
                    raise CannotStreamError("it generates texts")
                found: Fitted = method.stream(job)
            except CannotStreamError as reason:
                fit.log(f"the model is loaded as a whole, for {reason}")
            else:
                return found
        with restored(job), _tensor_cores():
            return _fit_whole(job)


def _fit_whole(job: FitJob) -> Fitted:
    """Fits with the whole model in memory."""
    start = time.monotonic()
    method = METHODS.find(job.fit.method)
    job.progress("the fine-tune's outputs", 0, 1)
    subject = Subject(job)
    texts, generated = subject.texts.numbers(subject.texts.train)
    result = Fitted({}, subject.behaviour.measure, texts, len(subject.texts.held_out), generated)
    result.warnings = subject.warnings
    result.note("base", subject.held_out.measures("base"))
    subject.measure_old(result)
    result.text_share = subject.behaviour.text_share if method.trains else 0.0
    nonzeros = subject.fitted.topk()
    try:
        write_rounded(nonzeros, subject.fitted, job.codec)
        result.note("topk", subject.held_out.measures("topk"))
        nonzeros.write(None)
        method.fit(job, subject, nonzeros, result)
        result.note("fitted", subject.held_out.measures("fitted"))
        subject.measure_added(result, nonzeros, job.codec)
        result.gain = subject.held_out.gain()
    finally:
        nonzeros.write(None)
    result.tensors = subject.fitted.selections(nonzeros)
    result.tensors |= {name: result.tensors[first] for name, first in subject.tied.items() if first in result.tensors}
    result.seconds = time.monotonic() - start
    return result


def _advice(fit: Fit) -> str:
    """Which settings reduce the memory that a step takes."""
    return (
        f" with {fit.per_pass} examples per forward pass: --fit-micro {max(1, fit.per_pass // 2)} halves what they take"
        f" and changes little; --fit-tokens {max(1, fit.tokens // 2)} cuts texts{_more_gpus(fit)}"
    )


def _more_gpus(fit: Fit) -> str:
    """That there are more GPUs, if only one is asked for; one that no name is given of may be enough."""
    count = torch.cuda.device_count()
    named = [] if fit.device is None else fit.device.split(",") if isinstance(fit.device, str) else fit.device
    if count < 2 or len(named) > 1 or fit.model is not None:
        return ""
    return f"; --device {','.join(f'cuda:{index}' for index in range(count))} shares out the layers"


@contextmanager
def _tensor_cores() -> Iterator[None]:
    """Lets a GPU multiply float32 matrices in TF32, for student and teacher alike, so that distances hold."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
