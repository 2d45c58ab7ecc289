"""SymLoRA (arXiv:2504.03719): a square weight changes by Q diag(L) Q^T, Q [n, r] and L [r].

The paper names no files, so keys are read in its own letters: `MODULE.Q` and `MODULE.Lambda`, also in small letters,
after `lora_`, `symlora_` or `sym_lora_`, and with PEFT's `.default` or `.weight` at their ends.  Shapes decide: Q has a
column for each number of L.  Another project of that name is refused by `peft_config`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial

import numpy as np

from shiradelta.errors import SourceError
from shiradelta.format.arithmetic import Float32, to_float32
from shiradelta.format.registry import ADD_DTYPES
from shiradelta.models.checkpoint import Checkpoint
from shiradelta.models.peft import ADAPTER, CONFIG, unwrap
from shiradelta.select.topk import Rows
from shiradelta.util.json_files import read_json
from shiradelta.util.text import brief

from .changes import add_changes
from .item import Skipped, SkipReason, Source
from .lora_converted import Change
from .lycoris import in_rows, no_remarks
from .peft_config import type_of
from .sources import SourceFiles, source

_KEY = re.compile(
    rf"(?P<module>.+?)\.(?:(?:sym_?)?lora_)?(?P<part>[Qq]|[Ll]ambda)(?:{re.escape(ADAPTER)})?(?:\.weight)?"
)
#: What a configuration calls a factor on the change; the paper has none.
_FACTORS = ("alpha", "lora_alpha", "scale", "scaling")


def _modules(checkpoint: Checkpoint) -> tuple[dict[str, dict[str, str]], list[str]]:
    """(module -> its parts' keys, "Q" and "Lambda"; other keys).

    Raises:
        SourceError: two keys are the same part of a module.
    """
    modules: dict[str, dict[str, str]] = {}
    others = []
    for key in checkpoint:
        match = _KEY.fullmatch(key)
        if match is None:
            others.append(key)
            continue
        parts = modules.setdefault(unwrap(match["module"]), {})
        part = match["part"].capitalize()
        if part in parts:
            raise SourceError(f"{checkpoint.root}: {parts[part]!r} and {key!r} are the same part; remove one")
        parts[part] = key
    return modules, others


def _recognises(files: SourceFiles) -> bool:
    keys = [key for key in files.checkpoint if _KEY.fullmatch(key)]
    if not keys:
        return False
    modules, _ = _modules(files.checkpoint)
    return any(_fits(files.checkpoint, parts) is None or _is_meant(parts) for parts in modules.values())


def _is_meant(parts: Mapping[str, str]) -> bool:
    """Whether a module has Q and a Lambda with a capital letter, which no model calls its own, whatever the shapes."""
    return len(parts) == 2 and re.search(r"[._]Lambda(?:\.|$)", parts["Lambda"]) is not None


@source(
    "symlora",
    "A SymLoRA: MODULE.Q [n, r] and MODULE.Lambda [r], which change a square weight by Q diag(Lambda) Q^T.",
    _recognises,
    order=17,
)
def open_symlora(files: SourceFiles) -> Source:
    """The changes of all modules."""
    checkpoint, result = files.checkpoint, Source()
    _refuse_factor(checkpoint)
    modules, others = _modules(checkpoint)
    for key in others:
        why = "is neither Q nor Lambda of a SymLoRA; save it apart"
        result.add(key, Skipped(SkipReason.UNSUPPORTED, why))
    changes: dict[str, Change] = {}
    for module, parts in modules.items():
        if (misfit := _fits(checkpoint, parts)) is not None:
            result.add(module, misfit.called(*parts.values(), f"{module}.weight"))
        else:
            side = checkpoint[parts["Q"]].shape[0]
            changes[f"{module}.weight"] = Change(partial(_rows, checkpoint, parts), (side, side))
    called = {f"{module}.weight": [module, *parts.values()] for module, parts in modules.items()}
    add_changes(files, changes, called, result)
    return result


def _refuse_factor(checkpoint: Checkpoint) -> None:
    """Refuses a configuration beside the file that says more than the paper: another type, or a factor."""
    where = checkpoint.shards[0].file.parent / CONFIG
    about = read_json(where) if where.is_file() else {}
    if not isinstance(about, dict):
        raise SourceError(f"{where}: is not a configuration; get it again")
    if (kind := type_of(about)) is not None:
        raise SourceError(
            f"{where}: says {brief(kind, 80)}, and the weights beside it are a SymLoRA's; put the {CONFIG} that was"
            " saved with the weights beside them, or take it away"
        )
    for key in _FACTORS:
        if about.get(key) is not None:
            raise SourceError(
                f"{where}: has {key} {brief(repr(about[key]), 80)}, which may multiply Q diag(Lambda) Q^T or not, as"
                " the paper has no such factor; multiply Lambda by what the trainer used, and take it out"
            )


def _fits(checkpoint: Checkpoint, parts: Mapping[str, str]) -> Skipped | None:
    """Why the parts of a module are no Q and Lambda; None if they are."""
    if len(parts) < 2:
        return Skipped(SkipReason.PARTS, f"only {' '.join(parts)} of Q and Lambda is there")
    q, values = checkpoint[parts["Q"]], checkpoint[parts["Lambda"]]
    for key in parts.values():
        if checkpoint[key].dtype.name not in ADD_DTYPES:
            why = f"{key!r} is {checkpoint[key].dtype.name}; factors are {', '.join(ADD_DTYPES)}"
            return Skipped(SkipReason.PARTS, why)
    if len(q.shape) == 2 and q.numel and len(values.shape) == 1 and q.shape[1] == values.numel:
        return None
    why = f"Q of shape {list(q.shape)} and Lambda of {list(values.shape)} are not [n, r] and [r]"
    return Skipped(SkipReason.PARTS, why)


@no_remarks
def _rows(checkpoint: Checkpoint, parts: Mapping[str, str]) -> Rows:
    """(Q Lambda) Q^T in float32, a few rows at a time: scaled on the left, as the product of a LoRA is."""
    q, values = (
        to_float32(checkpoint.bits(parts[part]), checkpoint[parts[part]].dtype.name) for part in ("Q", "Lambda")
    )
    q = q.reshape(checkpoint[parts["Q"]].shape)
    scaled: Float32 = q * values
    right = np.ascontiguousarray(q.T)

    @no_remarks
    def product(start: int, stop: int) -> Float32:
        made: Float32 = scaled[start:stop] @ right
        return made

    return in_rows(product, len(q), (len(q), len(q)))
