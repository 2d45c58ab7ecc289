"""sentence-transformers' folders: the modules that modules.json lists, each with a folder of its own."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

from shiradelta.errors import SourceError
from shiradelta.util.json_files import read_json
from shiradelta.util.text import brief

LIST = "modules.json"
#: Where a Router lists the modules in its subfolders; config.json before version 5.
_ROUTERS = ("router_config.json", "config.json")
#: How the folder of a module is called, and how its weights' files end.
_NUMBERED, _WEIGHTS = re.compile(r"\d+_\w+"), (".safetensors", ".bin")
#: Bytes of the path of a module; a longer one may be none that a file system can have.
_LONGEST_PATH = 255
#: Classes of modules that change nothing where texts are run: the others have their own place there.
_PLAIN = ("Transformer", "Pooling", "Dropout")
#: Activations of a Dense module that are known by their names.
ACTIVATIONS = ("Tanh", "Identity", "ReLU", "GELU", "SiLU", "Sigmoid", "LeakyReLU", "ELU", "Mish", "Softplus")
#: Classes of modules that run others, which are in their folder; of models; what holds a Transformer's model.
_ROUTING, _MODELS, _WRAPPERS = ("Router", "Asym"), {"SentenceTransformer", "SparseEncoder"}, ("auto_model", "model")
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
        raise SourceError(f"{listing}: is not a list of modules ({brief(str(error), 200)}); get it again") from None
    every = [inner for module in found for inner in (module, *_routed(folder, module))]
    return tuple({module.path: module for module in reversed(every)}.values())[::-1]


def saved_prefixes(model: Any) -> dict[str, str]:
    """What stands before the names of a live SentenceTransformer's tensors -> what does in its folder, as it is saved.

    Empty for another model.
    """
    if not _MODELS.intersection(kind.__name__ for kind in type(model).__mro__):
        return {}
    found: dict[str, str] = {}

    def add(prefix: str, folder: str, module: Any) -> None:
        children = {name for name, _ in module.named_children()} if type(module).__name__ == "Transformer" else set()
        wrapper = next((f"{name}." for name in _WRAPPERS if name in children), "")
        found[prefix + wrapper] = folder

    for place, (number, module) in enumerate(model.named_children()):
        kind = type(module).__name__
        in_root = place == 0 and getattr(module, "save_in_root", kind == "Transformer")
        folder = "" if in_root else f"{place}_{kind}/"
        if kind not in _ROUTING:
            add(f"{number}.", folder, module)
            continue
        for route, modules in module.sub_modules.items():
            for at, inner in enumerate(modules):
                add(f"{number}.sub_modules.{route}.{at}.", f"{folder}{route}_{at}_{type(inner).__name__}/", inner)
    return found


def unlisted_modules(folder: Path) -> list[Path]:
    """Folders with weights that are called like modules (`2_Dense`) where no modules.json lists any."""
    if not folder.is_dir() or (folder / LIST).exists():
        return []
    numbered = (path for path in sorted(folder.iterdir()) if _NUMBERED.fullmatch(path.name) and path.is_dir())
    return [path for path in numbered if any(file.suffix in _WEIGHTS for file in path.iterdir())]


def folder_of(path: Path) -> Path:
    """A model's folder, given the folder or its weights' file."""
    return path if path.is_dir() else path.parent


def encoder_folder(path: Path) -> Path:
    """The folder of the model that transformers loads, given a model's folder or file."""
    folder = folder_of(path)
    encoders = [module.path for module in modules_of(folder) or () if module.kind == "Transformer"]
    return folder / encoders[0] if encoders else folder


@dataclass(frozen=True)
class HeadModule:
    """A module that follows the pooling.

    Attributes:
        number: its name in memory.
        path: its folder, relative to the model's.
        kind: "Dense", "LayerNorm" or "Normalize".
        settings: its config.json.
    """

    number: str
    path: str
    kind: str
    settings: dict[str, Any] = field(compare=False)


def head_of(folder: Path) -> list[HeadModule]:
    """The modules after the pooling, where one of them changes the embedding; none if one cannot be run."""
    modules = modules_of(folder) or ()
    kinds = [module.kind for module in modules]
    if "Pooling" not in kinds or _unknown(folder, modules):
        return []
    after = [module for module in modules[kinds.index("Pooling") + 1 :] if module.kind not in _PLAIN]
    if all(module.kind == "Normalize" for module in after):  # as embeddings are anyway
        return []
    return [_head_module(folder, module) for module in after]


def modules_not_run(*folders: Path) -> list[str]:
    """The modules that fits and training on texts do not run, by path, of the first folder with modules.json."""
    for folder in folders:
        home = folder_of(folder)
        if (modules := modules_of(home)) is not None:
            return [module.path or module.kind for module in _unknown(home, modules)]
    return []


def _unknown(folder: Path, modules: Sequence[SentenceModule]) -> list[SentenceModule]:
    """All modules that matter, if one of them cannot be run."""
    kinds = [module.kind for module in modules]
    pooled = kinds.index("Pooling") if "Pooling" in kinds else len(kinds)
    rest = [(place > pooled, module) for place, module in enumerate(modules) if module.kind not in _PLAIN]
    if all(after and _can_be_run(_head_module(folder, module)) for after, module in rest):
        return []
    return [module for _, module in rest if module.kind != "Normalize"]


def _head_module(folder: Path, module: SentenceModule) -> HeadModule:
    config = folder / module.path / "config.json"
    about = read_json(config) if config.is_file() else None
    number = module.path.partition("_")[0]
    return HeadModule(number, module.path, module.kind, about if isinstance(about, dict) else {})


def _can_be_run(module: HeadModule) -> bool:
    """Whether a module is known, down to its settings."""
    about, place = module.settings, "sentence_embedding"
    if not module.number.isdecimal():
        return False
    if module.kind == "Dense":
        activation = str(about.get("activation_function") or "torch.nn.Tanh")
        inside = activation.startswith("torch.nn.") and activation.rpartition(".")[2] in ACTIVATIONS
        ends = {about.get("module_input_name") or place, about.get("module_output_name") or place}
        return inside and ends == {place}
    return module.kind in ("LayerNorm", "Normalize")


def _module(path: Any, kind: Any, listing: Path) -> SentenceModule:
    """A module, as a file lists it, which is untrusted: the folder may come from anywhere."""
    if not isinstance(path, str) or not isinstance(kind, str):
        raise TypeError(f"module {path!r} of type {kind!r}")
    windows = PureWindowsPath(path)
    outside = windows.anchor or any(part[0] == "." for part in windows.parts)
    if outside or "\0" in path or len(path.encode(errors="replace")) > _LONGEST_PATH:
        raise SourceError(f"{listing}: {path!r} is no folder of a module within the model's; get it again")
    return SentenceModule("/".join(windows.parts), kind.rpartition(".")[2])


def _routed(folder: Path, module: SentenceModule) -> Iterator[SentenceModule]:
    """The modules that a Router runs; none for another module."""
    for name in _ROUTERS if module.kind in _ROUTING else ():
        listing = folder / module.path / name
        about = read_json(listing) if listing.is_file() else None
        types = about.get("types") if isinstance(about, dict) else None
        if isinstance(types, dict):
            for path, kind in types.items():
                inner = _module(path, kind, listing)
                yield SentenceModule(module.prefix + inner.path, inner.kind)
            return
