"""The model that is fitted: the base's weights, the fine-tune's beside them, and what is compared of the two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from shiradelta.errors import SourceError
from shiradelta.fit import scores
from shiradelta.fit.behaviour import Behaviour
from shiradelta.fit.custom_behaviour import CustomBehaviour
from shiradelta.fit.fitted import Order, Target
from shiradelta.fit.measures import HeldOut
from shiradelta.fit.teacher import Teacher
from shiradelta.fit.text_behaviour import TextBehaviour
from shiradelta.format.delta import TensorDelta
from shiradelta.models import loading
from shiradelta.models.dtypes import torch_dtype
from shiradelta.models.names import rename_all
from shiradelta.nonzeros.vector import Nonzeros
from shiradelta.nonzeros.weight import flat
from shiradelta.select.largest_torch import largest, largest_of_all
from shiradelta.text.batches import batches, split
from shiradelta.text.pooling import find_pooling
from shiradelta.text.texts import read_texts

#: Batches for scales, scores and the refit's moments.
CALIBRATION = 8
#: Of the change's energy, what may be in tensors that the loaded model does not have: nothing is fitted to them.
MOST_MISSING = 0.1


class Subject:
    """A model with its texts and its teacher.  Dense deltas are made when they are needed, one at a time.

    Attributes:
        model: the base.
        texts: all of them.
        train, held_out: indices of the texts to fit on, and to measure on.
        targets, weights: what is fitted, and where that is in the model.
        changed: how many weights of each target the fine-tune changed.
        energy: of each target, the sum of squares of its dense delta.
        tied: further names of fitted tensors -> the name that each is fitted under.
        warnings: what a user should know.
    """

    def __init__(self, order: Order) -> None:
        fit, base, source = order.fit, order.base, order.source
        self._fit = fit
        self.texts = read_texts(fit.texts)
        self.train, self.held_out = split(len(self.texts), fit.held_out, fit.seed)
        self.device = loading.pick_device(fit.device)
        self.micro = fit.micro or fit.batch
        self.warnings: list[str] = []
        if fit.model is not None:
            self.model: nn.Module = fit.model.to(self.device)
        else:
            dtype = loading.pick_dtype(self.device, (target.dtype for target in order.targets))
            self.model = loading.load_model(base, source, self.device, dtype)
        self.model.eval().requires_grad_(False)
        self.behaviour = self._behaviour(base, source)

        names = dict(self.model.named_parameters(remove_duplicate=False))
        found = rename_all([target.name for target in order.targets], names)
        if not found:
            name = order.targets[0].name
            raise SourceError(f"{base}: the loaded model has no tensor {name!r}; give model and forward")
        self.targets: list[Target] = []
        self.weights: list[nn.Parameter] = []
        self.changed: list[int] = []
        self.energy: list[float] = []
        self.tied: dict[str, str] = {}
        tuned: dict[nn.Parameter, Tensor] = {}
        missing = [target for target in order.targets if target.name not in found]
        self.warnings += _not_fitted(missing)
        for target in order.targets:
            if target.name not in found:
                continue
            delta, weight = self._dense(target), names[found[target.name]]
            if weight in tuned:
                self.tied[target.name] = next(
                    t.name for t, w in zip(self.targets, self.weights, strict=True) if w is weight
                )
                continue
            changed = int(delta.count_nonzero())
            if changed:  # what the fine-tune left alone stays as it is, as with plain top-k
                self.targets.append(target)
                self.weights.append(weight)
                self.changed.append(changed)
                self.energy.append(float(delta.square().sum()))
                tuned[weight] = (weight.data.float() + delta.view(weight.shape)).to(weight.dtype)
        if not self.targets:
            raise SourceError(f"{source}: nothing in it changes the base")
        lost = sum(float(self._dense(target).square().sum()) for target in missing)
        if lost > MOST_MISSING * (lost + sum(self.energy)):
            share = lost / (lost + sum(self.energy))
            raise SourceError(
                f"{base}: it has no tensor {missing[0].name!r} once loaded; what is renamed or stacked then"
                f" carries {share:.0%} of the change, which a fit would not see: convert without fitting"
            )
        self._write_whole(order.whole, names)
        self.teacher = Teacher(self.model, tuned, self.behaviour)
        # Where values are trained, so that nothing of the held-out texts is used.
        with torch.no_grad():
            self.behaviour.calibrate(
                (part, self.behaviour.outputs(self.model, part), self.teacher.outputs(part))
                for part in self.calibration()
            )

    def _behaviour(self, base: Path, source: Path) -> Behaviour:
        fit = self._fit
        if fit.model is not None and fit.forward is None and not hasattr(fit.model, "config"):
            raise SourceError("a model that is not transformers' own needs Fit(forward=...), which says what it gives")
        if fit.forward is not None:
            return CustomBehaviour(self.texts, fit.forward, fit.loss)
        tokenizer, pooling = loading.load_tokenizer(base, source), find_pooling(base, source)
        return TextBehaviour(tokenizer, self.texts, self.model, fit.tokens, pooling, fit.text_share)

    def _write_whole(self, whole: Sequence[tuple[str, TensorDelta]], names: dict[str, nn.Parameter]) -> None:
        for name, delta in whole:
            own = rename_all([name], names).get(name)
            if own is None or delta.op not in ("add", "set", "new") or names[own].shape != delta.shape:
                continue
            weights = flat(names[own])
            positions = torch.from_numpy(delta.positions()).to(self.device)
            values = torch.from_numpy(delta.values().copy()).to(weights)
            weights[positions] = weights[positions] + values if delta.op == "add" else values

    def _dense(self, target: Target) -> Tensor:
        return torch.from_numpy(target.dense()).to(self.device)

    def nonzeros(self) -> Nonzeros:
        """The fine-tune's largest changes, as many of each target as its count says."""
        positions, values = self.select("magnitude", [target.count for target in self.targets])
        stored = [torch_dtype(target.dtype) for target in self.targets]
        nonzeros = Nonzeros(self.weights, stored, positions)
        nonzeros.values = values
        return nonzeros

    def select(self, mask: str, counts: Sequence[int], whole_model: bool = False) -> tuple[list[Tensor], Tensor]:
        """Positions, and the fine-tune's values there.

        Args:
            mask: "magnitude", "activation" or "gradient".
            counts: how many of each target.
            whole_model: all of them together, wherever they are largest.
        """
        factors = self._factors(mask)

        def score(index: int) -> Tensor:
            return factors(index, self._dense(self.targets[index]).abs())

        if whole_model and mask != "magnitude":  # by magnitude, counts are shared out that way already
            positions = largest_of_all([score(index) for index in range(len(counts))], sum(counts))
        else:
            pairs = zip(counts, self.changed, strict=True)
            positions = [largest(score(i), min(count, changed)) for i, (count, changed) in enumerate(pairs)]
        found = [self._dense(target)[at] for target, at in zip(self.targets, positions, strict=True)]
        return positions, torch.cat(found)

    def _factors(self, mask: str) -> Callable[[int, Tensor], Tensor]:
        """(target's index, its magnitudes) -> its scores."""
        if mask == "gradient":
            found = scores.rms_gradients(self.model, self.weights, self.behaviour, self.teacher, self.calibration())
            return lambda index, magnitude: magnitude * found[index]
        if mask == "activation":

            def forward() -> None:
                for part in self.calibration():
                    self.behaviour.outputs(self.model, part)

            norms = scores.input_norms(self.model, self.weights, forward)
            return lambda index, magnitude: scores.by_input(magnitude, self.weights[index], norms.get(index))
        return lambda index, magnitude: magnitude

    def calibration(self) -> list[list[int]]:
        """A few batches, in the parts of which they are made."""
        number = max(1, min(CALIBRATION * self._fit.batch, len(self.train)) // self.micro)
        return list(islice(batches(self.train, self.behaviour.lengths, self.micro, self._fit.seed), number))

    def measuring(self) -> HeldOut:
        """Compares the model with the fine-tune on the texts held out."""
        return HeldOut(self.model, self.behaviour, self.teacher, self.held_out, self.micro)


def _not_fitted(targets: Sequence[Target]) -> list[str]:
    """What to warn of where the loaded model has no tensors of these names."""
    if not targets:
        return []
    these = "1 tensor is" if len(targets) == 1 else f"{len(targets)} tensors are"
    return [
        f"{these} not fitted, for the loaded model has none of that name, such as {targets[0].name!r}; they keep their"
        " largest changes, and no distance tells of them"
    ]
