"""Finds the weights of a model to train, and checks that they can be trained."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from shiradelta.errors import ArgumentError, DeltaError, TargetError
from shiradelta.format import registry
from shiradelta.models.layers import is_conv1d
from shiradelta.models.live import live_tensors
from shiradelta.models.memory import is_sharded, own_part
from shiradelta.models.refusals import Refusal, RefusalKind, sharded_by_fsdp

#: What to do with distributed weights.
_BEFORE = "attach to the whole model, then call fully_shard"
ALL_LINEAR = "all-linear"
#: Number of similar names that a message lists.
_NEAR = 5


def find_weights(model: nn.Module, targets: str | Sequence[str] | None) -> dict[str, nn.Parameter]:
    """The weights to train, by the first name that the model has for each.

    Args:
        model: the model.
        targets: names of modules or parameters, or ends of names ("q_proj", "attn.out_proj", "q_proj.bias",
            "experts.gate_up_proj"); or a regular expression that matches whole names; or "all-linear", the default:
            every linear layer but the output.  A module stands for its matrices, a norm for its weight.

    Raises:
        DeltaError: a target matches nothing; the message lists similar names.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    config = getattr(model, "config", None)
    quantised = getattr(config, "quantization_config", None) is not None
    hint = "; the model is quantised: train on the unquantised one, and quantise the result" if quantised else ""
    if targets is None or targets == ALL_LINEAR:
        found = _linear_weights(model)
        if not found:
            raise ArgumentError("the model has no linear layer" + (hint or "; name what to train: targets=[...]"))
        return _first_names(model, found)
    offers = dict(_of_modules(model))
    offers |= {name: [name] for name in parameters}
    wanted: list[str] = []
    for target in [targets] if isinstance(targets, str) else targets:
        if isinstance(targets, str):
            fits = [name for name in offers if _pattern(target).fullmatch(name)]
        else:
            fits = [name for name in offers if name == target or name.endswith("." + target)]
        if not fits:
            raise DeltaError(
                f"target {target!r} is neither a layer nor a weight of the model; {_near(target, offers)}{hint}"
            )
        wanted += [name for offer in fits for name in offers[offer]]
    if not wanted:
        raise ArgumentError(
            "targets is empty; name what to train, or leave it out for all linear layers but the output's"
        )
    return _first_names(model, [parameters[name] for name in wanted])


def check_weights(model: nn.Module, weights: dict[str, nn.Parameter]) -> None:
    """Checks that weights can be trained in place.

    Raises:
        TargetError: a weight is quantised, distributed, on meta, expanded, or not a float.
    """
    targets = live_tensors(model)
    sharded = {id(parameter) for parameter in sharded_by_fsdp(model)}
    for name in weights:
        target = targets[name]
        if target.refusal is not None:
            raise TargetError(f"tensor {name!r} {_for_training(target.refusal)}")
        if id(weights[name]) in sharded:
            raise TargetError(f"tensor {name!r} is sharded by FSDP2, which takes no new values; {_BEFORE}")
        if target.dtype not in registry.ADD_DTYPES:
            raise TargetError(
                f"tensor {name!r} has elements of {weights[name].dtype}: quantised, or more precise than float32;"
                " train on the model in bfloat16, float16 or float32, and quantise the result"
            )
        if weights[name].is_inference():
            raise TargetError(
                f"tensor {name!r} was made in inference mode, and takes no gradient; load the model outside of it"
            )
        if not own_part(weights[name]).is_contiguous():
            raise TargetError(f"tensor {name!r} is not contiguous; call .contiguous() on it first")


def check_spread(weights: Mapping[str, nn.Parameter], uses: Mapping[str, bool]) -> None:
    """Checks that weights that tensor parallelism has spread over processes can be trained as is asked for.

    Args:
        weights: by name.
        uses: what needs whole weights in each process -> whether it is asked for.

    Raises:
        TargetError: a weight is spread, and something needs it whole, or it is spread in stripes.
    """
    from torch.distributed.tensor import Replicate, Shard

    for name, weight in weights.items():
        if not is_sharded(weight):
            continue
        placements: Any = weight.placements  # type: ignore[attr-defined]
        if not all(type(one) in (Shard, Replicate) for one in placements):
            raise TargetError(
                f"tensor {name!r} is a DTensor with the placements {placements}, of which Shard and Replicate can be"
                " trained; leave it out of the targets"
            )
        for what, is_used in uses.items():
            if is_used:
                raise TargetError(
                    f"tensor {name!r} is a DTensor, and {what} needs whole weights in each process; attach to a whole"
                    " model in one process, and give its Tuner.positions as mask="
                )


def _for_training(refusal: Refusal) -> str:
    """The message for training, which has its own remedies for some kinds of tensors."""
    remedies = {
        RefusalKind.DISTRIBUTED: _BEFORE,
        RefusalKind.QUANTISED: "train on the unquantised model, and quantise the result",
    }
    return str(replace(refusal, remedy=remedies.get(refusal.kind, refusal.remedy)))


def _linear_weights(model: nn.Module) -> list[nn.Parameter]:
    output = getattr(model, "get_output_embeddings", lambda: None)()
    kinds = (nn.Linear,)
    return [
        module.weight
        for module in model.modules()
        if (isinstance(module, kinds) or is_conv1d(module))
        and module is not output
        and isinstance(module.weight, nn.Parameter)
    ]


def _of_modules(model: nn.Module) -> Iterable[tuple[str, list[str]]]:
    """(name of a module, its matrices, or its weight if it has no matrix)."""
    for name, module in model.named_modules():
        own = {key: p for key, p in module._parameters.items() if p is not None}
        chosen = [key for key, p in own.items() if p.dim() > 1] or [key for key in own if key == "weight"]
        if chosen and name:
            yield name, [f"{name}.{key}" for key in chosen]


def _first_names(model: nn.Module, wanted: Sequence[nn.Parameter]) -> dict[str, nn.Parameter]:
    """Parameters by their first names, in the model's order; tied weights once."""
    ids = {id(parameter) for parameter in wanted}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in ids}


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise DeltaError(
            f"target {text!r} is not a regular expression ({error}); give one, or a list of names"
        ) from None


def _near(target: str, offers: Iterable[str]) -> str:
    """Lists the ends of names that are most similar to the target and have as many parts."""
    parts = target.count(".") + 1
    ends = dict.fromkeys(".".join(offer.split(".")[-parts:]) for offer in offers)
    near = difflib.get_close_matches(target, ends, _NEAR, 0.4) or [end for end in ends if not end.isdigit()][:_NEAR]
    return "similar names are " + ", ".join(near)
