"""`convert`: from a source to a `.shd` file."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

from shiradelta.errors import DeltaError, SourceError
from shiradelta.fit import Fit
from shiradelta.format import registry
from shiradelta.io.writer import writing
from shiradelta.models.checkpoint import open_checkpoint
from shiradelta.select.counts import Counts
from shiradelta.select.topk import count_for
from shiradelta.util.files import check_target
from shiradelta.util.plots import check_plot

from .aim import parse_size
from .conversion import Conversion
from .plot import draw
from .report import Report
from .sources import open_source

DEFAULT_SPARSITY = 0.01
#: Called with (tensor's name, done, total) while work goes on.
Progress = Callable[[str, int, int], None]


def default_output(source: str | os.PathLike[str]) -> Path:
    """Where a conversion goes if nobody says: beside the source, under its name."""
    path = Path(source)
    if path.is_file():
        return path.with_suffix(registry.SUFFIX)
    path = path.resolve() if path.name in ("", "..") else path
    return path.with_name(path.name + registry.SUFFIX)


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    sparsity: float | None = None,
    base: str | os.PathLike[str] | None = None,
    values: str = "int4",
    *,
    target_size: str | int | None = None,
    target_error: float | None = None,
    scope: str = "tensor",
    kind: str = "auto",
    alpha: float | None = None,
    zstd: bool = False,
    metadata: dict[str, str] | None = None,
    backend: str = "auto",
    fit: Fit | None = None,
    plot: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Converts a fine-tune to a `.shd` file by keeping its largest changes, or by fitting few to behave like it.

    Args:
        source: a LoRA (a safetensors file, or PEFT's folder), a fine-tuned model's folder or file, or a file of
            dense or sparse diffs.
        out: the file to write; by default `source`'s name with `.shd`, beside it.
        sparsity: the share of weights that change, above 0 and up to 1; 0.01 if nothing else is wished.
        target_size: the file's largest size instead, in bytes or such as "2MB": as many weights as fit.  A fitted file
            is kept under it by what its positions could take at worst.
        target_error: the largest relative error of the delta instead, |stored - delta| / |delta| over all tensors
            (Frobenius norm, quantisation included): as few weights as keep it, to half a percent.  Not with `fit`.
        base: the base model's folder or file.  A full fine-tune needs it; with it every delta gets fingerprints.
        values: "f32", "f16", "bf16", "int8", "int4" or "sign".
        scope: "tensor" keeps the share in every tensor, "model" over all of them together; a fit then moves weights
            from tensor to tensor.
        kind: what `source` is; "auto" looks at its tensors' names.
        alpha: a LoRA's alpha, over what its files say.
        zstd: compress sections where that helps; for archives.
        metadata: further pairs for the file.
        backend: "libshd", "numpy", or "auto" for the best there is.
        fit: how to fit, where that is wanted; it needs texts and the base.
        plot: a PNG to draw: nonzeros and energy by layer, and the distance against the steps of a fit.
        progress: is told how far it is.

    Returns:
        What was kept and what was not, per tensor and in all.

    Raises:
        SourceError: the source or the base cannot be read, or nothing in them matches.
        DeltaError: an argument that cannot be.
        TargetError: the file cannot be written.
    """
    target = default_output(source) if out is None else Path(out)
    check_target(target, registry.MAGIC, "a .shd file")
    if plot is not None:
        check_plot(plot)
    share = _check_wishes(sparsity, target_size, target_error, fit)
    if alpha is not None and not math.isfinite(alpha):
        raise DeltaError(f"alpha {alpha} is not finite; give a number such as 16")
    tell = progress or (lambda what, done, total: None)
    opened = open_source(Path(source), kind, None if base is None else open_checkpoint(base), alpha)
    if not opened.items:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(opened.skipped.items())[:3])
        raise SourceError(f"{source}: nothing in it can be converted ({why or 'no tensors'})")
    counts = Counts(opened.items, scope, tell)
    pairs = {"source": Path(source).resolve().name, **({} if base is None else {"base": Path(base).resolve().name})}
    job = Conversion(os.fspath(source), target, opened, values, zstd, backend, pairs, metadata or {}, tell)
    if share is None:
        share = job.find_sparsity(counts, target_size, target_error, fit is not None)
    kept = counts(share)
    fitted = None
    if fit is not None:
        from .fitting import run_fit

        fitted = run_fit(fit, opened, kept, source, base, values, scope, target, progress)
    with writing(target, values, zstd, backend) as writer:
        report = job.write(writer, share, kept, fitted)
    report.complete()
    report.file_bytes = target.stat().st_size
    if plot is not None:
        draw(plot, report)
    return report


def _check_wishes(sparsity: float | None, size: str | int | None, error: float | None, fit: Fit | None) -> float | None:
    """The sparsity, or None where it has to be found."""
    if sum(wish is not None for wish in (sparsity, size, error)) > 1:
        raise DeltaError("sparsity, target size and target error exclude each other; give one of them")
    if error is not None and not 0 <= error < 1:
        raise DeltaError(
            f"a relative error of {error:g} is out of range; give a number from 0 and below 1, such as 0.3"
        )
    if error is not None and fit is not None:
        raise DeltaError(
            "the error of a fitted delta is that of the model's outputs, known only once it is fitted; give a sparsity"
            " or a target size"
        )
    if size is not None:
        parse_size(size)
    if size is not None or error is not None:
        return None
    share = DEFAULT_SPARSITY if sparsity is None else sparsity
    count_for(share, 1)
    return share
