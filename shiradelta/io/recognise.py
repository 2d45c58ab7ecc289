"""What a path is that is not what was asked for, so that an error can say so and tell what to do.

Each kind of thing is a row of `THINGS`.  The rows are asked only after something went wrong, or read a few bytes.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path

from shiradelta.errors import FormatError, SourceError
from shiradelta.format import registry
from shiradelta.util.json_files import read_json
from shiradelta.util.lfs import LFS_POINTER, LFS_REMEDY, LFS_WHAT
from shiradelta.util.registry import Registry


class Wanted(Enum):
    """What a path should have been: BASE and SOURCE are what `convert` reads."""

    DELTA = auto()
    FOLDER = auto()
    WEIGHTS = auto()
    BASE = auto()
    SOURCE = auto()
    TEXTS = auto()


@dataclass(frozen=True)
class Thing:
    """The row of something that a user may give by mistake.

    Attributes:
        name: what it is called.
        recognises: whether a path is such a thing.
        what: what it is, to follow the path in a message.
        remedies: what was wanted -> what to do; what is not here is no mistake.  `{path}` stands for the path.
    """

    name: str
    recognises: Callable[[Path], bool]
    what: str
    remedies: Mapping[Wanted, str]


THINGS: Registry[Thing] = Registry("thing")


def explain(path: Path, wanted: Wanted, *, packed: bool = False) -> str | None:
    """A message that says what a path is and what to do; None if nothing is known about it.

    Args:
        path: the path.
        wanted: what it should be.
        packed: whether a quantised model will do.
    """
    thing = _recognise(path, wanted, (_is_quantised,) if packed else ())
    return None if thing is None else f"{_shown(path)}: {thing.what}; {_remedy(thing, wanted, path)}"


def explain_refusal(error: FormatError, path: Path) -> None:
    """Puts into the error of a refused `.shd` file what the file is instead, where that is known."""
    if error.reason in ("bad_magic", "truncated") and (thing := _recognise(path, Wanted.DELTA)) is not None:
        error.detail, error.remedy = f"it {thing.what}", _remedy(thing, Wanted.DELTA, path)


def _remedy(thing: Thing, wanted: Wanted, path: Path) -> str:
    """What to do, with the path as a shell takes it."""
    return thing.remedies[wanted].replace("{path}", shlex.quote(str(path)))


def _shown(path: Path) -> str:
    """A path as it was given: one that is a URL has lost a slash."""
    return re.sub(r"^(https?|hf|s3|gs):/(?!/)", r"\1://", path.as_posix()) if _is_url(path) else str(path)


def is_patched(folder: Path) -> bool:
    """Whether deltas are on a model's folder, which then is let through, so that they can be reverted."""
    return any((folder / ".shiradelta" / "undo").glob("*.shd"))


def _recognise(path: Path, wanted: Wanted, allowed: Container[Callable[[Path], bool]] = ()) -> Thing | None:
    mistakes = (each for each in THINGS.values() if wanted in each.remedies and each.recognises not in allowed)
    return next((thing for thing in mistakes if _holds(thing, path)), None)


def _holds(thing: Thing, path: Path) -> bool:
    try:
        return thing.recognises(path)
    except (OSError, ValueError, SourceError):  # unreadable, which is another error
        return False


def starts_with(path: Path, magic: bytes) -> bool:
    """Whether a path is a file with these first bytes."""
    if not path.is_file():
        return False
    with open(path, "rb") as stream:
        return stream.read(len(magic)) == magic


def _has_only(path: Path, *suffixes: str) -> bool:
    """Whether a folder has such files and no safetensors, nor its subfolders."""
    if not path.is_dir() or any(path.glob("*.safetensors")) or any(path.glob("*/*.safetensors")):
        return False
    return any(file.suffix in suffixes for file in path.iterdir())


