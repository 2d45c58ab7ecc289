"""Adapters of MLX-LM: `adapters.safetensors` or `.npz`, with the scale in adapter_config.json beside them.

A linear layer has `lora_a` [in, rank] and `lora_b` [rank, out], an embedding [rows, rank] and [rank, columns], a stack
of experts [experts, rank, in] and [experts, out, rank].  A DoRA has `m`, a length for each output or row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shiradelta.errors import SourceError
from shiradelta.io.recognise import Wanted
from shiradelta.models.checkpoint import Checkpoint, open_checkpoint
from shiradelta.models.peft import CONFIG
from shiradelta.models.safetensors import Slot
from shiradelta.util.json_files import read_json
from shiradelta.util.text import brief

from .full import read_full
from .item import Source
from .lora import read_lora
from .lora_scale import Scale, number
from .npz import NpzCheckpoint
from .sources import SourceFiles, source
from .translated import Translated, constant, layers_of, transposed

#: The adapter in a folder, by preference.
_FILES = ("adapters.safetensors", "adapters.npz")
_KEY = re.compile(r"(?P<module>.+)\.(?P<part>lora_a|lora_b|m)")
#: Ends of names of embeddings, whose factors stand in the order of their rows.
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in", "embeddings")
#: The experts of a layer, of which MLX-LM makes a stack, and what Mixtral calls their layers.
_STACK, _EXPERT = ".switch_mlp.", ".experts.{}."
_MIXTRAL, _MIXTRAL_LAYERS = "block_sparse_moe", {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
#: PEFT's ends of names.
A, B = ".lora_A.weight", ".lora_B.weight"
#: What MLX-LM's configuration says of the type of a fine-tune.
_TYPES = ("lora", "dora", "full")


def _file_of(path: Path) -> Path | None:
    """The adapter's file: the path itself, or in a folder; None if it is not MLX-LM's."""
    if path.is_dir():
        config = path / CONFIG
        about = read_json(config) if config.is_file() else {}
        if not isinstance(about, dict) or "peft_type" in about:
            return None
        return next((file for name in _FILES if (file := path / name).is_file()), None)
    if path.suffix == ".npz":
        return path if path.is_file() else None
    return path if path.suffix == ".safetensors" and path.is_file() else None


def _recognises(files: SourceFiles) -> bool:
    file = _file_of(files.path)
    if file is None:
        return False
    return files.path.is_dir() or any(_factor(key) for key in _open(file, files))


def _factor(key: str) -> bool:
    match = _KEY.fullmatch(key)
    return match is not None and match["part"] != "m"


def _open(file: Path, files: SourceFiles) -> Checkpoint:
    if file.suffix == ".npz":
        return NpzCheckpoint(file)
    return files.checkpoint if file == files.path else open_checkpoint(file, Wanted.SOURCE)


@source(
    "mlx",
    "A LoRA, DoRA or full fine-tune of MLX-LM: its folder, or adapters.safetensors or adapters.npz.",
    _recognises,
    options=["alpha"],
    order=14,
)
def open_mlx(files: SourceFiles, alpha: float | None = None) -> Source:
    """All layers of an adapter."""
    file = _file_of(files.path)
    if file is None:
        raise SourceError(f"{files.path}: holds none of {', '.join(_FILES)}; give the folder that MLX-LM saved")
    source, where = _open(file, files), file.parent / CONFIG
    about = read_json(where) if where.is_file() else {}
    if not isinstance(about, dict):
        raise SourceError(f"{where}: is not a configuration of MLX-LM; get it again")
    kind = about.get("fine_tune_type") or "lora"
    if kind not in _TYPES:
        raise SourceError(f"{where}: fine_tune_type is {brief(repr(kind), 80)}, none of {', '.join(_TYPES)}")
    if kind == "full":
        return read_full(source, files)
    modules: dict[str, dict[str, str]] = {}
    for key in source:
        match = _KEY.fullmatch(key)
        if match is None:
            raise SourceError(
                f"{file}: {brief(repr(key), 120)} is neither a factor nor a length; save the adapter again"
            )
        modules.setdefault(match["module"], {})[match["part"]] = key
    slots: dict[str, Slot] = {}
    for module, parts in modules.items():
        slots |= dict(_translated(source, module, parts, kind))
    if alpha is None:
        factor = _scale(about, where)
        factors = {name: slot for name, slot in slots.items() if name.endswith(A)}
        slots |= {
            f"{name.removesuffix(A)}.alpha": constant(one, factor * one.shape[0]) for name, one in factors.items()
        }
    return read_lora(Translated(source, slots), files, Scale({}, alpha, where))


def _scale(about: Mapping[str, Any], where: Path) -> float:
    """The factor on the product of a module's factors.

    Raises:
        SourceError: the configuration does not say it, or may mean either of two.
    """
    settings = about.get("lora_parameters")
    remedy = "or give --alpha (the scale times the rank)"
    if not isinstance(settings, dict) or "scale" not in settings:
        raise SourceError(f"{where}: does not say the scale (lora_parameters); put the adapter's own there, {remedy}")
    if "alpha" in settings:
        raise SourceError(
            f"{where}: has a scale and an alpha; MLX-LM before 0.19 multiplies by scale alpha / rank, and later by the"
            f" scale alone; take the alpha out, {remedy}"
        )
    return number(settings["scale"], f"{where}: scale")


def _translated(source: Checkpoint, module: str, parts: Mapping[str, str], kind: str) -> Iterator[tuple[str, Slot]]:
    """A module's tensors under PEFT's names; those of a stack of experts as many modules.

    Raises:
        SourceError: some are lacking, or of another number of dimensions.
    """
    wanted = {"lora_a", "lora_b"} | ({"m"} if kind == "dora" else set())
    if set(parts) != wanted:
        raise SourceError(
            f"{source.root}: {module!r} has {' '.join(sorted(parts))}, and a {kind} of MLX-LM"
            f" {' '.join(sorted(wanted))}; put the {CONFIG} that was saved with the adapter beside it"
        )
    a, b = source[parts["lora_a"]], source[parts["lora_b"]]
    if len(a.shape) == len(b.shape) == 3 and a.shape[0] == b.shape[0] and kind == "lora":
        for expert, factors in enumerate(zip(layers_of(a), layers_of(b), strict=True)):
            yield from zip((_expert(module, expert) + part for part in (A, B)), factors, strict=True)
        return
    if len(a.shape) != 2 or len(b.shape) != 2:
        shapes = f"{list(a.shape)} and {list(b.shape)}"
        raise SourceError(f"{source.root}: {module!r} has factors of shapes {shapes}, which are no pair; get it again")
    embedding = module.endswith(_EMBEDDINGS)
    yield module + A, b if embedding else transposed(a)
    yield module + B, a if embedding else transposed(b)
    if "m" in parts:
        yield f"{module}.lora_magnitude_vector", source[parts["m"]]


def _expert(module: str, expert: int) -> str:
    """The name of an expert's layer, of the stack that MLX-LM makes of them."""
    path, _, layer = module.rpartition(_STACK)
    if not path:
        return f"{module}.{expert}"
    layer = _MIXTRAL_LAYERS.get(layer, layer) if path.endswith(_MIXTRAL) else layer
    return f"{path}{_EXPERT.format(expert)}{layer}"
