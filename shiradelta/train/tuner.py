"""`attach`: the nonzeros of a sparse delta become what a model trains."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from shiradelta.errors import DeltaError, TargetError
from shiradelta.exports import peft_shira
from shiradelta.format.delta import TensorDelta
from shiradelta.io.writer import weighing, writing
from shiradelta.models.views import View, views
from shiradelta.nonzeros.patched import is_patched, patch, unpatch
from shiradelta.nonzeros.pruning import PRUNE_FROM
from shiradelta.nonzeros.weight import WeightNonzeros, flat
from shiradelta.select.shares import check_scope, exact_count_for, parse_sparsity
from shiradelta.train import masks
from shiradelta.train.adapters import read_adapter
from shiradelta.train.choose import Choice, OwnMask, avoided, own_mask
from shiradelta.train.falling import Falling, check_fall
from shiradelta.train.gradients import Loss, Tell, own_loss
from shiradelta.train.targets import ALL_LINEAR, check_weights, find_weights
from shiradelta.train.tuned import SUFFIX, Tuned, compact, holders, whole

#: In a tuner's state, beside the weights' names.
_FALL = "fall"


def attach(
    model: nn.Module,
    sparsity: float | str = 0.01,
    mask: str | OwnMask = "snip",
    targets: str | Sequence[str] | None = None,
    calibration: Iterable[Any] = (),
    *,
    loss: Loss = own_loss,
    scope: str = "tensor",
    avoid: Sequence[Any] = (),
    seed: int = 0,
    start: str | os.PathLike[str] | None = None,
    fall: int = 0,
    fall_from: float = PRUNE_FROM,
    progress: Tell | None = None,
) -> Tuner:
    """Makes the nonzeros of a sparse delta the only parameters of a model that train.

    The values are float32 parameters, zero at first, beside the weights they change.  Forward passes use the
    weights themselves, in which the values are written as soon as they change; nothing is cloned.  An optimizer's
    weight decay acts on the values: it draws the weights to the base's, not to zero.

    Args:
        model: any torch module whose weights are float32, bfloat16 or float16; to be cast before, not after.
        sparsity: the share of the weights that change; or a pattern N:M ("1:64"), n of every m in a row.
        mask: which ones: "struct", "rand", "wm" (by magnitude), "grad", "snip" (by magnitude times gradient), or
            your own: name -> bool tensor of the weight's shape, or flat integer positions.
        targets: which weights; ends of names of layers or parameters, a regular expression, or "all-linear"
            (the default).
        calibration: some batches of the task, for "grad" and "snip".
        loss: loss(model, batch) of a calibration batch; by default the one that the model itself gives.
        scope: "tensor" keeps the share in every weight, "model" over all of them together.
        avoid: adapters whose weights are not to be touched (`.shd` files, open deltas, positions by name), so that
            they fuse without meeting.
        seed: of "rand".
        start: an adapter whose mask and values to begin with, in place of `mask`: a `.shd` file, or a PEFT SHiRA
            adapter's folder or file.
        fall: optimizer steps, six tenths of all for example, in which the density falls to `sparsity`: the mask is
            only where it begins, and training finds which weights matter, which is worth several points of quality.
            With Adam or its kin, one optimizer for all; not with FSDP or ZeRO.  To resume such a run, keep
            `Tuner.state_dict()`, which knows what was dropped; a model's own does not.  0 keeps the mask.
        fall_from: at how many times the sparsity it begins; memory for values and the optimizer grows with it.
        progress: is told (what, done, total).

    Raises:
        DeltaError: targets that match nothing, a mask that does not fit, a sparsity that leaves a weight without an
            element, no calibration batches.
        TargetError: a weight that cannot be trained in place: quantised, distributed, on meta.
        SourceError: an adapter to start from that does not fit.
        ShiraDeltaError: gradients that are not finite.
    """
    if any(map(is_patched, model.modules())):
        raise TargetError("the model, or a part of it, has a tuner already; detach() it first")
    if isinstance(calibration, Mapping | Tensor):
        raise DeltaError("calibration is one batch; give a list of batches, such as [batch]")
    share, pattern = parse_sparsity(sparsity)
    check_scope(scope)
    if pattern is not None and scope == "model":
        raise DeltaError("a pattern N:M holds in every row, so scope='model' means nothing with it; give a share")
    if start is not None and avoid:
        raise DeltaError(
            "an adapter to start from brings its own mask, so avoid means nothing with it; give one of both"
        )
    weights = find_weights(model, targets)
    if fall or fall_from != PRUNE_FROM:
        check_fall(fall, fall_from, mask if start is None else None, pattern)
        if scope == "tensor":
            for name, weight in weights.items():
                exact_count_for(share, weight.numel(), name)
    in_checkpoint = views(weights, check_weights(model, weights))
    others = avoided(avoid, weights, in_checkpoint)
    begun = {} if start is None else read_adapter(start, weights, in_checkpoint)
    if begun:
        positions = {name: where.to(weights[name].device) for name, (where, _) in begun.items()}
    elif isinstance(mask, str):
        choice = Choice(
            model,
            weights,
            in_checkpoint,
            min(1.0, share * fall_from) if fall else share,
            pattern,
            scope == "model",
            others,
            seed,
            list(calibration) if masks.MASKS.get(mask) else [],
            loss,
            progress or (lambda what, done, total: None),
            targets not in (None, ALL_LINEAR),  # encoders have poolers that not every task uses
        )
        positions = choice.by_name(mask)
    else:
        positions = own_mask(mask, weights, others)
    # In the model's order, whatever the mask's: gradients are clipped by sums in this order.
    positions = {name: positions[name] for name in weights if name in positions and positions[name].numel()}
    if not positions:
        raise DeltaError("the mask leaves no element of any target; give a larger sparsity, or avoid less")
    label = Path(start).name if start is not None else mask if isinstance(mask, str) else "own"
    tuner = Tuner(model, {name: weights[name] for name in positions}, positions, in_checkpoint, {"mask": label})
    if fall:
        tuner.fall(fall, share, weights.values() if scope == "model" else None)
    with torch.no_grad():
        for name, (_, values) in begun.items():
            tuner.values[name].copy_(values)
    tuner.write()
    return tuner


class Tuner:
    """The nonzeros of a model that are trained; `attach` makes one.

    It keeps the base's weights at the mask, so that `detach` puts them back as they were.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, nn.Parameter],
        positions: Mapping[str, Tensor],
        in_checkpoint: Mapping[str, Sequence[View]],
        metadata: Mapping[str, str],
    ) -> None:
        self.model = model
        self._metadata = dict(metadata)
        held_by = holders(model)
        # By module: FSDP puts its parts in the place of parameters, and one that is kept would keep its memory.
        self._flags = [(*place, p.requires_grad) for p, places in held_by.items() for place in places]
        self.numel = sum(weight.numel() for weight in weights.values())
        self._tuned: dict[str, Tuned] = {}
        values = {}
        for name, weight in weights.items():  # all that takes memory, before the model is touched
            where = positions[name]
            nonzeros = WeightNonzeros(weight, weight.dtype, compact(where, weight), flat(weight)[where])
            values[name] = nn.Parameter(torch.zeros(where.numel(), dtype=torch.float32, device=weight.device))
            held = [(module, own + SUFFIX) for module, own in held_by[weight]]
            self._tuned[name] = Tuned(nonzeros, in_checkpoint[name], held)
        model.requires_grad_(False)
        for name, tuned in self._tuned.items():
            for module, own in tuned.holders:
                module.register_parameter(own, values[name])
        patch(model, {weight: partial(_nonzeros_of, self._tuned[name].nonzeros) for name, weight in weights.items()})
        self._is_attached = True
        self._falling: Falling | None = None
        model.__dict__["_shiradelta"] = self  # so that it lives as long as the model
        self._follow_optimizers()

    def _follow_optimizers(self) -> None:
        self._hook = register_optimizer_step_post_hook(partial(_after_step, weakref.ref(self)))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_hook"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy of the model, `copy.deepcopy(model)` or a pickle: a tuner of its own."""
        self.__dict__.update(state)
        if self._is_attached:
            self._follow_optimizers()

    # ---------------------------------------------------------------------------------------- looking

    @property
    def nnz(self) -> int:
        """Nonzeros that are trained."""
        return sum(tuned.nnz for tuned in self._tuned.values())

    @property
    def positions(self) -> dict[str, Tensor]:
        """The mask: the model's names -> int64 [nonzeros], increasing, flat in the weight."""
        return {name: tuned.positions.long() for name, tuned in self._tuned.items()}

    @property
    def values(self) -> dict[str, nn.Parameter]:
        """What is trained: the model's names -> float32 [n], what is added to the base at the mask.

        Where the density falls, at the mask that it began with: what was dropped stays there, and zero.
        """
        return {name: tuned.values for name, tuned in self._tuned.items()}

    @property
    def base(self) -> dict[str, Tensor]:
        """The base's weights where values are: the model's names -> [n], of the weight's dtype."""
        return {name: tuned.nonzeros.base for name, tuned in self._tuned.items()}

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights that are changed, by the model's names; those that FSDP has taken to parts are left out."""
        return {name: weight for name, tuned in self._tuned.items() if (weight := tuned.weight) is not None}

    @property
    def views(self) -> dict[str, Sequence[View]]:
        """The model's names -> how the checkpoint has these weights."""
        return {name: tuned.views for name, tuned in self._tuned.items()}

    def parameters(self) -> list[nn.Parameter]:
        """The values, for an optimizer."""
        return list(self.values.values())

    def __repr__(self) -> str:
        share = self.nnz / max(self.numel, 1)
        return f"<Tuner of {self.nnz:,} of {self.numel:,} weights ({share:.3g}) in {len(self._tuned)} tensors>"

    # ---------------------------------------------------------------------------------------- weights

    def write(self) -> None:
        """Puts the values into the weights now; needed only after changing values by hand without a backward pass."""
        self._attached()
        for tuned in self._tuned.values():
            tuned.write(tuned.values.detach())

    def fall(self, steps: int, share: float, among: Iterable[Tensor] | None) -> None:
        """Lets the density fall from what it is to a share of each weight, or of all of some weights together."""
        self._falling = Falling(steps, share, None if among is None else sum(weight.numel() for weight in among))
        for tuned in self._tuned.values():
            tuned.nonzeros.prune(tuned.kept)

    def detach(self) -> None:
        """Takes the delta out: the weights are the base's, bit for bit, and the model is as it was before `attach`."""
        self._attached()
        for tuned in self._tuned.values():
            tuned.write(None)
        unpatch({module for tuned in self._tuned.values() for module, _ in tuned.holders})
        self._is_attached = False
        self._hook.remove()
        for tuned in self._tuned.values():
            for module, name in tuned.holders:
                del module._parameters[name]
        for module, name, flag in self._flags:
            parameter = module._parameters.get(name)
            if parameter is not None:
                parameter.requires_grad_(flag)
        del self.model.__dict__["_shiradelta"]

    def __enter__(self) -> Tuner:
        return self

    def __exit__(self, *error: object) -> None:
        if self._is_attached:
            self.detach()

    def _attached(self) -> None:
        if not self._is_attached:
            raise DeltaError("the tuner was detached; attach again")

    # ---------------------------------------------------------------------------------------- keeping

    def deltas(self) -> dict[str, TensorDelta]:
        """What was trained, by the checkpoint's names; values that are still zero are left out.

        Raises:
            DeltaError: nothing was trained yet, or it was trained to NaN or infinity; the model was cast.
        """
        self._attached()
        found: dict[str, TensorDelta] = {}
        for name, tuned in self._tuned.items():
            if tuned.weight is not None and tuned.weight.dtype != tuned.nonzeros.stored:
                raise DeltaError(
                    f"tensor {name!r} was cast to {tuned.weight.dtype} while it was trained; cast the model first, then"
                    " attach"
                )
            values = tuned.nonzeros.masked(whole(tuned.values).detach().float().to(tuned.nonzeros.positions.device))
            if not torch.isfinite(values).all():
                raise DeltaError(
                    f"tensor {name!r} was trained to NaN or infinity; go back to an earlier state, with a smaller"
                    " learning rate or with gradients clipped"
                )
            nonzero = values.nonzero().reshape(-1)
            positions = tuned.nonzeros.positions[nonzero].long().cpu().numpy()
            numbers, base = values[nonzero].cpu().numpy(), _bits(tuned.nonzeros.base[nonzero])
            dtype = str(tuned.nonzeros.stored).removeprefix("torch.")
            for view in tuned.views:
                order, where = view.from_weight(positions)
                if order.size:
                    found[view.name] = TensorDelta(view.shape, where, numbers[order], dtype, base_bits=base[order])
        if not found:
            raise DeltaError("all values are zero: nothing was trained yet")
        return found

    def save(
        self, path: str | os.PathLike[str], values: str = "int4", metadata: Mapping[str, str] | None = None
    ) -> float:
        """Writes a `.shd` file, with fingerprints of the base, by which `shiradelta apply` and `HotSwap` check it.

        Returns how far the stored values are from those that were trained, |stored - trained| / |trained|: 0 for "f32".

        In a run with sharded parameters all processes have to call it; the first one writes.

        Args:
            path: the file; put in place atomically.
            values: "f32" gives back the trained model bit for bit; "int8" and "int4" take a quarter and an eighth.
            metadata: further pairs for the file.

        Raises:
            DeltaError: nothing was trained yet, or it was trained to NaN or infinity; the model was cast.
            TargetError: the file cannot be written.
        """
        deltas = self.deltas()
        about = {"method": "train", **self._metadata, "sparsity": f"{self.nnz / self.numel:.6g}", **(metadata or {})}
        missed = trained = 0.0
        with writing(path, values) if _is_first_process() else nullcontext(weighing(values)) as writer:
            writer.metadata.update(about)
            for name, delta in deltas.items():
                wanted = delta.values().astype(np.float64)
                missed += float(np.square(writer.add(name, delta).values() - wanted).sum())
                trained += float(np.square(wanted).sum())
        return math.sqrt(missed / trained)

    def save_peft(self, folder: str | os.PathLike[str], base: str = "") -> int:
        """Writes a PEFT SHiRA adapter, for `PeftModel.from_pretrained`; returns its `r`.

        PEFT wants as many nonzeros in a layer as a LoRA of rank r has parameters: they are filled up with zeros.

        Args:
            folder: made if it is not there.
            base: what PEFT is to call the base model.

        Raises:
            DeltaError: something that PEFT's SHiRA cannot hold: all but linear layers.
        """
        self._attached()
        linear = {name: module for name, module in self.model.named_modules() if isinstance(module, nn.Linear)}
        deltas = {}
        for name, tuned in self._tuned.items():
            layer = name.removesuffix(".weight")
            if layer not in linear or layer == name:
                raise DeltaError(f"tensor {name!r} is no linear layer's weight, which is all that PEFT's SHiRA takes")
            shape = tuple(linear[layer]._parameters["weight"].shape)  # type: ignore[union-attr]
            values = whole(tuned.values).detach()
            kept = values[tuned.kept.to(values.device)].cpu().float().numpy()
            deltas[name] = TensorDelta(shape, tuned.positions.cpu().numpy(), kept, "unspecified")
        peft_shira.write(folder, deltas, base)
        return peft_shira.rank_of(deltas)

    def state_dict(self) -> dict[str, Tensor]:
        """Mask and values, to go on from exactly: `NAME.positions` int64 [n], `NAME.values` float32 [n].

        Where the density falls also `NAME.kept`, bool [n], and `fall`, the steps that it fell.
        """
        self._attached()
        state = {}
        for name, tuned in self._tuned.items():
            state[f"{name}.positions"] = tuned.nonzeros.positions.long().cpu()
            state[f"{name}.values"] = whole(tuned.values).detach().float().cpu()
            if self._falling is not None:
                state[f"{name}.kept"] = tuned.kept.cpu().clone()
        if self._falling is not None:
            state[_FALL] = torch.tensor(self._falling.step)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes up a state; parameters stay the objects that an optimizer knows.

        Raises:
            DeltaError: it is one of other weights.
        """
        self._attached()
        if (_FALL in state) is (self._falling is None):
            raise DeltaError(
                "the state is of a run whose density falls, and this one's does not, or the other way round"
            )
        parts = ("positions", "values") if self._falling is None else ("positions", "values", "kept")
        expected = {f"{name}.{what}" for name in self._tuned for what in parts}
        expected |= set() if self._falling is None else {_FALL}
        if expected != set(state):
            odd = sorted(expected ^ set(state))[0]
            raise DeltaError(f"the state is one of other weights: {odd!r} is on one side only; attach with its targets")
        for name, tuned in self._tuned.items():
            positions, values = state[f"{name}.positions"], state[f"{name}.values"]
            kept = state.get(f"{name}.kept", values)
            sound = positions.dtype in (torch.int32, torch.int64) and positions.dim() == 1
            sound = sound and positions.shape == values.shape == kept.shape and bool((positions.diff() > 0).all())
            sound = sound and (kept is values or kept.dtype == torch.bool)
            if not sound or not positions.numel() or positions[0] < 0 or positions[-1] >= tuned.nonzeros.numel:
                raise DeltaError(f"the state of {name!r} does not fit a weight of {tuned.nonzeros.numel} elements")
        if self._falling is not None and (state[_FALL].numel() != 1 or state[_FALL].is_floating_point()):
            raise DeltaError(f"the state's {_FALL!r} is no number of steps; take one that Tuner.state_dict gave")
        for name, tuned in self._tuned.items():
            tuned.load(name, state[f"{name}.positions"], state[f"{name}.values"], state.get(f"{name}.kept"))
        if self._falling is not None:
            self._falling.step = int(state[_FALL])
        self.write()


def _nonzeros_of(nonzeros: WeightNonzeros, module: nn.Module, name: str) -> tuple[Tensor, WeightNonzeros]:
    values = module._parameters[name + SUFFIX]
    assert values is not None
    return values, nonzeros


def _bits(weights: Tensor) -> Any:
    size = weights.element_size()
    return weights.cpu().view(torch.uint8).numpy().view(f"<u{size}")


def _is_first_process() -> bool:
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def _after_step(tuner: weakref.ref[Tuner], optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Writes what an optimizer has changed, so that whoever looks at the weights next finds it there."""
    found = tuner()
    if found is None:
        return
    ids = {id(values) for values in found.parameters()}
    if any(id(p) in ids for group in optimizer.param_groups for p in group["params"]):
        if found._falling is not None:
            found._falling.after_step(list(found._tuned.values()), optimizer)
        found.write()
