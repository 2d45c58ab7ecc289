"""Finding out what a source is."""

from __future__ import annotations

from pathlib import Path

from shiradelta.errors import DeltaError, SourceError
from shiradelta.format import registry
from shiradelta.models.checkpoint import Checkpoint, open_checkpoint

from .item import Source

KINDS = ("auto", "lora", "full", "diff")


def open_source(path: Path, kind: str, base: Checkpoint | None, alpha: float | None) -> Source:
    """Finds out what a source is and opens it.  Raises SourceError."""
    from . import diff, full, lora
    from .lora_keys import parse_key, refuse_unmerged

    if kind not in KINDS:
        raise DeltaError(f"kind {kind!r} is unknown; take {', '.join(KINDS)}")
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise SourceError(f"{path}: is not a safetensors file; save it as safetensors first")
    if path.suffix == registry.SUFFIX:
        raise SourceError(f"{path}: is a {registry.SUFFIX} file already; give what it was made from")
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
