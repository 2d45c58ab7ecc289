"""The scale of a LoRA's modules, and other parts of its configuration."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from shiradelta.errors import SourceError
from shiradelta.models.checkpoint import Checkpoint
from shiradelta.models.peft import CONFIG, MODULES_TO_SAVE
from shiradelta.util.text import brief

from .patterns import PatternTable
from .peft_config import PARAMETERS, read_configs, type_of

#: PEFT's types whose factors keep the configuration's rank; AdaLoRA's do not.
_FIXED_RANK = ("LORA", "LOHA", "LOKR")
#: Keys whose value depends on the module, by patterns.
_PATTERNS = ("alpha_pattern", "rank_pattern")


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
        """As the configuration beside a checkpoint or in its metadata says (`read_configs`).

        Raises:
            SourceError: the configuration cannot be read, or names a method that cannot be converted.
        """
        configs, where = read_configs(checkpoint)
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
        if type_of(config) in _FIXED_RANK and type(configured) is int and configured != rank:
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
        return rank if isinstance(rank, int) and 0 < rank < 1 << 31 and self.of_peft(module) else None

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

    def check_magnitudes(self, module: str, held: bool) -> None:
        """Refuses a DoRA's magnitudes where PEFT's configuration knows of none, and the lack of those it knows of.

        Raises:
            SourceError: the two do not go together.
        """
        said = bool(self.config(module).get("use_dora"))
        if self.of_peft(module) and said != held:
            holds = "has" if held else "lacks"
            raise SourceError(
                f"{self.where}: use_dora is {str(said).lower()}, and {module!r} {holds} magnitudes; put the {CONFIG}"
                " that was saved with the weights beside them"
            )

    def check_bias(self, module: str, held: bool) -> None:
        """As `check_magnitudes`, for what a LoRA adds to a layer's bias."""
        said = bool(self.config(module).get("lora_bias"))
        if self.of_peft(module) and said != held:
            holds = "has" if held else "lacks"
            raise SourceError(
                f"{self.where}: lora_bias is {str(said).lower()}, and {module!r} {holds} a bias; put the {CONFIG} that"
                " was saved with the weights beside them"
            )

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
