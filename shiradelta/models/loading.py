"""Loads models and tokenizers with transformers, from folders only, never from a hub."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shiradelta.errors import SourceError
from shiradelta.models.embedder import with_head
from shiradelta.models.placement import place
from shiradelta.models.sentence import encoder_folder
from shiradelta.util.json_files import read_json
from shiradelta.util.optional import importing
from shiradelta.util.text import brief

#: How everything is loaded.  Without trust_remote_code the user would be asked, and a "y" would run the folder's code.
_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}

#: What to do with a model that the commands cannot load or run.
_FROM_PYTHON = "the commands do not run it: from Python, Fit(model=, forward=) fits any module, and attach trains it"


def pick_dtype(device: torch.device, stored: Iterable[str]) -> torch.dtype:
    """The dtype to compute in: bfloat16 on a GPU if all weights to fit are stored in it, else float32."""
    halves = device.type == "cuda" and all(dtype == "bfloat16" for dtype in stored)
    return torch.bfloat16 if halves else torch.float32


def load_model(base: Path, tuned: Path, devices: Sequence[torch.device], dtype: torch.dtype) -> nn.Module:
    """Loads the base's weights into the fine-tune's class, which may have another head than the base.

    Of a sentence-transformers model, the modules after the pooling are loaded, too (`Embedder`).

    Args:
        base: the base model's folder, or its weights' file.
        tuned: the fine-tune's folder or file; its config is used if it names an architecture.
        devices: where the weights go, as `place` moves them.  Those whose dtype stays are mapped from the files until
            then, so that the model need not fit into the CPU's memory.
        dtype: the weights' dtype in memory.

    Raises:
        SourceError: transformers cannot load the model, the vocabularies differ, or the model cannot be spread.
        MissingDependencyError: transformers is not installed.
    """
    loader, config = model_class(base, tuned)
    folder = encoder_folder(base)
    with _loading(folder):
        model: nn.Module = loader.from_pretrained(folder, config=config, dtype=dtype, use_safetensors=True, **_LOCAL)
    return place(with_head(model, base, tuned).to(dtype), devices)


def model_class(base: Path, tuned: Path) -> tuple[Any, Any]:
    """The class and the configuration of the fine-tune's model; arguments and errors are those of `load_model`."""
    transformers = _transformers()
    folder = encoder_folder(base)
    own, theirs = _config(folder), _config(encoder_folder(tuned))
    if own is None:
        raise SourceError(f"{folder}: has no config.json that names its architecture; give the base model's folder")
    config, config_folder = (own, folder) if theirs is None else (theirs, encoder_folder(tuned))
    if config.get("vocab_size") != own.get("vocab_size"):
        raise SourceError(
            f"{tuned}: its vocabulary has {config.get('vocab_size')} tokens, the base's {own.get('vocab_size')}; resize"
            " the base's embeddings first, or convert without fitting"
        )
    loader = class_of(config)
    if loader is None:
        named = config["architectures"]
        named = brief(str(named[0] if isinstance(named, list) else named), 80)
        raise SourceError(
            f"{config_folder}: transformers has no class {named}, which config.json names; upgrade transformers, or"
            f" correct the name; {_FROM_PYTHON}"
        )
    with _loading(config_folder):
        parsed = transformers.AutoConfig.from_pretrained(config_folder, **_LOCAL)
    return loader, parsed


def class_of(config: Mapping[str, Any]) -> Any:
    """The model class that a config.json names; None if it names none of transformers' models."""
    transformers = _transformers()
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        return None
    found = getattr(transformers, names[0], None)
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if is_model else None


@contextmanager
def _loading(folder: Path) -> Iterator[None]:
    """Turns transformers' errors into one line, and silences its remarks."""
    transformers = _transformers()
    try:
        with quiet(transformers):
            yield
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise SourceError(f"{folder}: transformers cannot load it ({_line(error)})") from None


def load_tokenizer(*folders: Path) -> Any:
    """The first tokenizer in the folders (or in the folder of a file).

    Raises:
        SourceError: there is none, or it cannot be loaded.
        MissingDependencyError: transformers is not installed.
    """
    transformers = _transformers()
    tried = [encoder_folder(folder) for folder in folders]
    for folder in tried:
        if any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
            try:
                with quiet(transformers):
                    return transformers.AutoTokenizer.from_pretrained(folder, **_LOCAL)
            except (OSError, ValueError, ImportError) as error:
                raise SourceError(f"{folder}: its tokenizer cannot be loaded ({_line(error)})") from None
    raise SourceError(f"{tried[0]}: has no tokenizer, which is needed to read texts; copy its tokenizer.json there")


def from_folder(auto: str, folder: Path) -> Any:
    """What an Auto class of transformers loads from a folder.

    Args:
        auto: the class, such as "AutoFeatureExtractor".
        folder: the folder.

    Raises:
        SourceError: it cannot be loaded.
        MissingDependencyError: transformers is not installed.
    """
    with _loading(folder):
        return getattr(_transformers(), auto).from_pretrained(folder, **_LOCAL)


def _config(folder: Path) -> dict[str, Any] | None:
    path = folder / "config.json"
    config = read_json(path) if path.exists() else None
    return config if isinstance(config, dict) and config.get("architectures") else None


def _transformers() -> Any:
    with importing("loading a model"):
        import transformers
    return transformers


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Silences transformers' progress bars, and its remarks on heads that the base lacks."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
