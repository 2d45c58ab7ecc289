"""`attach`: makes the nonzeros of a sparse delta the parameters that a model trains."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shiradelta.errors import ArgumentError, DeltaError, TargetError
from shiradelta.format.draw import Draw
from shiradelta.hotswap.ranks import agreed
from shiradelta.models.saved import stored_views
from shiradelta.nonzeros.gate import Gate
from shiradelta.nonzeros.magnitude import RowMagnitudes
from shiradelta.nonzeros.patched import is_patched
from shiradelta.nonzeros.pruning import PRUNE_FROM
from shiradelta.select.shares import check_scope, exact_count_for, parse_sparsity
from shiradelta.train.adapters import read_adapter
from shiradelta.train.choose import Choice
from shiradelta.train.crew import check_same, crew_of
from shiradelta.train.given import OwnMask, WeightNames, avoided, own_mask
from shiradelta.train.gradients import Loss, own_loss
from shiradelta.train.masks import Ticket, find_mask
from shiradelta.train.pruning import check_pruning
from shiradelta.train.scalings import MakeScaling, gates_of, magnitudes_of
from shiradelta.train.targets import ALL_LINEAR, check_spread, check_weights, find_weights
from shiradelta.train.tuner import Tuner
from shiradelta.train.tuner_state import POSITIONS, are_positions
from shiradelta.util.arguments import BOOL, CALL, NUMBER, PATH, TEXT, TEXTS, WHOLE, ArgumentKind, checked
from shiradelta.util.deprecated import renamed_arguments
from shiradelta.util.progress import Progress

_DELTAS = ArgumentKind("a list of deltas", lambda value: isinstance(value, Sequence) and not isinstance(value, str))
_MODEL = ArgumentKind("a torch module", lambda value: isinstance(value, nn.Module))
_STATE = ArgumentKind("a state of Tuner.state_dict", lambda value: isinstance(value, Mapping))
_SHARE = ArgumentKind(
    "a share such as 0.01, or a pattern such as '1:64'", lambda v: isinstance(v, str) or NUMBER.holds(v)
)
_MASK = ArgumentKind("a mask's name, or a mapping of names to masks", lambda value: isinstance(value, str | Mapping))
_BATCHES = ArgumentKind("a list of batches", lambda value: isinstance(value, Iterable) and not isinstance(value, str))


@renamed_arguments(fall="prune_steps", fall_from="prune_from")
@checked(
    model=_MODEL,
    sparsity=_SHARE,
    mask=_MASK,
    targets=TEXTS,
    calibration=_BATCHES,
    loss=CALL,
    avoid=_DELTAS,
    start=PATH,
    prune_steps=WHOLE,
    prune_from=NUMBER,
    magnitude=BOOL,
)
def attach(
    model: nn.Module,
    sparsity: float | str = 0.01,
    mask: str | OwnMask = "rand",
    targets: str | Sequence[str] | None = None,
    calibration: Iterable[Any] = (),
    *,
    loss: Loss = own_loss,
    scope: str = "tensor",
    avoid: Sequence[Any] = (),
    seed: int = 0,
    start: str | os.PathLike[str] | None = None,
    prune_steps: int = 0,
    prune_from: float = PRUNE_FROM,
    magnitude: bool = False,
    progress: Progress | None = None,
) -> Tuner:
    """Makes the nonzeros of a sparse delta the only parameters of a model that train.

    The values are float32 parameters beside the weights they change, and start at zero.  Forward passes use the
    weights themselves, into which the values are written as soon as they change; nothing is cloned.  An optimizer's
    weight decay acts on the values, so it pulls towards the base weights, not zero.

    In a tensor-parallel model each process trains the nonzeros of its part; all processes call this alike
    (docs/distributed.md).

    Args:
        model: any torch module whose weights are float32, bfloat16 or float16.  Cast it before, not after.
        sparsity: share of the weights that change; or a pattern N:M ("1:64"), N of every M in a row.
        mask: which weights change: "snip" (largest weight x gradient), "grad" (largest gradient), "wm" (largest
            weight), "rand" (random), "struct" (rows and the diagonal), "rigsa" (what is left of a random change of all
            elements that is trained on the calibration batches and pruned, several times; values start at random
            behind a gate a weight, and `calibration` should be an epoch), a registered mask (docs/extend/mask.md); or
            your own: name -> bool tensor of the weight's shape, or flat integer positions.
        targets: weights to train: ends of names of layers or parameters, a regular expression, or "all-linear" (the
            default).
        calibration: some batches of the task, for masks that need gradients.
        loss: loss(model, batch) of a calibration batch; by default the loss that the model itself computes.
        scope: "tensor" keeps the share in every weight, "model" over all of them together.
        avoid: deltas whose weights must not be changed (`.shd` files, open deltas, positions by name), so that both
            can be fused without overlap.
        seed: the seed of random masks.
        start: an adapter whose mask and values to start from, instead of `mask`: a `.shd` file, or a PEFT SHiRA
            adapter's folder or file.
        prune_steps: optimizer steps over which the least important nonzeros are pruned, until the share is `sparsity`;
            0 keeps the mask.  60 % of all steps works well.  Training then finds the important weights itself, which
            gains several points of quality.  Pruning needs one optimizer for all values, preferably Adam or a variant,
            and neither FSDP nor ZeRO.  To resume such a run, keep `Tuner.state_dict()`: the model's own state dict does
            not record what was pruned.
        prune_from: pruning starts with this many times the sparsity; values and optimizer state take that many times
            the memory.
        magnitude: also train a length for each row of a matrix, as DoRA does (SHiRA-DoRA, arXiv:2407.16712): an
            element of the mask becomes m (W + D) / |W + D|, any other stays the base's, and the file is an ordinary
            delta.  A row is an output of a layer; its length is that of all its elements.
        progress: called with (what, done, total).

    Raises:
        ArgumentError: targets match nothing, the mask does not fit, or is not that of another process; the sparsity
            leaves a weight without an element; or magnitudes are asked for a weight without rows.
        DeltaError: there are no calibration batches.
        TargetError: a weight cannot be trained in place: it is quantised, on meta, or sharded by FSDP2; or it is spread
            over processes, and what is asked for needs whole weights; or another process refuses, or has ended.
        SourceError: the adapter to start from does not fit.
        ShiraDeltaError: gradients are not finite.
    """
    if any(map(is_patched, model.modules())):
        raise TargetError("the model, or a part of it, has a tuner already; detach() it first")
    if isinstance(calibration, Mapping | Tensor):
        raise ArgumentError("calibration is one batch; give a list of batches, such as [batch]")
    share, pattern = parse_sparsity(sparsity)
    check_scope(scope)
    if pattern is not None and scope == "model":
        raise ArgumentError("a pattern N:M holds in every row, so scope='model' has no effect; give a share")
    if start is not None and avoid:
        raise ArgumentError("an adapter to start from has its own mask, so avoid has no effect; give one of both")
    crew = crew_of(model.parameters())
    with agreed(crew, "attach()"):
        weights = find_weights(model, targets)
        if prune_steps or prune_from != PRUNE_FROM:
            check_pruning(prune_steps, prune_from, mask if start is None else None, pattern)
            if scope == "tensor":
                for name, weight in weights.items():
                    exact_count_for(share, weight.numel(), name)
        check_weights(model, weights)
        chosen_by = find_mask(mask, pattern, scope == "model") if isinstance(mask, str) and start is None else None
        check_spread(
            weights,
            {
                "magnitude=True": magnitude,
                "prune_steps=": bool(prune_steps),
                "a pattern N:M": pattern is not None,
                f"mask={mask!r}": chosen_by is not None
                and (chosen_by.gives != "positions" or chosen_by.needs_gradients),
            },
        )
        scaling: MakeScaling | None = magnitudes_of(model, weights) if magnitude else None
        in_checkpoint = stored_views(model, weights)
        names = WeightNames(weights, in_checkpoint)
        others = avoided(avoid, names)
        tickets: Mapping[str, Ticket] = {}
        draws: dict[str, Draw] = {}
        started = {} if start is None else read_adapter(start, weights, names, draws)
        if started:
            positions = {name: where.to(weights[name].device) for name, (where, _) in started.items()}
        elif isinstance(mask, str):
            row = chosen_by or find_mask(mask, pattern, scope == "model")
            choice = Choice(
                model=model,
                weights=weights,
                views=in_checkpoint,
                share=min(1.0, share * prune_from) if prune_steps else share,
                pattern=pattern,
                whole_model=scope == "model",
                avoid=others,
                seed=seed,
                batches=list(calibration) if row.needs_gradients else [],
                loss=loss,
                progress=progress or (lambda what, done, total: None),
                all_needed=targets not in (None, ALL_LINEAR),  # encoders have poolers that not every task uses
            )
            if row.search is not None:
                if magnitude:
                    raise ArgumentError(f"mask {mask!r} trains values behind a gate instead; leave magnitude out")
                tickets = row.search(choice)
                positions = {name: ticket.positions for name, ticket in tickets.items()}
                scaling = gates_of(weights)
            else:
                positions, draws = choice.by_name(mask)
        else:
            positions = own_mask(mask, weights, others)
        # In the model's order, whatever the mask's: gradients are clipped by sums in this order.
        positions = {name: positions[name] for name in weights if name in positions and positions[name].numel()}
        if not positions:
            raise DeltaError("the mask leaves no element of any target; give a larger sparsity, or avoid less")
    given = {name: (numbers,) for name, (_, numbers) in started.items()}
    check_same(crew, {name: (where.long(), *given.get(name, ())) for name, where in positions.items()})
    label = Path(start).name if start is not None else mask if isinstance(mask, str) else "own"
    about = {"mask": label, "seed": str(seed)} | ({"magnitude": "rows"} if magnitude else {})
    tuner = Tuner(model, {name: weights[name] for name in positions}, positions, in_checkpoint, about, scaling, draws)
    if prune_steps:
        tuner.prune(prune_steps, share, weights.values() if scope == "model" else None)
    with torch.no_grad():
        for name, (_, values) in started.items():
            tuner.start_from(name, values)
        for name in tuner.values.keys() & tickets.keys():
            tuner.values[name].copy_(tickets[name].values)
    tuner.write()
    return tuner


@checked(model=_MODEL, state=_STATE, mask=TEXT)
def reattach(model: nn.Module, state: Mapping[str, Tensor], mask: str = "own") -> Tuner:
    """Attaches to a model as a tuner was that gave a state, without choosing a mask anew.

    For runs that go on after a search for the mask that takes long (`mask="rigsa"`).

    Args:
        model: with the base weights.
        state: of `Tuner.state_dict`; a state of a run that prunes takes `attach` and `Tuner.load_state_dict`.
        mask: what the metadata of files call the mask.

    Raises:
        ArgumentError: the state is none, is amid pruning, is that of another model, or is another one than in another
            process.
        DeltaError: its tensors do not fit the model's.
        TargetError: a weight cannot be trained in place, or another process refuses, or has ended.
    """
    if any(map(is_patched, model.modules())):
        raise TargetError("the model, or a part of it, has a tuner already; detach() it first")
    crew = crew_of(model.parameters())
    with agreed(crew, "reattach()"):
        names = {name.removesuffix(POSITIONS) for name in state if name.endswith(POSITIONS)}
        kinds = {name.rpartition(".")[2] for name in state} - {"positions", "values", "draws"}
        if not names or len(kinds) > 1 or not kinds <= {Gate.name, RowMagnitudes.name}:
            raise ArgumentError(
                "the state is none of Tuner.state_dict, or is of a run that prunes; for such a run attach with"
                " prune_steps, and give the state to Tuner.load_state_dict"
            )
        weights = {name: weight for name, weight in model.named_parameters() if name in names}
        for name in sorted(names):
            if name not in weights or not are_positions(state[name + POSITIONS], weights[name].numel()):
                raise ArgumentError(f"the state's {name!r} does not fit the model; give the model that was trained")
        check_weights(model, weights)
        check_spread(weights, {f"the state's {kind}": True for kind in kinds})
        scaling = gates_of(weights) if Gate.name in kinds else magnitudes_of(model, weights) if kinds else None
        positions = {name: state[name + POSITIONS].to(weight.device) for name, weight in weights.items()}
    check_same(crew, {name: (tensor,) for name, tensor in state.items()})
    tuner = Tuner(model, weights, positions, stored_views(model, weights), {"mask": mask}, scaling)
    try:
        tuner.load_state_dict(state)
    except DeltaError:
        tuner.detach()
        raise
    return tuner
