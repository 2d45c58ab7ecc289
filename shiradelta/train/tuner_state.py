"""The state of a tuner as named tensors, to resume training from."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from shiradelta.errors import DeltaError
from shiradelta.format.draw import Draw
from shiradelta.hotswap.ranks import Ranks, agreed
from shiradelta.train.crew import check_same
from shiradelta.train.pruning import Pruner
from shiradelta.train.tuned import TunedWeight, check_draws, whole

#: Ends the key of a weight's positions.
POSITIONS = ".positions"
#: Ends the key of the draws that they are of: int64 [views, 2], the bits of the seed, and the cells; 0 for no draw.
DRAWS = ".draws"
#: Key of the optimizer steps that pruning has done, beside the weights' names; and its name in states of 0.1.
_STEP, _STEP_OF_0_1 = "prune_step", "fall"
_NO_DRAW = Draw(0, 0)


def are_positions(given: object, numel: int) -> bool:
    """Whether these are positions, one or more, in a weight of so many elements."""
    if not isinstance(given, Tensor) or given.dtype not in (torch.int32, torch.int64) or given.dim() != 1:
        return False
    return bool(given.numel() and given[0] >= 0 and given[-1] < numel and (given.diff() > 0).all())


def state_of(tuned: Mapping[str, TunedWeight], pruner: Pruner | None) -> dict[str, Tensor]:
    """What `Tuner.state_dict` says."""
    state = {}
    for name, one in tuned.items():
        state[name + POSITIONS] = one.whole_positions().cpu()
        state[f"{name}.values"] = one.whole_values().cpu()
        if one.draws:
            of_views = [one.draws.get(view.name, _NO_DRAW) for view in one.views]
            rows = np.array([(draw.seed, draw.cells) for draw in of_views], np.uint64)
            state[name + DRAWS] = torch.from_numpy(rows.view(np.int64))
        if one.scaling is not None and one.scales is not None:
            state[f"{name}.{one.scaling.name}"] = whole(one.scales).detach().float().cpu()
        if pruner is not None:
            state[f"{name}.kept"] = one.kept.cpu().clone()
    if pruner is not None:
        state[_STEP] = torch.tensor(pruner.step)
    return state


def restore(tuned: Mapping[str, TunedWeight], pruner: Pruner | None, state: Mapping[str, Tensor], crew: Ranks) -> None:
    """Restores a state of `state_of`, in all processes; changes nothing if it does not fit.

    Raises:
        DeltaError: the state is that of other weights, or does not fit them.
        ArgumentError: another process has another state.
        TargetError: another process refuses its state.
    """
    if _STEP_OF_0_1 in state:
        state = {_STEP if name == _STEP_OF_0_1 else name: tensor for name, tensor in state.items()}
    with agreed(crew, "load_state_dict()"):
        _check(tuned, pruner, state)
    check_same(crew, {name: (tensor,) for name, tensor in state.items()})
    for name, one in tuned.items():
        scales = None if one.scaling is None else state[f"{name}.{one.scaling.name}"]
        one.load(name, state[f"{name}.positions"], state[f"{name}.values"], state.get(f"{name}.kept"), scales)
        one.draws = _draws_in(state, name, one)
    if pruner is not None:
        pruner.step = int(state[_STEP])


def _draws_in(state: Mapping[str, Tensor], name: str, one: TunedWeight) -> dict[str, Draw]:
    """The draws that the positions of a weight are of, by the names of the views' tensors."""
    rows = state.get(name + DRAWS, torch.zeros(0, 2, dtype=torch.int64)).cpu().numpy().view(np.uint64)
    draws = [Draw(*row) for row in rows.tolist()]
    return {view.name: draw for view, draw in zip(one.views, draws, strict=False) if draw.cells}


def _check(tuned: Mapping[str, TunedWeight], pruner: Pruner | None, state: Mapping[str, Tensor]) -> None:
    if (_STEP in state) is (pruner is None):
        raise DeltaError("the state is that of a run that prunes, and this one does not, or the other way round")
    parts = ("positions", "values") if pruner is None else ("positions", "values", "kept")
    expected = {f"{name}.{part}" for name in tuned for part in parts}
    expected |= {f"{name}.{one.scaling.name}" for name, one in tuned.items() if one.scaling is not None}
    expected |= {name + DRAWS for name in tuned} & set(state)
    expected |= set() if pruner is None else {_STEP}
    if expected != set(state):
        odd = sorted(expected ^ set(state))[0]
        raise DeltaError(f"the state is that of other weights: {odd!r} is on one side only; attach with its targets")
    for name, one in tuned.items():
        positions, values = state[f"{name}.positions"], state[f"{name}.values"]
        kept = state.get(f"{name}.kept", values)
        sound = are_positions(positions, one.numel) and positions.shape == values.shape == kept.shape
        sound = sound and (kept is values or kept.dtype == torch.bool)
        draws = state.get(name + DRAWS)
        sound = sound and (draws is None or (draws.dtype, draws.shape) == (torch.int64, (len(one.views), 2)))
        if one.scaling is not None and one.scales is not None:
            sound = sound and state[f"{name}.{one.scaling.name}"].shape == one.scales.shape
        if not sound:
            raise DeltaError(f"the state of {name!r} does not fit a weight of {one.numel} elements")
        try:
            check_draws(_draws_in(state, name, one), one.views, positions.long().cpu().numpy())
        except DeltaError as error:
            raise DeltaError(f"the state of {name!r} is damaged: {error}") from None
    if pruner is not None and (state[_STEP].numel() != 1 or state[_STEP].is_floating_point()):
        raise DeltaError(f"the state's {_STEP!r} is not a number of steps; take a state that Tuner.state_dict gave")
