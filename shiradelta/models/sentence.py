"""sentence-transformers' folders: the modules that modules.json lists, each with a folder of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from shiradelta.errors import SourceError
from shiradelta.util.json_files import read_json

LIST = "modules.json"
#: Where a Router lists the modules in its subfolders; config.json before version 5.
_ROUTERS = ("router_config.json", "config.json")
#: Classes of modules that fits and training on texts run, or that change nothing in them.
_RUN = ("Transformer", "Pooling", "Normalize", "Dropout")
#: Classes of modules that always have weights.
_WEIGHTY = (
    "Transformer",
    "Dense",
    "CNN",
    "LSTM",
    "LayerNorm",
    "WeightedLayerPooling",
    "WordEmbeddings",
    "WordWeights",
    "StaticEmbedding",
    "SparseStaticEmbedding",
    "SparseAutoEncoder",
    "CLIPModel",
)


@dataclass(frozen=True)
class SentenceModule:
    """A module of a sentence-transformers model.

    Attributes:
        path: its folder, relative to the model's; empty for the model's own.
        kind: its class, without the Python module.
    """

    path: str
    kind: str

    @property
    def prefix(self) -> str:
        """What stands before the names of its tensors."""
        return f"{self.path}/" if self.path else ""

    @property
    def has_weights(self) -> bool:
        """Whether its class always has weights."""
        return self.kind in _WEIGHTY


def modules_of(folder: Path) -> tuple[SentenceModule, ...] | None:
    """The modules of a sentence-transformers model in their order, a Router's among them; None for another model.

    Raises:
        SourceError: modules.json cannot be read, or leads out of the folder.
    """
    listing = folder / LIST
    if not listing.is_file():
        return None
    try:
        found = [_module(entry["path"], entry["type"], listing) for entry in read_json(listing)]
    except (KeyError, TypeError) as error:
        raise SourceError(f"{listing}: is not a list of modules ({error}); get it again") from None
    every = [inner for module in found for inner in (module, *_routed(folder, module))]
    return tuple({module.path: module for module in reversed(every)}.values())[::-1]


def modules_not_run(*folders: Path) -> list[str]:
    """The modules that fits and training on texts do not run, by path, of the first folder with modules.json."""
    for folder in folders:
        modules = modules_of(folder if folder.is_dir() else folder.parent)
        if modules is not None:
            return [module.path or module.kind for module in modules if module.kind not in _RUN]
    return []


def _module(path: Any, kind: Any, listing: Path) -> SentenceModule:
    """A module, as a file lists it, which is untrusted: the folder may come from anywhere."""
    if not isinstance(path, str) or not isinstance(kind, str):
        raise TypeError(f"module {path!r} of type {kind!r}")
    windows = PureWindowsPath(path)
    if windows.anchor or any(part[0] == "." for part in windows.parts) or "\0" in path:
        raise SourceError(f"{listing}: {path!r} is no folder of a module within the model's; get it again")
    return SentenceModule("/".join(windows.parts), kind.rpartition(".")[2])


def _routed(folder: Path, module: SentenceModule) -> Iterator[SentenceModule]:
    """The modules that a Router runs; none for another module."""
    for name in _ROUTERS if module.kind in ("Router", "Asym") else ():
        listing = folder / module.path / name
        about = read_json(listing) if listing.is_file() else None
        types = about.get("types") if isinstance(about, dict) else None
        if isinstance(types, dict):
            for path, kind in types.items():
                inner = _module(path, kind, listing)
                yield SentenceModule(module.prefix + inner.path, inner.kind)
            return
