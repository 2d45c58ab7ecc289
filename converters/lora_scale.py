"""The scale of a LoRA's modules, and other parts of its configuration."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from shiradelta.errors import SourceError
from shiradelta.models.checkpoint import Checkpoint
from shiradelta.models.peft import CONFIG, MODULES_TO_SAVE, WEIGHTS
from shiradelta.util.json_files import read_json
from shiradelta.util.text import brief

from .patterns import PatternTable
from .peft_folder import PRODUCTS, check_type

#: Initialisations that also change the base, by the start of their names.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
#: PEFT's types whose factors keep the configuration's rank; AdaLoRA's do not.
_FIXED_RANK = ("LORA", "LOHA", "LOKR")
#: The configuration's key that lists parameters that are adapted by name.
PARAMETERS = "target_parameters"
_UNSUPPORTED = {
    "use_dora": "a DoRA, whose magnitudes need the base's norms; merge it first",
    "layer_replication": "an adapter of repeated layers (layer_replication); merge it first",
    "alora_invocation_tokens": "an activated LoRA, which depends on the text; no change of weights does the same",
    "use_bdlora": "a BD-LoRA, whose factors are blocks on a diagonal; merge it first",
    "use_qalora": "a QALoRA, whose factors act on averages of inputs; merge it first",
    "arrow_config": "an Arrow router of adapters, which depends on the text; no change of weights does the same",
    "kasa_config": "a KaSA, which cuts what is small out of the base; merge it first",
}
#: Keys whose value depends on the module, by patterns.
_PATTERNS = ("alpha_pattern", "rank_pattern")


def _is_whole(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


#: Key -> (whether a value that is not null is right, what it should be).
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_whole, "a positive integer"),
    "init_r": (_is_whole, "a positive integer"),
    "rank_pattern": (lambda found: isinstance(found, dict), "ranks by name"),  # AdaLoRA's are lists
    "alpha_pattern": (lambda found: isinstance(found, dict), "alphas by name"),
    MODULES_TO_SAVE: (_is_names, "a list of names"),
    PARAMETERS: (_is_names, "a list of names"),
    "ensure_weight_tying": (lambda found: isinstance(found, bool), "true or false"),
    "fan_in_fan_out": (lambda found: isinstance(found, bool), "true or false"),
    "use_rslora": (lambda found: isinstance(found, bool), "true or false"),
}


@dataclass(frozen=True)
class Scale:
    """The scales of a LoRA's modules, from its configurations and the user's alpha.

    Attributes:
        configs: component -> its configuration; "" for all components.
        alpha: the user's, which overrides the others.
        where: the file of the configurations.
    """

    configs: Mapping[str, Mapping[str, Any]]
    alpha: float | None
    where: Path = Path(CONFIG)

    @classmethod
    def of(cls, checkpoint: Checkpoint, alpha: float | None) -> Scale:
        """Reads adapter_config.json beside a checkpoint, or the checkpoint's metadata.

        A file under another name than PEFT's may lie beside another adapter's configuration, so its metadata win.

        Raises:
            SourceError: the configuration cannot be read, or names a method that cannot be converted.
        """
        file = checkpoint.shards[0].file
        beside = file.parent / CONFIG
        own = _in_metadata(checkpoint.shards[0].metadata, file)
        from_beside = beside.exists() and (file.name == WEIGHTS or not own)
        where: Path = beside if from_beside else file
        configs = {"": read_json(beside)} if from_beside else own
        for config in configs.values():
            if not isinstance(config, dict):
                raise SourceError(f"{where}: is not a PEFT configuration; get it again")
            _check(config, where)
        return cls(configs, alpha, where)

    def config(self, module: str) -> Mapping[str, Any]:
        """The configuration of a module's component."""
        return self.configs.get(self._component(module), {})

    def _component(self, module: str) -> str:
        component = module.partition(".")[0]
        return component if component in self.configs else ""

    def _of_pattern(self, key: str, module: str, default: Any) -> Any:
        """A module's value by the patterns under a key of its configuration; `default` where none matches."""
        table = self._tables.get((self._component(module), key))
        return default if table is None else table.value(module, default)

    @cached_property
    def _tables(self) -> dict[tuple[str, str], PatternTable]:
        return {
            (component, key): PatternTable(config.get(key) or {}, f"{self.where}: {key}")
            for component, config in self.configs.items()
            for key in _PATTERNS
        }

    def alpha_of(self, module: str, tensor: float | None) -> float | None:
        """A module's alpha; None if it is unknown.  `tensor` is the value of its alpha tensor."""
        if self.alpha is not None or tensor is not None:
            return self.alpha if self.alpha is not None else tensor
        config = self.config(module)
        alpha = self._of_pattern("alpha_pattern", module, config.get("lora_alpha", config.get("alpha")))
        return None if alpha is None else number(alpha, f"{module}: alpha")

    def __call__(self, module: str, rank: int, tensor: float | None) -> float:
        """The factor on B A of one module; `tensor` is the value of its alpha tensor.

        Raises:
            SourceError: the alpha would be that of a configuration with another rank.
        """
        if self.alpha is None and tensor is None:
            self._check_rank(module, rank)
        alpha = self.alpha_of(module, tensor)
        return (rank if alpha is None else alpha) / (math.sqrt(rank) if self.config(module).get("use_rslora") else rank)

    def _check_rank(self, module: str, rank: int) -> None:
        config = self.config(module)
        configured = self._of_pattern("rank_pattern", module, config.get("r"))
        if config.get("peft_type") in _FIXED_RANK and type(configured) is int and configured != rank:
            raise SourceError(
                f"{module}: has rank {rank}, and {CONFIG} says {configured}, so it is another adapter's; put the right"
                " one beside the file, or give --alpha"
            )

    def adaptive(self, module: str) -> float:
        """The factor on B (A * E) of AdaLoRA, which divides by its initial rank.

        Raises:
            SourceError: the configuration does not say that rank.
        """
        config = self.config(module)
        began = config.get("init_r")
        if not isinstance(began, int) or began < 1:
            raise SourceError(f"{module}: is of an AdaLoRA, whose scale is in {CONFIG}; put that beside the file")
        alpha = self.alpha_of(module, None)
        return (alpha if alpha is not None and alpha > 0 else began) / (began + 1e-5)

    def whole_rank(self, module: str) -> int | None:
        """The rank that PEFT divides alpha by, if the factors do not show it; None without PEFT's configuration."""
        config = self.config(module)
        rank = self._of_pattern("rank_pattern", module, config.get("r"))
        return rank if isinstance(rank, int) and rank > 0 and self.of_peft(module) else None

    def of_peft(self, module: str) -> bool:
        """Whether a module's configuration is PEFT's."""
        return "peft_type" in self.config(module)

    def tokens(self, module: str) -> list[int] | None:
        """The trained rows of an embedding; None if the configuration does not list them."""
        rows = self.config(module).get("trainable_token_indices")
        if isinstance(rows, dict):
            rows = next((given for name, given in rows.items() if f".{module}".endswith(f".{name}")), None)
        if not isinstance(rows, list) or not all(type(row) is int and row >= 0 for row in rows):
            return None
        return rows

    def parameters(self, module: str) -> list[str]:
        """Names that parameters of a module have in it, of those that PEFT adapts by name."""
        targets = (target.rpartition(".") for target in self.config(module).get(PARAMETERS) or ())
        return list(dict.fromkeys(leaf for path, _, leaf in targets if not path or f".{module}".endswith(f".{path}")))

    def ties(self, module: str) -> bool:
        """Whether PEFT gives tied weights one pair of factors."""
        return bool(self.config(module).get("ensure_weight_tying"))

    def peft_version(self, module: str) -> tuple[int, ...] | None:
        """The version of PEFT that wrote a module's configuration; None if it does not say, or of no release."""
        version = str(self.config(module).get("peft_version") or "")
        return tuple(map(int, version.split("."))) if re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})+", version) else None

    def orientation(self, module: str) -> bool | None:
        """Whether the base stores the weight as [in, out] (GPT-2's Conv1D); None if unknown."""
        return self.config(module).get("fan_in_fan_out")

    def adds(self, name: str) -> bool:
        """Whether PEFT's configuration says that a tensor belongs to a module that is saved whole."""
        if not self.of_peft(name):
            return False
        module = name.rpartition(".")[0]
        return any(f".{saved}." in f".{module}." for saved in self.config(name).get(MODULES_TO_SAVE) or ())


def number(value: Any, what: str) -> float:
    """Converts a value to a finite float.

    Raises:
        SourceError: the value is not a finite number; `what` names it in the message.
    """
    try:
        result = float(value)
    except (TypeError, ValueError, OverflowError):
        result = math.nan
    if not math.isfinite(result):
        raise SourceError(f"{what} {brief(repr(value), 80)} is not a finite number; give --alpha")
    return result


def _check(config: Mapping[str, Any], where: Path) -> None:
    check_type(config, where, *PRODUCTS)
    for key, (is_right, what) in _FIELDS.items():
        value = config.get(key)
        if value is not None and not is_right(value):
            raise SourceError(f"{where}: {key} is {brief(repr(value), 80)}, not {what}; get it again")
    for key, why in _UNSUPPORTED.items():
        if config.get(key):
            raise SourceError(f"{where}: {why}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise SourceError(
            f"{where}: init_lora_weights {start!r} changed the base too; save it as a plain LoRA"
            " (PEFT: path_initial_model_for_weight_conversion) first"
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
