"""Fitting a source's items instead of selecting from them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from shiradelta.errors import SourceError
from shiradelta.fit import Fit
from shiradelta.util.optional import importing
from shiradelta.util.progress import Progress

from .item import SkipReason, Source

if TYPE_CHECKING:
    from shiradelta.fit.fitted import Fitted, OldBase


def refuse_resized(source: Source, path: str | os.PathLike[str]) -> None:
    """Refuses a fine-tune that has other shapes than its base, for the fitted model could not behave like it.

    Raises:
        SourceError: a tensor's shape is not the base's.
    """
    for name, skipped in source.skipped.items():
        if skipped.reason is SkipReason.SHAPE:
            raise SourceError(
                f"{path}: {name!r}: {skipped}; such a tensor cannot be fitted: give the base the same shape"
                " (for a resized vocabulary, resize_token_embeddings), or convert without fitting"
            )


def run_fit(
    fit: Fit,
    source: Source,
    counts: Mapping[str, int],
    source_path: str | os.PathLike[str],
    base: str | os.PathLike[str] | None,
    values: str,
    scope: str,
    out: Path,
    progress: Progress,
    old: OldBase | None = None,
) -> Fitted:
    """Fits the items that have a dense delta to add; model and fine-tune share the others.

    Raises:
        MissingDependencyError: torch or transformers is not installed.
        SourceError: there is no base, or nothing to fit.
    """
    if base is None:
        raise SourceError(f"{source_path}: fitting needs the model that it was made from; give --base MODEL")
    with importing("fitting"):
        from shiradelta.fit.fitted import FitJob, FitTarget
        from shiradelta.fit.run import run
    targets = [
        FitTarget(item.name, item.dtype, item.shape, item.dense, counts[item.name])
        for item in source.items
        if item.dense is not None and not item.replaces and item.numel
    ]
    if not targets:
        raise SourceError(f"{source_path}: has nothing to fit, for its changes are exact already")
    exact = [(item.name, item.exact()) for item in source.items if item.exact is not None]
    job = FitJob(
        fit=fit,
        targets=targets,
        exact=exact,
        base=Path(base),
        source=Path(source_path),
        codec=values,
        whole_model=scope == "model",
        out=out,
        progress=progress,
        old=old,
    )
    return run(job)
