"""What makes a model's inputs of sounds, beside its tokenizer, from folders only."""

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


def load_feature_extractor(*folders: Path) -> Any:
    """The first feature extractor in the folders.

    Raises:
        SourceError: there is none, or it cannot be loaded.
        MissingDependencyError: transformers is not installed.
    """
    for folder in folders:
        if any((folder / name).exists() for name in ("preprocessor_config.json", "processor_config.json")):
            return from_folder("AutoFeatureExtractor", folder)
    raise SourceError(
        f"{folders[0]}: has no preprocessor_config.json, which says what the model hears of a sound; copy it there"
    )


PROCESSORS: Registry[ProcessorKind] = Registry(
    "processor",
    [
        ProcessorKind("", load_tokenizer),
        ProcessorKind(
            "sound", lambda *folders: SpeechProcessor(load_tokenizer(*folders), load_feature_extractor(*folders))
        ),
    ],
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
