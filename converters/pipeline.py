"""`convert`: a source becomes a `.shd` file."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from shiradelta.errors import ArgumentError, SourceError
from shiradelta.fit import Fit
from shiradelta.io.context import CONTEXTS
from shiradelta.io.download import local_model
from shiradelta.io.recognise import Wanted
from shiradelta.models.candidates import refuse_several
from shiradelta.models.checkpoint import open_checkpoint
from shiradelta.models.provenance import named, renewed
from shiradelta.select.counts import Counts
from shiradelta.select.shares import check_share
from shiradelta.util.arguments import ANY, MODEL, ArgumentKind, as_patterns, checked
from shiradelta.util.plots import check_plot
from shiradelta.util.progress import Progress
from shiradelta.util.text import parse_size

from .aim_kept import find_kept
from .conversion import Conversion
from .lossless import convert_lossless
from .plot import draw
from .report import ConversionReport
from .sources import AUTO, open_source
from .target import target_of
from .together import Crew
from .whole import check_whole, store_whole

DEFAULT_SPARSITY = 0.01
#: The largest alpha of a LoRA; those of published ones end at some thousands.
_MOST_ALPHA = 1e6


def _is_fit(value: object) -> bool:
    from shiradelta.fit.settings import Fit  # imports torch's part of the package only where a fit is asked for

    return isinstance(value, Fit)


@checked(fit=ArgumentKind("a shiradelta.fit.Fit", _is_fit), group=ANY, source=MODEL, base=MODEL)
def convert(
    source: str | os.PathLike[str] | Mapping[str, Any],
    out: str | os.PathLike[str] | None = None,
    sparsity: float | None = None,
    base: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    values: str = "int4",
    *,
    target_size: str | int | None = None,
    target_error: float | None = None,
    target_kept: float | None = None,
    scope: str = "tensor",
    kind: str = "auto",
    alpha: float | None = None,
    skip: str | Sequence[str] | None = (),
    whole: str | Sequence[str] | None = (),
    zstd: bool = False,
    metadata: dict[str, str] | None = None,
    backend: str = "auto",
    lossless: bool = False,
    context: str = "none",
    fit: Fit | None = None,
    from_base: str | os.PathLike[str] | None = None,
    plot: str | os.PathLike[str] | None = None,
    group: Any = None,
    progress: Progress | None = None,
) -> ConversionReport:
    """Converts a fine-tune to a `.shd` file: keeps its largest changes, or fits a few changes to behave like it.

    Args:
        source: a LoRA (a file, or PEFT's folder), a fine-tuned model's folder or file, a file of dense or sparse
            diffs, or a `.shd` file (with `out`); or one of these on the Hub, as `user/repo[@revision][/file]`.  Files
            are safetensors, or tensors that `torch.save` wrote.  With `lossless` and `out` also tensors by name, such
            as a state dictionary, on any device.
        out: the file to write; by default `source`'s name with `.shd`, beside it.
        sparsity: the share of weights that change, above 0 and up to 1; 0.01 by default.
        target_size: the file's largest size instead, in bytes or such as "2MB": as many weights as fit.  The size of a
            fitted file is bounded by the most that its positions could take.
        target_error: the largest relative error of the delta instead, |stored - delta| / |delta| over all tensors
            (Frobenius norm, quantisation included): as few weights as reach it, to half a percent.  Not with `fit`.
        target_kept: the share of the fine-tune's gain to keep on held-out examples instead, such as 0.95: as few
            weights as keep it, to a tenth.  Only with `fit`; every trial is a fit, and the report has them.
        base: the base model's folder or file, here or on the Hub.  A full fine-tune needs it; every delta gets
            fingerprints from it.  With `lossless` also tensors by name.
        values: how added values are stored, "int4" for example; `shiradelta convert --help` lists the choices.
        scope: "tensor" keeps the share in every tensor, "model" in all of them together, so that a fit may move
            nonzeros between tensors.
        kind: the source's layout, one of `kinds()`; "auto" finds it out.
        alpha: a LoRA's alpha, which overrides what its files say.
        skip: glob patterns of tensors that may be missing from the file where they cannot be converted, by their names
            in the source or in the base; any other loss is an error.  What is skipped counts as energy lost.
        whole: glob patterns of tensors of another shape than the base's, such as embeddings with new rows, by their
            names in the source or in the base: the file holds them whole, in their own dtype.  Not with `fit`.
        zstd: compress sections where that helps; for archives.
        metadata: further pairs for the file.
        backend: "libshd", "numpy", or "auto" for the fastest available.
        lossless: everything that differs from the base, so that `apply` gives the source bit for bit: every tensor as
            the smallest of what the format has, tensors added and dropped, too.  The result is compared with the source
            before it is put in place.  It takes no choice of what is kept and how: no sparsity, values, fit and so on.
        context: "base" makes a lossless file smaller that is read with its base only, as `recode` does; else "none".
        fit: fits the nonzeros, as these settings say; it needs texts and the base.
        from_base: the base that the source was made for, where `base` is a new one: with the fitted delta the new base
            behaves as the old base does with the source.  Only with `fit`; the two have the same names and shapes.
        plot: a PNG to write: nonzeros and energy by layer, and the distance from the fine-tune while fitting.
        group: a process group of torch.distributed whose processes all make this call, with the same files: each
            converts a part of the tensors, and the first writes the file.  Not with `lossless` or `fit`.
        progress: called with (what, done, total) while work goes on.

    Returns:
        What was kept and what was not, by tensor and in all.

    Raises:
        SourceError: the source or the base cannot be read, nothing in them matches, or a part of the source cannot be
            converted and no pattern allows that.
        ArgumentError: an argument is wrong, two exclude each other, or a pattern matches nothing.
        TargetError: the file cannot be written.
        MissingDependencyError: a file is a pickle, and torch is not installed, or older than 2.10.
    """
    crew = Crew(group)
    if not crew.alone and (lossless or fit is not None):
        what = "lossless (--lossless)" if lossless else "fit (--fit)"
        raise ArgumentError(f"{what} is for one process; start it without torchrun, and give no group=")
    if plot is not None:
        check_plot(plot)
    if context not in CONTEXTS or (context != "none" and not lossless):
        why = "is for lossless files" if context in CONTEXTS else f"is unknown; it is one of {', '.join(CONTEXTS)}"
        raise ArgumentError(f"context {context!r} {why}")
    if lossless:
        choices = {
            "sparsity": sparsity, "target_size": target_size, "target_error": target_error, "target_kept": target_kept,
            "values": None if values == "int4" else values, "scope": None if scope == "tensor" else scope,
            "kind": None if kind == AUTO else kind, "alpha": alpha, "skip": skip or None, "fit": fit, "plot": plot,
            "from_base": from_base, "whole": whole or None,
        }  # fmt: skip
        return convert_lossless(source, out, base, choices, zstd, backend, metadata, context, progress)
    if isinstance(source, Mapping) or isinstance(base, Mapping):
        raise ArgumentError("tensors in memory are for lossless=True only; save them as safetensors, and give a path")
    source = local_model(source, pickles=True)
    base = None if base is None else local_model(base, pickles=True)
    from_base = None if from_base is None else local_model(from_base, pickles=True)
    target = target_of(source, out)
    share = _check_arguments(sparsity, target_size, target_error, target_kept, fit)
    if alpha is not None and not 0 < abs(alpha) <= _MOST_ALPHA:
        why = (
            "leaves nothing of a LoRA" if alpha == 0 else "is out of range" if math.isfinite(alpha) else "is not finite"
        )
        raise ArgumentError(f"alpha {alpha:g} {why}; give a number such as 16")
    if fit is not None and as_patterns(whole):
        raise ArgumentError("a model with a tensor of another shape cannot be fitted; leave out whole (--whole) or fit")
    if from_base is not None and (fit is None or base is None):
        needed = {"--base MODEL (base=)": base, "--fit TEXTS (fit=)": fit}
        missing = " and ".join(name for name, given in needed.items() if given is None)
        raise ArgumentError(
            f"a delta goes over from the old base {from_base} to a new one by a fit only; give {missing}, too"
        )
    for model in (base, from_base):
        if model is not None:
            refuse_several(model)
    progress = progress or (lambda what, done, total: None)
    patterns = as_patterns(skip)
    made_for = base if from_base is None else from_base
    checkpoint = None if made_for is None else open_checkpoint(made_for, Wanted.BASE)
    opened = open_source(source, kind, checkpoint, alpha, patterns)
    store_whole(opened, source, as_patterns(whole))
    if not opened.items:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(opened.skipped.items())[:3])
        raise SourceError(
            f"{source}: nothing in it can be converted ({why or 'no tensors'}); give the base that it was made from, or"
            " rename its tensors as the base's"
        )
    if fit is not None:
        from .fitting import refuse_resized, run_fit

        refuse_resized(opened, source)
    losses = check_whole(opened, source, patterns)
    old = None
    if from_base is not None:
        from .new_base import on_new_base

        assert checkpoint is not None
        assert base is not None
        opened, old = on_new_base(opened, checkpoint, open_checkpoint(base, Wanted.BASE))
    counts = Counts(opened.items, scope, progress)
    pairs = named(source, base) if from_base is None else renewed(source, from_base, base)
    job = Conversion(
        source=os.fspath(source),
        target=target,
        opened=opened,
        losses=losses,
        values=values,
        zstd=zstd,
        backend=backend,
        pairs=pairs,
        metadata=metadata or {},
        progress=progress,
    )
    fitted = None
    if fit is not None:
        pairs["fit_seed"] = str(fit.seed)
    if target_kept is not None:
        assert fit is not None
        share, fitted = find_kept(
            target_kept,
            lambda trial: run_fit(fit, opened, counts(trial), source, base, values, scope, target, progress, old),
            fit.log,
        )
    elif share is None:
        share = job.find_sparsity(counts, target_size, target_error, fit is not None)
    kept = counts(share)
    if fit is not None and fitted is None:
        fitted = run_fit(fit, opened, kept, source, base, values, scope, target, progress, old)
    with crew.writing(target, values, zstd, backend) as writer:
        report = job.write(writer, share, kept, fitted, crew=crew)
    report.complete()
    report.file_bytes = crew.size(target)
    if plot is not None and crew.first:
        draw(plot, report)
    return report


def _check_arguments(
    sparsity: float | None, size: str | int | None, error: float | None, kept: float | None, fit: Fit | None
) -> float | None:
    """The sparsity, or None where the size, the error or what is kept decides it."""
    if sum(given is not None for given in (sparsity, size, error, kept)) > 1:
        raise ArgumentError("sparsity, target size, target error and target kept exclude each other; give one of them")
    if kept is not None and fit is None:
        raise ArgumentError("the share of the gain that is kept is known only of a fit; give --fit TEXTS, too")
    if kept is not None and not 0 < kept <= 1:
        raise ArgumentError(f"a share of {kept:g} of the gain is out of range; give one above 0, such as 0.95")
    if error is not None and not 0 <= error < 1:
        raise ArgumentError(
            f"a relative error of {error:g} is out of range; give a number from 0 and below 1, such as 0.3"
        )
    if error is not None and fit is not None:
        raise ArgumentError(
            "the error of a fitted delta is that of the model's outputs, known only once it is fitted; give a sparsity"
            " or a target size"
        )
    if size is not None:
        parse_size(size)
    if size is not None or error is not None or kept is not None:
        return None
    share = DEFAULT_SPARSITY if sparsity is None else sparsity
    check_share(share)
    return share