def _is_zip_with(path: Path, end: str) -> bool:
    if not starts_with(path, b"PK\x03\x04"):
        return False
    import zipfile  # takes as long to import as the rest of the reader

    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(end) for name in archive.namelist())
    except (zipfile.BadZipFile, NotImplementedError):
        return False


def _is_dash(path: Path) -> bool:
    return str(path) == "-" and not path.exists()


def _is_url(path: Path) -> bool:
    return bool(re.match(r"(?:https?|hf|s3|gs):/", path.as_posix())) and not path.exists()


def _is_hub_page(path: Path) -> bool:
    return bool(re.match(r"https?:/+(?:www\.)?(?:huggingface\.co|hf\.co)(?:/|$)", path.as_posix())) and _is_url(path)


def _is_hub_id(path: Path) -> bool:
    if path.exists() or path.parent.exists() or path.suffix in (registry.SUFFIX, ".safetensors"):
        return False
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path.as_posix()))


def _is_gguf(path: Path) -> bool:
    return starts_with(path, b"GGUF") or _has_only(path, ".gguf")


def _is_arrays(path: Path) -> bool:
    return starts_with(path, b"\x93NUMPY") or _is_zip_with(path, ".npy")


def _is_safetensors(path: Path) -> bool:
    if not path.is_file():
        return False
    with open(path, "rb") as stream:
        head = stream.read(9)
    return len(head) == 9 and head[8:] in (b"{", b" ") and int.from_bytes(head[:8], "little") <= path.stat().st_size - 8


#: Suffixes of pickles.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def is_pickle(path: Path) -> bool:
    """Whether a file is a pickle of PyTorch, or a folder has its weights in such files only."""
    if path.is_file():
        named = path.suffix in PICKLES or starts_with(path, b"\x80")  # a safetensors file may start so, too
        return (named and not _is_safetensors(path)) or _is_zip_with(path, "/data.pkl")
    return _has_only(path, *PICKLES)


def _is_json(path: Path) -> bool:
    return path.suffix in (".json", ".jsonl") and (starts_with(path, b"{") or starts_with(path, b"["))


def _is_delta(path: Path) -> bool:
    return starts_with(path, registry.MAGIC)


def _is_adapter(path: Path) -> bool:
    """An adapter's weights, or a folder with its configuration and no other weights."""
    if path.is_file():
        return path.name.startswith("adapter_model") and (path.parent / "adapter_config.json").is_file()
    return (path / "adapter_config.json").is_file() and all(
        file.name.startswith("adapter_model") for file in path.glob("*.safetensors")
    )


#: Key of a quantisation's configuration -> values with which each element is a float8 weight, divided by a scale.
#: Every other quantisation is taken for one that packs weights.
_FLOAT8 = {
    "quant_method": ("fp8", "fbgemm_fp8", "finegrained_fp8"),
    "format": ("float-quantized",),  # compressed-tensors
    "quant_algo": ("FP8", "FP8_PB_WO"),  # ModelOpt
}
#: How a message ends about a model whose stored bits are not its weights.
UNQUANTISED = "give the unquantised model, and quantise the result"
#: What is wrong with a source without any change.
UNCHANGED = "nothing in it changes the base: it is the base itself, or was not trained; give the fine-tune"


def _is_quantised(path: Path) -> bool:
    # A folder with deltas on it is let through, so that they can be reverted; an adapter's config.json is its base's.
    config = (path if path.is_dir() else path.parent) / "config.json"
    if path.name.startswith("adapter_") or not config.is_file() or is_patched(config.parent):
        return False
    about = read_json(config)
    quantised = about.get("quantization_config") if isinstance(about, dict) else None
    if not isinstance(quantised, dict):
        return False
    return bool(quantised) and not any(quantised.get(key) in values for key, values in _FLOAT8.items())


