"""Foreign layouts -> `.shd`: one file a source, all through `convert`.

A source yields `Item`s, one a tensor; `convert` selects, quantises, writes and reports, one tensor in memory at
a time.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from shiradelta import wire
from shiradelta.arithmetic import Float32, Positions
from shiradelta.backend import choose
from shiradelta.checkpoint import Checkpoint, open_checkpoint
from shiradelta.errors import DeltaError, SourceError, TargetError
from shiradelta.fit import Fit
from shiradelta.select import Selection, allocate, count_for, top_k
from shiradelta.writer import DeltaWriter, writing

from .item import Item, Source
from .report import Report, TensorReport

__all__ = ["KINDS", "Report", "convert", "default_output"]

KINDS = ("auto", "lora", "full", "diff")
SCOPES = ("tensor", "model")
#: Called with (tensor's name, done, total) while work goes on.
Progress = Callable[[str, int, int], None]


def default_output(source: str | os.PathLike[str]) -> Path:
    """Where a conversion goes if nobody says: beside the source, under its name."""
    path = Path(source)
    if path.is_file():
        return path.with_suffix(wire.SUFFIX)
    path = path.resolve() if path.name in ("", "..") else path
    return path.with_name(path.name + wire.SUFFIX)


def _check_target(target: Path) -> None:
    """Refuses to replace what is not a `.shd` file, such as the source or the base."""
    if not target.exists():
        return
    if target.is_file():
        with open(target, "rb") as stream:
            if stream.read(len(wire.MAGIC)) in (wire.MAGIC, b""):
                return
    raise TargetError(f"{target}: is there and is not a {wire.SUFFIX} file, so it is not replaced; give --out FILE")


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    sparsity: float = 0.01,
    base: str | os.PathLike[str] | None = None,
    values: str = "int4",
    *,
    scope: str = "tensor",
    kind: str = "auto",
    alpha: float | None = None,
    zstd: bool = False,
    metadata: dict[str, str] | None = None,
    backend: str = "auto",
    fit: Fit | None = None,
    progress: Progress | None = None,
) -> Report:
    """Converts a fine-tune to a `.shd` file by keeping its largest changes, or by fitting few to behave like it.

    Args:
        source: a LoRA (a safetensors file, or PEFT's folder), a fine-tuned model's folder or file, or a file of
            dense or sparse diffs.
        out: the file to write; by default `source`'s name with `.shd`, beside it.
        sparsity: the share of weights that change, above 0 and up to 1.
        base: the base model's folder or file.  A full fine-tune needs it; with it every delta gets fingerprints.
        values: "f32", "f16", "bf16", "int8", "int4" or "sign".
        scope: "tensor" keeps the share in every tensor, "model" over all of them together.
        kind: what `source` is; "auto" looks at its tensors' names.
        alpha: a LoRA's alpha, over what its files say.
        zstd: compress sections where that helps; for archives.
        metadata: further pairs for the file.
        backend: "libshd", "numpy", or "auto" for the best there is.
        fit: how to fit, where that is wanted; it needs texts and the base.
        progress: is told how far it is.

    Returns:
        What was kept and what was not, per tensor and in all.

    Raises:
        SourceError: the source or the base cannot be read, or nothing in them matches.
        DeltaError: an argument that cannot be.
        TargetError: the file cannot be written.
    """
    count_for(sparsity, 1)
    if scope not in SCOPES:
        raise DeltaError(f"scope {scope!r} is unknown; take {' or '.join(SCOPES)}")
    if alpha is not None and not math.isfinite(alpha):
        raise DeltaError(f"alpha {alpha} is not finite; give a number such as 16")
    target = default_output(source) if out is None else Path(out)
    _check_target(target)
    opened = open_source(Path(source), kind, None if base is None else open_checkpoint(base), alpha)
    report = Report(os.fspath(source), os.fspath(target), sparsity, values)
    report.skipped.update(opened.skipped)
    report.warnings.extend(opened.warnings)
    items = opened.items
    if not items:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(opened.skipped.items())[:3])
        raise SourceError(f"{source}: nothing in it can be converted ({why or 'no tensors'})")
    dense = [item for item in items if item.dense is not None]
    counts = {item.name: count_for(sparsity, item.numel) for item in dense}
    if scope == "model":
        total = count_for(sparsity, sum(item.numel for item in dense))
        counts = allocate({item.name: (item.dense, item.matrix) for item in dense if item.dense}, total)
    at_least = choose(backend).at_least
    fitted: dict[str, Selection] = {}
    if fit is not None:
        from .fitting import run_fit

        report.fit = run_fit(fit, opened, counts, source, base, values, scope, target, progress)
        fitted = report.fit.tensors
        report.warnings.extend(report.fit.warnings)
    with writing(target, values, zstd, backend) as writer:
        for number, item in enumerate(items):
            if progress:
                progress(item.name, number, len(items))
            tensor_report = _write(writer, item, counts.get(item.name, 0), at_least, fitted.get(item.name))
            if tensor_report.nnz:
                report.tensors.append(tensor_report)
            else:
                none = "none of its changes is among the largest" if tensor_report.energy else "nothing changes"
                report.skipped[item.name] = none
                report.energy_left_out += tensor_report.energy
        if not report.tensors:
            raise SourceError(f"{source}: nothing in it changes the base")
        report.complete()
        writer.metadata.update(
            {
                "created_by": f"shiradelta {_version()}",
                "method": "topk" if report.fit is None else "fit",
                "source": Path(source).resolve().name,
                "sparsity": f"{sparsity:g}",
                **({"energy_kept": f"{report.energy_kept:.4f}"} if report.fit is None else report.fit.metadata),
                **({} if base is None else {"base": Path(base).resolve().name}),
                **(metadata or {}),
            }
        )
    report.file_bytes = target.stat().st_size
    return report


def _version() -> str:
    from importlib.metadata import version

    return version("shiradelta")


def _write(
    writer: DeltaWriter,
    item: Item,
    k: int,
    at_least: Callable[[Float32, float], Positions],
    fitted: Selection | None,
) -> TensorReport:
    """Selects from one tensor, unless that was done by fitting, and writes it if anything is selected."""
    try:
        if item.dense is not None:
            selection = fitted or top_k(item.dense(), item.matrix, k, at_least)
            tensor = item.delta(selection.positions, selection.values)
            energy, selected = selection.energy, selection.values
        else:
            assert item.exact is not None
            tensor = item.exact()
            selected = tensor.values() if tensor.op == "add" else np.zeros(0, np.float32)
            energy = float((selected.astype("f8") ** 2).sum())
        stored = writer.add(item.name, tensor) if tensor.nnz else tensor
    except SourceError as error:
        raise SourceError(f"tensor {item.name!r} {error}") from None
    return TensorReport.of(item.name, tensor, stored, energy, selected)


def open_source(path: Path, kind: str, base: Checkpoint | None, alpha: float | None) -> Source:
    """Finds out what a source is and opens it.  Raises SourceError."""
    from . import diff, full, lora
    from .lora_keys import parse_key, refuse_unmerged

    if kind not in KINDS:
        raise DeltaError(f"kind {kind!r} is unknown; take {', '.join(KINDS)}")
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise SourceError(f"{path}: is not a safetensors file; save it as safetensors first")
    weights = lora.adapter_weights(path)
    checkpoint = open_checkpoint(path if weights is None else weights)
    if kind != "diff":
        refuse_unmerged(checkpoint)
    if kind == "auto":
        if any(parse_key(key) for key in checkpoint):
            kind = "lora"
        elif diff.holds_diffs(checkpoint):
            kind = "diff"
        elif base is not None:
            kind = "full"
        else:
            raise SourceError(
                f"{path}: holds neither a LoRA nor diffs; for a full fine-tune give --base MODEL, for plain tensors"
                " that are differences give --kind diff"
            )
    if alpha is not None and kind != "lora":
        raise DeltaError("alpha is a LoRA's; leave it out")
    if kind == "lora":
        return lora.open_lora(checkpoint, base, alpha)
    if kind == "diff":
        return diff.open_diff(checkpoint, base)
    if base is None:
        raise SourceError(f"{path}: a full fine-tune needs the model that it was made from; give --base MODEL")
    return full.open_full(checkpoint, base)
