"""`Tuner`: holds the nonzeros of a model while they are trained."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from shiradelta.errors import DeltaError
from shiradelta.exports.peft_shira import rank_of
from shiradelta.format.delta import TensorDelta
from shiradelta.format.draw import Draw
from shiradelta.models.memory import is_sharded, own_part
from shiradelta.models.views import View
from shiradelta.nonzeros.patched import patch, unpatch
from shiradelta.nonzeros.scaling import Scaling
from shiradelta.nonzeros.spread import SpreadNonzeros
from shiradelta.nonzeros.weight import WeightNonzeros, flat
from shiradelta.train import saving, tuner_state
from shiradelta.train.crew import crew_of
from shiradelta.train.pruning import Pruner
from shiradelta.train.tuned import SUFFIX, TunedWeight, compact, holders, scales_name
from shiradelta.util.arguments import PATH, TEXT, checked
from shiradelta.util.deprecated import warn_renamed
from shiradelta.util.text import count
from shiradelta.util.version import made_by


class Tuner:
    """The nonzeros of a model that are trained; `attach` makes one.

    It keeps the base weights at the mask, so that `detach` can restore them.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, nn.Parameter],
        positions: Mapping[str, Tensor],
        in_checkpoint: Mapping[str, Sequence[View]],
        metadata: Mapping[str, str],
        scaling: Callable[[str, WeightNonzeros], Scaling] | None = None,
        draws: Mapping[str, Draw] | None = None,
    ) -> None:
        self.model = model
        self._metadata = dict(metadata)
        held_by = holders(model)
        # By module and name: FSDP replaces parameters by shards, and a reference would keep the whole ones alive.
        self._flags = [(*holder, p.requires_grad) for p, held in held_by.items() for holder in held]
        self.numel = sum(weight.numel() for weight in weights.values())
        self._tuned: dict[str, TunedWeight] = {}
        values, scales = {}, {}
        for name, weight in weights.items():  # allocate everything before the model is changed
            spread = SpreadNonzeros(weight, positions[name]) if is_sharded(weight) else None
            where = positions[name] if spread is None else spread.positions
            nonzeros = WeightNonzeros(
                own_part(weight), weight.dtype, compact(where, weight), flat(weight)[where], spread
            )
            start = torch.zeros(where.numel(), dtype=torch.float32, device=weight.device)
            values[name] = nn.Parameter(start if spread is None else spread.wrap(start))
            held = [(module, own + SUFFIX) for module, own in held_by[weight]]
            made = None if scaling is None else scaling(name, nonzeros)
            if made is not None:
                scales[name] = nn.Parameter(made.start())
            of_views = {view.name: draws[view.name] for view in in_checkpoint[name] if draws and view.name in draws}
            self._tuned[name] = TunedWeight(nonzeros, in_checkpoint[name], held, made, of_views)
        model.requires_grad_(False)
        for name, tuned in self._tuned.items():
            for module, own in tuned.holders:
                module.register_parameter(own, values[name])
                if tuned.scaling is not None:
                    module.register_parameter(scales_name(own, tuned.scaling), scales[name])
        of = {name: partial(_nonzeros_of, tuned.nonzeros, tuned.scaling) for name, tuned in self._tuned.items()}
        patch(model, {weight: of[name] for name, weight in weights.items()})
        self._is_attached = True
        self._pruner: Pruner | None = None
        model.__dict__["_shiradelta"] = self  # so that it lives as long as the model
        self._follow_optimizers()

    def _follow_optimizers(self) -> None:
        self._hook = register_optimizer_step_post_hook(partial(_after_step, weakref.ref(self)))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_hook"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores the tuner of a copied model; `copy.deepcopy` and pickles copy the tuner too."""
        self.__dict__.update(state)
        if self._is_attached:
            self._follow_optimizers()

    # ---------------------------------------------------------------------------------------- looking

    @property
    def nnz(self) -> int:
        """Number of nonzeros that are trained."""
        return sum(tuned.nnz for tuned in self._tuned.values())

    @property
    def positions(self) -> dict[str, Tensor]:
        """The mask: the model's names -> int64 [nonzeros], increasing, flat in the weight.

        Where tensor parallelism has spread a weight, the nonzeros are those of all processes, and all have to ask for
        this or for `base`.
        """
        return {name: tuned.positions.long() for name, tuned in self._tuned.items()}

    @property
    def values(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained: the model's names -> float32 [n], added to the base at the mask.

        With scales they are the direction of what is added, before it is scaled.  If nonzeros are pruned, n is that of
        the mask at the start: pruned values stay in the parameter, as zeros.  Where tensor parallelism has spread the
        weight, they are a DTensor: each process has the values of its part, and zeros after them.
        """
        return {name: tuned.values for name, tuned in self._tuned.items()}

    @property
    def scales(self) -> dict[str, nn.Parameter]:
        """The further parameters, float32, by the model's names; empty without.

        With `magnitude=True` what the rows' lengths grow by, [rows]; with `mask="rigsa"` the gate, [1].
        """
        return {name: scales for name, tuned in self._tuned.items() if (scales := tuned.scales) is not None}

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """Every parameter by a name: the values by the weight's, the scales by the weight's and theirs."""
        scales = {f"{name}.{tuned.scaling.name}": tuned.scales for name, tuned in self._tuned.items() if tuned.scaling}
        return self.values | {name: one for name, one in scales.items() if one is not None}

    @property
    def base(self) -> dict[str, Tensor]:
        """The base weights where the values are: the model's names -> [n], of the weight's dtype."""
        return {name: tuned.gathered(tuned.nonzeros.base) for name, tuned in self._tuned.items()}

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights that are changed, by the model's names; weights that FSDP has sharded are left out.

        Of a weight that tensor parallelism has spread it is this process's part.
        """
        return {name: weight for name, tuned in self._tuned.items() if (weight := tuned.weight) is not None}

    @property
    def views(self) -> dict[str, Sequence[View]]:
        """The model's names -> the checkpoint's views of these weights."""
        return {name: tuned.views for name, tuned in self._tuned.items()}

    def parameters(self) -> list[nn.Parameter]:
        """The values, and the scales if there are any, for an optimizer."""
        return list(self.trained.values())

    def units(self) -> list[float]:
        """What a relative learning rate of 1 is for each of `parameters`: RMS of the base, or of its rows' lengths."""
        self._check_attached()
        for tuned in self._tuned.values():
            tuned.restore()
        found = [tuned.rms() for tuned in self._tuned.values() if tuned.weight is not None]
        self.write()
        return found + [tuned.scaling.unit for tuned in self._tuned.values() if tuned.scaling is not None]

    def __repr__(self) -> str:
        share = self.nnz / max(self.numel, 1)
        return f"<Tuner of {self.nnz:,} of {self.numel:,} weights ({share:.3g}) in {count(len(self._tuned), 'tensor')}>"

    # ---------------------------------------------------------------------------------------- weights

    def write(self) -> None:
        """Writes the values into the weights now.

        Only needed after values were changed by hand without a backward pass.
        """
        self._check_attached()
        for tuned in self._tuned.values():
            tuned.write()

    @torch.no_grad()
    def start_from(self, name: str, changes: Tensor) -> None:
        """Sets the parameters of a weight so that its changes are these, float32 [n], up to rounding with scales."""
        tuned = self._tuned[name]
        tuned.start_from(changes)
        if tuned.scaling is not None and tuned.scales is not None:
            tuned.scales.copy_(tuned.scaling.scales_at(tuned.values.detach()))

    def prune(self, steps: int, share: float, among: Iterable[Tensor] | None) -> None:
        """Prunes over the next optimizer steps, until a share of each weight is left.

        Args:
            steps: optimizer steps until the mask is final.
            share: share left then.
            among: weights of which the share is taken together.  None keeps the share in each weight.
        """
        self._pruner = Pruner(steps, share, None if among is None else sum(weight.numel() for weight in among))
        for tuned in self._tuned.values():
            tuned.nonzeros.prune(tuned.kept)

    def fall(self, steps: int, share: float, among: Iterable[Tensor] | None) -> None:
        """Deprecated name of `prune`."""
        warn_renamed("Tuner.fall", "Tuner.prune")
        self.prune(steps, share, among)

    def detach(self) -> None:
        """Restores the base weights, bit for bit, and the model as it was before `attach`."""
        self._check_attached()
        for tuned in self._tuned.values():
            tuned.restore()
        unpatch({module for tuned in self._tuned.values() for module, _ in tuned.holders})
        self._is_attached = False
        self._hook.remove()
        for tuned in self._tuned.values():
            for module, name in tuned.holders:
                del module._parameters[name]
                if tuned.scaling is not None:
                    del module._parameters[scales_name(name, tuned.scaling)]
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

    def _check_attached(self) -> None:
        if not self._is_attached:
            raise DeltaError("the tuner was detached; attach again")

    # ---------------------------------------------------------------------------------------- saving

    def deltas(self) -> dict[str, TensorDelta]:
        """The trained deltas, by the checkpoint's names; values that are still zero are left out.

        Raises:
            DeltaError: nothing is trained yet, training gave NaN or infinity, or the model was cast.
        """
        self._check_attached()
        return saving.deltas(self._tuned)

    @checked()
    def save(
        self, path: str | os.PathLike[str], values: str = "int4", metadata: Mapping[str, str] | None = None
    ) -> float:
        """Writes a `.shd` file, with fingerprints of the base, by which `shiradelta apply` and `HotSwap` check it.

        Where parameters are sharded or spread all processes have to call it.  The first one writes; the file is there
        when they return, and if it cannot be written, all say so.

        Args:
            path: the file; it is written atomically.
            values: the value codec.  "f32" reproduces the trained model bit for bit; "int8" and "int4" take a quarter
                and an eighth of its size.
            metadata: further pairs for the file.

        Returns:
            How far the stored values are from the trained ones, |stored - trained| / |trained|; 0 for "f32".

        Raises:
            DeltaError: nothing is trained yet, training gave NaN or infinity, or the model was cast.
            TargetError: the file cannot be written, also by another process.
        """
        found = self.deltas()
        about = {
            "created_by": made_by("torch", "transformers"),
            "method": "train",
            **self._metadata,
            "sparsity": f"{self.nnz / self.numel:.6g}",
            **(metadata or {}),
        }
        crew = crew_of(self.parameters())
        return crew.agree("save()", lambda: saving.save(path, found, values, about))

    @checked(folder=PATH, layout=TEXT, base=TEXT)
    def export(self, folder: str | os.PathLike[str], layout: str = "peft-shira", base: str = "") -> None:
        """Exports the trained nonzeros to another library's layout.

        Args:
            folder: the file or folder to write.
            layout: a name of `shiradelta.exports.EXPORTS`.
            base: the base model's name, for layouts that store it.

        Raises:
            ArgumentError: the layout is unknown.
            DeltaError: a weight is not that of a linear layer, or the layout cannot hold the deltas.
            TargetError: the layout's files cannot be written.
        """
        self._export(folder, layout, base)

    def _export(self, folder: str | os.PathLike[str], layout: str, base: str) -> dict[str, TensorDelta]:
        self._check_attached()
        return saving.export(folder, self.model, self._tuned, layout, base, crew_of(self.parameters()))

    def save_peft(self, folder: str | os.PathLike[str], base: str = "") -> int:
        """Writes a PEFT SHiRA adapter, for `PeftModel.from_pretrained`; returns its `r`.

        PEFT wants as many nonzeros in a layer as a LoRA of rank r has parameters, so layers are padded with zeros.

        Args:
            folder: created if it does not exist.
            base: the base model's name in the adapter's configuration.

        Raises:
            DeltaError: a weight is not that of a linear layer, which is all that PEFT's SHiRA holds.
        """
        return rank_of(self._export(folder, "peft-shira", base))

    def state_dict(self) -> dict[str, Tensor]:
        """Mask and values, to resume exactly: `NAME.positions` int64 [n], `NAME.values` float32 [n].

        With a random mask also `NAME.draws`, int64 [tensors of the checkpoint, 2]: seeds and cells of the positions.
        With scales also `NAME.magnitudes`, float32 [rows], or `NAME.gate`, [1].  If nonzeros are pruned also
        `NAME.kept`, bool [n], and `prune_step`, the optimizer steps that are done.
        """
        self._check_attached()
        return tuner_state.state_of(self._tuned, self._pruner)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores a state; the parameters stay the objects that an optimizer knows.

        Raises:
            DeltaError: the state is that of other weights, is damaged, or is another one than in another process.
        """
        self._check_attached()
        tuner_state.restore(self._tuned, self._pruner, state, crew_of(self.parameters()))
        self.write()


def _nonzeros_of(
    nonzeros: WeightNonzeros, scaling: Scaling | None, module: nn.Module, name: str
) -> tuple[Tensor, WeightNonzeros]:
    values = module._parameters[name + SUFFIX]
    assert values is not None
    if nonzeros.spread is not None and nonzeros.spread.is_whole(values):
        if nonzeros.spread.has_changed(values):
            nonzeros.written = None
        return nonzeros.spread.own(values), nonzeros
    if scaling is None or is_sharded(values):  # FSDP looks at its shards, between passes
        return values, nonzeros
    scales = module._parameters[scales_name(name, scaling)]
    assert scales is not None
    if not torch.compiler.is_compiling():
        nonzeros.written = None  # no version tells whether what is computed anew has changed
    with torch.inference_mode(False):  # what is made in that mode has no version
        return scaling.changes(values, scales), nonzeros


def _after_step(tuner: weakref.ref[Tuner], optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Writes what an optimizer has changed, so that the weights are up to date for whatever reads them next."""
    found = tuner()
    if found is None:
        return
    ids = {id(values) for values in found.parameters()}
    if any(id(p) in ids for group in optimizer.param_groups for p in group["params"]):
        if found._pruner is not None:
            found._pruner.after_step(list(found._tuned.values()), optimizer)
        found.write()
