"""PEFT's adapter_config.json: what each of its keys does to the weights, and whether an adapter has its own one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from shiradelta.errors import SourceError
from shiradelta.models.checkpoint import Checkpoint
from shiradelta.models.peft import CONFIG, MODULES_TO_SAVE, WEIGHTS
from shiradelta.util.json_files import read_json
from shiradelta.util.text import brief

#: PEFT's types that are converted.
TYPES = ("LORA", "ADALORA", "LOHA", "LOKR", "SHIRA")
#: The configuration's key that lists parameters that are adapted by name.
PARAMETERS = "target_parameters"
#: What to do with an adapter that cannot be converted.
MERGE = "merge it with PEFT and convert the merged model"


def _is_whole(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 31


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_any(value: Any) -> bool:
    return True


#: Keys that are read -> (whether a value that is not null is right, what it should be).  `_is_any`: where it is read.
READ: dict[str, tuple[Callable[[Any], bool], str]] = {
    "peft_type": (_is_any, "a type of PEFT's"),
    "peft_version": (_is_any, "a version"),
    "r": (_is_whole, "an integer from 1 to 2^31 - 1"),
    "init_r": (_is_whole, "an integer from 1 to 2^31 - 1"),
    "lora_alpha": (_is_any, "a number"),
    "alpha": (_is_any, "a number"),
    "rank_pattern": (_is_dict, "ranks by name"),  # AdaLoRA's are lists
    "alpha_pattern": (_is_dict, "alphas by name"),
    "init_lora_weights": (lambda found: isinstance(found, bool | str), "true, false or a name"),
    MODULES_TO_SAVE: (_is_names, "a list of names"),
    PARAMETERS: (_is_names, "a list of names"),
    "trainable_token_indices": (_is_any, "rows of an embedding"),
    "ensure_weight_tying": (_is_bool, "true or false"),
    "fan_in_fan_out": (_is_bool, "true or false"),
    "use_rslora": (_is_bool, "true or false"),
    "use_dora": (_is_bool, "true or false"),
    "lora_bias": (_is_bool, "true or false"),
}
#: Keys that are refused where they are set -> what the adapter is.
REFUSED = {
    "layer_replication": "an adapter of repeated layers (layer_replication)",
    "alora_invocation_tokens": "an activated LoRA, which depends on the text; no change of weights does the same",
    "use_bdlora": "a BD-LoRA, whose factors are blocks on a diagonal",
    "use_qalora": "a QALoRA, whose factors act on averages of inputs, and which PEFT cannot merge; train a plain LoRA",
    "arrow_config": "an Arrow router of adapters, which depends on the text; no change of weights does the same",
    "kasa_config": "a KaSA, which cuts what is small out of the base",
}
#: Files that a trainer puts beside the factors of a LoRA -> what they say of it.
BESIDE = {
    "init_weights.safetensors": "holds the factors that were taken from the base before training (SymLoRA with SVD"
    " initialisation and a frozen A), so the factors beside it fit a changed base only; subtract the first product from"
    " the base, merge there, and convert the merged model",
    "residual_R.safetensors": "holds connections among the adapter's layers, and no change of weights does the same",
}
#: Why keys are not read -> the keys.
IGNORED = {
    "the names and shapes in the weights' file say it": (
        *("auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "layers_pattern"),
        *("layers_to_transform", "megatron_config", "megatron_core", "revision", "target_modules", "task_type"),
        *("decompose_both", "decompose_factor", "use_effective_conv2d"),
    ),
    "it says how the weights in the file began": (
        *("corda_config", "eva_config", "init_weights", "loftq_config", "lora_ga_config", "mask_type", "random_seed"),
    ),
    "it acts in training only": (
        *("beta1", "beta2", "deltaT", "lora_dropout", "module_dropout", "monteclora_config", "orth_reg_weight"),
        *("rank_dropout", "rank_dropout_scale", "target_r", "tfinal", "tinit", "total_step", "velora_config"),
    ),
    "it says how PEFT runs": ("inference_mode", "merge_weights", "runtime_config"),
    "it belongs to a key that is refused": ("qalora_group_size",),
}
_KNOWN = {*READ, *REFUSED, *(key for keys in IGNORED.values() for key in keys)}

#: Parts of the names of quantised models.
_QUANTISED = re.compile(
    r"(?i)(?:^|[-_./])(?:bnb|[248]-?bit|int[48]|gptq|awq|nf4|fp8|nvfp4|mxfp4|gguf|exl2)(?:$|[-_./])"
)
#: Initialisations that leave the base as it is, and those that also change it, by their start.
_KEEPS_BASE = ("gaussian", "eva", "orthogonal", "mica")
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def read_configs(checkpoint: Checkpoint) -> tuple[dict[str, dict[str, Any]], Path]:
    """Reads adapter_config.json beside a checkpoint, or the checkpoint's metadata.

    A file under another name than PEFT's may lie beside another adapter's configuration, so its metadata win.

    Returns:
        Component -> its configuration ("" for all components); and the file that they are from.

    Raises:
        SourceError: a configuration cannot be read, or it or a file beside it is of a method that cannot be converted.
    """
    file = checkpoint.shards[0].file
    for name, why in BESIDE.items():
        if (file.parent / name).exists():
            raise SourceError(f"{file.parent / name}: {why}")
    beside = file.parent / CONFIG
    own = _in_metadata(checkpoint.shards[0].metadata, file)
    from_beside = beside.exists() and (file.name == WEIGHTS or not own)
    where: Path = beside if from_beside else file
    configs = {"": read_json(beside)} if from_beside else own
    for config in configs.values():
        if not isinstance(config, dict):
            raise SourceError(f"{where}: is not a PEFT configuration; get it again")
        _check(config, where)
    return configs, where


def quantised_base(configs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A note, if configurations name a quantised model as the one that was trained on."""
    named = {str(config.get("base_model_name_or_path") or "") for config in configs.values()}
    return [
        f"was trained on {brief(name, 120)}, whose weights are rounded; on unrounded ones its outputs differ a little"
        for name in sorted(named)
        if _QUANTISED.search(name)
    ]