_GET = "download it, and give the path of the file or folder"
_HUB = "if it is a hub's id, download it (hf download {path} --local-dir FOLDER) and give the path of the folder"
#: What is downloaded elsewhere if it is on the Hub: files of deltas and sources.
_NOT_DOWNLOADED = tuple(wanted for wanted in Wanted if wanted not in (Wanted.DELTA, Wanted.SOURCE))
#: Models, and whatever has tensors.
_MODELS = (Wanted.FOLDER, Wanted.WEIGHTS, Wanted.BASE)
_TENSORS = (*_MODELS, Wanted.SOURCE)
_ORDER = "give the model's folder; where a delta is given, too, it comes after the folder"
_CONVERT = "`shiradelta convert {path}` makes a .shd file of it"

for _row in (
    Thing("stdin", _is_dash, "stands for stdin, which is not read here", dict.fromkeys(Wanted, "give a path")),
    Thing(
        "page of the Hub",
        _is_hub_page,
        "is the address of a page",
        dict.fromkeys((Wanted.DELTA, Wanted.SOURCE, *_MODELS), "give the name on the Hub, user/repo or user/repo/file"),
    ),
    Thing("URL", _is_url, "is a URL, and only local paths and names on the Hub are read", dict.fromkeys(Wanted, _GET)),
    Thing("hub id", _is_hub_id, "no such file or folder", dict.fromkeys(_NOT_DOWNLOADED, _HUB)),
    Thing(
        "Git LFS pointer",
        lambda path: starts_with(path, LFS_POINTER),
        LFS_WHAT,
        dict.fromkeys(Wanted, LFS_REMEDY),
    ),
    Thing(
        "delta",
        _is_delta,
        "is a .shd file, a delta and no model",
        {
            **dict.fromkeys(_MODELS, _ORDER),
            Wanted.BASE: "give the folder or file of the base model",
            Wanted.SOURCE: "give -o FILE (out=) to make another of it",
        },
    ),
    Thing(
        "GGUF",
        _is_gguf,
        "has its weights in a GGUF, llama.cpp's format",
        dict.fromkeys(_TENSORS, "give the safetensors that it was made from") | {Wanted.DELTA: "give a .shd file"},
    ),
    Thing(
        "NumPy file",
        _is_arrays,
        "is NumPy's (.npz or .npy), not a safetensors file",
        dict.fromkeys(_TENSORS, "save its arrays with safetensors.numpy.save_file first")
        | {Wanted.DELTA: "shiradelta.save_delta makes a .shd file of arrays"},
    ),
    Thing(
        "pickle",
        is_pickle,
        "has its weights in a pickle of PyTorch (.bin, .pt, .ckpt), not in safetensors",
        dict.fromkeys((Wanted.FOLDER, Wanted.WEIGHTS, Wanted.DELTA), "save it as safetensors first"),
    ),
    Thing(
        "adapter",
        _is_adapter,
        "is an adapter (adapter_config.json is with it), not a model",
        dict.fromkeys(_MODELS, "give the model that it was made for") | {Wanted.DELTA: _CONVERT},
    ),
    Thing(
        "quantised model",
        _is_quantised,
        "belongs to a quantised model (quantization_config in its config.json), whose stored bits are not the weights",
        dict.fromkeys(_TENSORS, UNQUANTISED),
    ),
    Thing(
        "JSON file",
        _is_json,
        "is a JSON file, which holds no weights",
        dict.fromkeys(_TENSORS, "give the model's folder") | {Wanted.DELTA: "give a .shd file"},
    ),
    Thing(
        "safetensors file",
        _is_safetensors,
        "is a safetensors file, not a .shd file",
        {Wanted.DELTA: _CONVERT},
    ),
    Thing(
        "folder",
        Path.is_dir,
        "is a folder, not a .shd file",
        {
            Wanted.DELTA: "give a .shd file (`shiradelta verify {path}` says which deltas are on a model,"
            " `shiradelta convert {path} --base MODEL` makes a .shd file of a fine-tune)"
        },
    ),
):
    THINGS.add(_row)
