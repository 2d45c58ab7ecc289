"""Refuses a folder that holds several models or adapters: which of them is meant is not guessed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from shiradelta.errors import SourceError
from shiradelta.models.checkpoint import INDEX_SUFFIX, STANDARD, Checkpoint, open_checkpoint, shards_of
from shiradelta.models.peft import CONFIG, LORA_WEIGHTS, WEIGHTS
from shiradelta.models.sentence import LIST

#: A folder that transformers' Trainer writes at some step.
_CHECKPOINT = re.compile(r"checkpoint-\d+")
_NAMED = 5
_PIPELINE = "model_index.json"
#: Pickles of weights, which loaders take from the safetensors file beside them if there is one.
_PICKLES = ("adapter_model.bin", "pytorch_lora_weights.bin", "pytorch_model.bin", "diffusion_pytorch_model.bin")


def refuse_several(path: Path, *, lora: bool = False) -> None:
    """Refuses what `refuse_several_folders` does, and a folder whose own files can be read as several.

    Two formats of the same weights, or of several precisions, are no several: all loaders take the same of them.

    Args:
        path: a file or folder.
        lora: whether a LoRA may be meant.

    Raises:
        SourceError: the candidates.
    """
    if path.is_dir():
        _refuse(path, _readings(path, lora), "models or adapters in files of its own")
    refuse_several_folders(path)


def refuse_several_folders(path: Path) -> None:
    """Refuses a folder with several adapters or checkpoints, such as a trainer's output.

    A model or an adapter in the folder itself is what loaders take, whatever checkpoints lie beside it.  An adapter
    with other adapters in subfolders is refused all the same, as PEFT saves several at once like this.

    Raises:
        SourceError: the candidates.
    """
    if not path.is_dir() or (path / _PIPELINE).exists() or (path / LIST).exists():
        return
    folders = [folder for folder in path.iterdir() if folder.is_dir() and folder.name[0] != "."]
    folders = sorted(filter(_has_weights, folders), key=lambda folder: (len(folder.name), folder.name))
    adapters = [folder.name for folder in folders if _is_adapter(folder)]
    checkpoints = [folder.name for folder in folders if _CHECKPOINT.fullmatch(folder.name)]
    if _is_adapter(path):
        others = [name for name in adapters if name not in checkpoints]
        candidates = [WEIGHTS, *others] if others else []
    elif _has_weights(path):
        return
    else:
        candidates = list(dict.fromkeys(adapters + checkpoints)) or _twins(folders)
        if len(candidates) == 1:
            (only,) = candidates
            raise SourceError(
                f"{path}: holds an adapter or checkpoint ({only}); give the one that is meant: {path / only}"
            )
    _refuse(path, candidates, "adapters or checkpoints")


def unread_files(folder: Path, checkpoint: Checkpoint) -> list[str]:
    """The weight files in a source's folder that are not read, in a line each; none where a file was given."""
    if not folder.is_dir():
        return []
    read = {shard.file for shard in checkpoint.shards}
    found = [file for file in sorted(folder.iterdir()) if file not in read]
    names = [file.name for file in found if file.suffix == ".safetensors" or file.name in _PICKLES]
    return [f"{name} is not read: {', '.join(sorted(file.name for file in read)[:_NAMED])} is" for name in names]


def _refuse(path: Path, candidates: Sequence[str], what: str) -> None:
    if len(candidates) > 1:
        few = ", ".join(candidates[:_NAMED]) + (", ..." if len(candidates) > _NAMED else "")
        one = next(name for name in reversed(candidates) if not name.endswith(".json"))
        raise SourceError(f"{path}: holds {len(candidates)} {what} ({few}); give the one that is meant: {path / one}")


def _readings(folder: Path, lora: bool) -> list[str]:
    """The files in a folder of which each is a model or an adapter by itself."""
    models = [_PIPELINE] if (folder / _PIPELINE).exists() else []
    for stem in STANDARD if not models else ():
        single, index = f"{stem}.safetensors", folder / f"{stem}{INDEX_SUFFIX}"
        models += [single] if (folder / single).exists() else []
        models += [index.name] if index.exists() and shards_of(index) != [single] else []
    if not models:
        pickles = [f"{stem}.bin{end}" for stem in STANDARD for end in ("", ".index.json")]
        models = [name for name in pickles if (folder / name).exists()][:1]
    adapters = [_in_any_format(folder, name) for name in ((LORA_WEIGHTS, WEIGHTS) if lora else (WEIGHTS,))]
    return [*models, *filter(None, adapters)]


def _in_any_format(folder: Path, name: str) -> str | None:
    formats = (name, name.replace(".safetensors", ".bin"))
    return next((file for file in formats if (folder / file).exists()), None)


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or any((folder / name).exists() for name in _PICKLES)


def _is_adapter(folder: Path) -> bool:
    return (folder / WEIGHTS).exists() or (folder / CONFIG).exists()


def _twins(folders: list[Path]) -> list[str]:
    """The folders whose model has the tensors of another one's: states of one model, and no pipeline's components."""
    seen: dict[frozenset[tuple[str, tuple[int, ...]]], list[str]] = {}
    for folder in (folder for folder in folders if any(folder.glob("*.safetensors"))):
        held = frozenset((name, slot.shape) for name, slot in open_checkpoint(folder).items())
        seen.setdefault(held, []).append(folder.name)
    return next((names for names in seen.values() if len(names) > 1), [])
