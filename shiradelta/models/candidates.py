"""Refuses a folder that holds several models or adapters: which of them is meant is not guessed."""

from __future__ import annotations

import re
from pathlib import Path

from shiradelta.errors import SourceError
from shiradelta.models.checkpoint import open_checkpoint
from shiradelta.models.peft import CONFIG, WEIGHTS
from shiradelta.models.sentence import LIST

#: A folder that transformers' Trainer writes at some step.
_CHECKPOINT = re.compile(r"checkpoint-\d+")
_NAMED = 5


def refuse_several(path: Path) -> None:
    """Refuses a folder with several adapters or checkpoints, such as a trainer's output.

    A model or an adapter in the folder itself is what loaders take, whatever checkpoints lie beside it.  An adapter
    with other adapters in subfolders is refused all the same, as PEFT saves several at once like this.

    Raises:
        SourceError: the candidates.
    """
    if not path.is_dir() or (path / "model_index.json").exists() or (path / LIST).exists():
        return
    folders = [folder for folder in path.iterdir() if folder.is_dir() and folder.name[0] != "."]
    folders = sorted(filter(_has_weights, folders), key=lambda folder: (len(folder.name), folder.name))
    adapters = [folder.name for folder in folders if _is_adapter(folder)]
    checkpoints = [folder.name for folder in folders if _CHECKPOINT.fullmatch(folder.name)]
    if _is_adapter(path):
        others = [name for name in adapters if name not in checkpoints]
        candidates = [WEIGHTS, *others] if others else []
    elif _has_weights(path):
        candidates = []
    else:
        candidates = list(dict.fromkeys(adapters + checkpoints)) or _twins(folders)
    if candidates:
        few = ", ".join(candidates[:_NAMED]) + (", ..." if len(candidates) > _NAMED else "")
        what = "an adapter or checkpoint" if len(candidates) == 1 else f"{len(candidates)} adapters or checkpoints"
        raise SourceError(f"{path}: holds {what} ({few}); give the one that is meant: {path / candidates[-1]}")


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


def _is_adapter(folder: Path) -> bool:
    return (folder / WEIGHTS).exists() or (folder / CONFIG).exists()


def _twins(folders: list[Path]) -> list[str]:
    """The folders whose model has the tensors of another one's: states of one model, and no pipeline's components."""
    seen: dict[frozenset[tuple[str, tuple[int, ...]]], list[str]] = {}
    for folder in folders:
        held = frozenset((name, slot.shape) for name, slot in open_checkpoint(folder).items())
        seen.setdefault(held, []).append(folder.name)
    return next((names for names in seen.values() if len(names) > 1), [])