def type_of(config: Mapping[str, Any]) -> str | None:
    """PEFT's type of an adapter; None if its configuration does not say it."""
    found = config.get("peft_type")
    return str(found).rpartition(".")[2].upper() if found else None


def check_type(config: Mapping[str, Any], where: object) -> None:
    """Refuses a PEFT configuration of a type that cannot be converted.

    Raises:
        SourceError: its type is none of `TYPES`.
    """
    found = type_of(config)
    if found is not None and found not in TYPES:
        raise SourceError(
            f"{where}: is of type {brief(found, 80)}; only {', '.join(TYPES[:-1])} and {TYPES[-1]} can be converted:"
            f" {MERGE}"
        )


def check_parts(config: Mapping[str, Any], parts: Collection[str], key: str, where: object) -> None:
    """Refuses weights beside the configuration of another type of adapter.

    Args:
        config: the configuration.
        parts: the parts that a module has in the file: "A", "B", "E", "values", "indices", or LyCORIS' names.
        key: the key of one of them.
        where: the configuration's file.

    Raises:
        SourceError: the configuration's type does not save these parts.
    """
    said, held = type_of(config), _type_with(parts)
    if said is not None and said != held:
        raise SourceError(
            f"{where}: says {said}, and {brief(repr(key), 120)} is a weight of {held}; put the {CONFIG} that was saved"
            " with the weights beside them"
        )


def _type_with(parts: Collection[str]) -> str:
    """PEFT's type of adapter that saves these parts of a module."""
    for start, found in (("hada_", "LOHA"), ("lokr_", "LOKR"), ("E", "ADALORA"), ("values", "SHIRA"), ("ind", "SHIRA")):
        if any(part.startswith(start) for part in parts):
            return found
    return "LORA"


def _check(config: Mapping[str, Any], where: Path) -> None:
    check_type(config, where)
    for key, (is_right, what) in READ.items():
        value = config.get(key)
        if value is not None and not is_right(value):
            raise SourceError(f"{where}: {key} is {brief(repr(value), 80)}, not {what}; get it again")
    for key, why in REFUSED.items():
        if config.get(key):
            raise SourceError(f"{where}: {why}{'' if ';' in why else f'; {MERGE}'}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise SourceError(
            f"{where}: init_lora_weights {start!r} changed the base too; save it as a plain LoRA"
            " (PEFT: path_initial_model_for_weight_conversion) first"
        )
    unknown = {key: value for key, value in config.items() if value and key not in _KNOWN}
    if isinstance(start, str) and start.lower() not in _KEEPS_BASE:
        unknown["init_lora_weights"] = start
    for key, value in unknown.items():
        raise SourceError(
            f"{where}: sets {brief(repr(key), 80)} to {brief(repr(value), 80)}, and what that does to the weights is"
            f" unknown here; {MERGE}"
        )


def _in_metadata(metadata: Mapping[str, str], file: Path) -> dict[str, dict[str, Any]]:
    """The configurations in a file's own metadata: diffusers' JSON, or kohya's pair."""
    if "lora_adapter_metadata" in metadata:
        try:
            found = json.loads(metadata["lora_adapter_metadata"])
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise SourceError(f"{file}: lora_adapter_metadata in it is not a configuration in JSON; get it again")
        configs: dict[str, dict[str, Any]] = {}
        for key, value in found.items():
            component, _, name = key.rpartition(".")  # "unet.lora_alpha"
            configs.setdefault(component, {})[name] = value
        return configs if len(configs) > 1 else dict(zip([""], configs.values(), strict=False))
    try:
        return {"": {"lora_alpha": float(metadata["ss_network_alpha"])}}
    except (KeyError, ValueError):  # kohya writes None where each module has an alpha
        return {}
