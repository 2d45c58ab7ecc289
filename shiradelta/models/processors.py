"""What makes a model's inputs of sounds and pictures, beside its tokenizer, from folders only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shiradelta.errors import SourceError
from shiradelta.models.loading import from_folder, load_tokenizer
from shiradelta.util.registry import Registry


@dataclass(frozen=True)
class SpeechProcessor:
    """A tokenizer, and what makes features of sounds.

    Attributes:
        tokenizer: the model's.
        feature_extractor: the model's.
    """

    tokenizer: Any
    feature_extractor: Any


@dataclass(frozen=True)
class ProcessorKind:
    """A row of `PROCESSORS`.

    Attributes:
        name: `ExampleKind.media` of the examples that need it.
        load: gives it from folders, of which the first that has it is taken.
    """

    name: str
    load: Callable[..., Any]


def _first(auto: str, folders: tuple[Path, ...]) -> Any:
    """What an Auto class loads from the first folder that has a preprocessor.

    Raises:
        SourceError: none has, or it cannot be loaded.
    """
    for folder in folders:
        if any((folder / name).exists() for name in ("preprocessor_config.json", "processor_config.json")):
            return from_folder(auto, folder)
    raise SourceError(
        f"{folders[0]}: has no preprocessor_config.json, which says what the model gets of a sound or a picture; copy"
        " it there"
    )


def _speech(*folders: Path) -> SpeechProcessor:
    # A fine-tune of one language has a tokenizer that writes its mark, which the base's does not; it is named last.
    own = [folder for folder in reversed(folders) if folder.is_dir()]
    return SpeechProcessor(load_tokenizer(*own, *folders), _first("AutoFeatureExtractor", folders))


def _pictures(*folders: Path) -> Any:
    return _first("AutoProcessor", folders)


PROCESSORS: Registry[ProcessorKind] = Registry(
    "processor",
    [ProcessorKind("", load_tokenizer), ProcessorKind("sound", _speech), ProcessorKind("picture", _pictures)],
)


def load_processor(media: str, *folders: Path) -> Any:
    """What makes a model's inputs of examples: a tokenizer for texts, or a processor that has one.

    Args:
        media: `ExampleKind.media` of the examples.
        folders: of which the first that has it is taken.

    Raises:
        SourceError: no folder has it, or it cannot be loaded.
        MissingDependencyError: transformers is not installed.
    """
    return PROCESSORS.find(media).load(*folders)
