"""RIGSA (arXiv:2511.01794): finds the mask by training and pruning a random change of every element, behind a gate.

The weight is W + gate x D.  D is random, as large as W and full-size; the gate, one number a weight, is learnt from
1e-6 on; weight decay pulls both to 0, and so the weight to W.  Each round trains for the batches once, keeps the
largest elements of D, of those first whose sign is still the random one, and rewinds D and the gate.  What is left is a
sparse random D, for a last training pass.

Beside the model a search holds for each element: D and Adam's two moments in bfloat16, the base in the weight's own
dtype, and a byte that says whether the element is kept; 9 bytes in all if the model is bfloat16.  There is one gradient
at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from shiradelta.errors import ArgumentError, DeltaError, DivergedError, ShiraDeltaError
from shiradelta.nonzeros.adam import BETAS
from shiradelta.nonzeros.gate import GATE
from shiradelta.nonzeros.schedule import cycle
from shiradelta.nonzeros.weight import flat
from shiradelta.select.largest_torch import largest
from shiradelta.select.shares import exact_count_for
from shiradelta.train.gradients import taking_gradients, to_device
from shiradelta.train.mask_registry import Ticket, seed_of

if TYPE_CHECKING:
    from shiradelta.train.choose import Choice

#: Rounds of training and pruning; each prunes the same share of what is left.
ROUNDS = 4
#: Largest learning rate of D, relative to the weight's RMS; and of the gate.
LR, GATE_LR = 0.04, 1e-3
_EPSILON = 1e-8
#: What D and Adam's moments are held in.
_HELD = torch.bfloat16
#: Elements whose update is computed at a time, in float32.
_BLOCK = 1 << 22


def search(choice: Choice, decay: float) -> dict[str, Ticket]:
    """The elements to train of each weight, and their random values.

    Args:
        choice: weights, share, batches and loss.  The batches are an epoch of training.
        decay: weight decay of D and the gate, relative to their learning rates.

    Raises:
        ArgumentError: there are no batches, or a share rounds to no element.
        DeltaError: several processes are running.
        DivergedError: the loss is not finite.
    """
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise DeltaError("mask 'rigsa' is found in one process: attach there, and reattach to its state in all")
    if not choice.batches:
        raise ArgumentError("the calibration set is empty; give the batches of an epoch, or a mask without gradients")
    layers = {}
    for name, weight in choice.weights.items():
        count = exact_count_for(choice.share, weight.numel(), name)
        avoid = choice.avoid.get(name)
        taken = None if avoid is None else torch.from_numpy(avoid)
        layers[name] = _Layer(weight, count, decay, f"{choice.seed} {choice.views[name][0].name}", taken)
    try:
        for number in range(ROUNDS):
            _train(choice, layers, number)
            for name, layer in layers.items():
                if not layer.steps and choice.all_needed:
                    raise ShiraDeltaError(f"tensor {name!r} has no part in the loss; leave it out of the targets")
                layer.prune((number + 1) / ROUNDS)
    finally:
        for layer in layers.values():
            layer.restore()
    return {name: layer.ticket() for name, layer in layers.items() if layer.steps}


def _train(choice: Choice, layers: Mapping[str, _Layer], number: int) -> None:
    """One round: an epoch from the rewound state."""
    batches = choice.batches
    device = next(iter(choice.weights.values())).device
    for layer in layers.values():
        layer.rewind()
    rate = 0.0

    def take(name: str, gradient: Tensor) -> None:
        layers[name].step(gradient, rate)

    with taking_gradients(choice.model, choice.weights, take), torch.enable_grad():
        for done, batch in enumerate(batches):
            choice.progress("training and pruning a random change", number * len(batches) + done, ROUNDS * len(batches))
            rate = cycle(done, len(batches))
            found = choice.loss(choice.model, to_device(batch, device))
            if not math.isfinite(found.item()):
                raise DivergedError("the search for the mask gave NaN; look for broken batches, or take another mask")
            if found.requires_grad:
                found.backward()  # type: ignore[no-untyped-call]
            for layer in layers.values():
                layer.write()


class _Layer:
    """The random change of one weight while the mask is searched.

    Attributes:
        steps: steps of Adam in this round.
    """

    def __init__(self, weight: nn.Parameter, count: int, decay: float, seed: str, avoid: Tensor | None) -> None:
        self._weight, self._count, self._decay, self._seed, self.steps = weight, count, decay, seed, 0
        self._base = flat(weight).clone()
        self._kept = torch.ones(weight.numel(), dtype=torch.bool, device=weight.device)
        if avoid is not None:
            self._kept[avoid.to(weight.device)] = False
        self._size = float(self._base.float().square().mean().sqrt()) or 0.02
        self._change, self._mean, self._square = (torch.empty_like(self._base, dtype=_HELD) for _ in range(3))
        self._gate = self._gate_mean = self._gate_square = 0.0
        self._noise = torch.Generator(weight.device).manual_seed(seed_of(f"{seed} rounding"))

    def _random(self) -> Tensor:
        """The random change; drawn on the CPU so that it is the same for every device."""
        generator = torch.Generator().manual_seed(seed_of(self._seed))
        drawn = torch.randn(self._base.numel(), generator=generator).mul_(self._size)
        return drawn.to(self._weight.device, _HELD)

    def rewind(self) -> None:
        """Goes back to the random change and a closed gate."""
        self._change.copy_(self._random()).masked_fill_(~self._kept, 0)
        self._mean.zero_()
        self._square.zero_()
        self._gate, self._gate_mean, self._gate_square, self.steps = GATE, 0.0, 0.0, 0
        self.write()

    def step(self, gradient: Tensor, rate: float) -> None:
        """A step of AdamW on change and gate; `write` makes the weight follow."""
        self.steps += 1
        one, two = (1 - beta**self.steps for beta in BETAS)
        lr, along = rate * LR, torch.zeros((), dtype=torch.float64, device=gradient.device)
        gradient = gradient.reshape(-1)
        for start in range(0, gradient.numel(), _BLOCK):
            part = slice(start, start + _BLOCK)
            change, kept = self._change[part].float(), self._kept[part]
            slope = gradient[part].float().where(kept, 0)
            along += (slope * change).sum(dtype=torch.float64)
            slope *= self._gate
            mean = self._mean[part].float().lerp_(slope, 1 - BETAS[0])
            square = self._square[part].float().lerp_(slope.square(), 1 - BETAS[1])
            change *= 1 - lr * self._decay
            change -= lr * self._size * (mean / one) / ((square / two).sqrt_() + _EPSILON)
            noise = torch.randint(1 << 16, change.shape, generator=self._noise, device=change.device, dtype=torch.int32)
            for held, wanted in ((self._change, change.where(kept, 0)), (self._mean, mean), (self._square, square)):
                held[part] = _rounded(wanted, noise)
        slope_of_gate = float(along)
        self._gate_mean += (1 - BETAS[0]) * (slope_of_gate - self._gate_mean)
        self._gate_square += (1 - BETAS[1]) * (slope_of_gate**2 - self._gate_square)
        self._gate *= 1 - rate * GATE_LR * self._decay
        self._gate -= rate * GATE_LR * (self._gate_mean / one) / (math.sqrt(self._gate_square / two) + _EPSILON)

    def write(self) -> None:
        """Writes W + gate x D into the weight."""
        weight = flat(self._weight)
        for start in range(0, weight.numel(), _BLOCK):
            part = slice(start, start + _BLOCK)
            changed = self._base[part].float() + self._gate * self._change[part].float()
            weight[part] = torch.where(self._kept[part], changed.to(weight.dtype), self._base[part])

    def prune(self, done: float) -> None:
        """Keeps the largest elements, of those first whose sign has not changed.

        Args:
            done: share of the rounds that are done; the number kept falls by the same factor in each.
        """
        numel = self._change.numel()
        count = min(round(numel * (self._count / numel) ** done), int(self._kept.sum()))
        sizes = self._change.abs().float()
        scores = sizes / (sizes.max() + 1e-30) + (self._change.sign() == self._random().sign())
        kept = largest(scores.masked_fill_(~self._kept, -1), count)
        self._kept.zero_()[kept] = True

    def restore(self) -> None:
        """Writes the base into the weight, bit for bit."""
        flat(self._weight).copy_(self._base)

    def ticket(self) -> Ticket:
        """The elements that are left, and their random values."""
        positions = self._kept.nonzero().reshape(-1)
        return Ticket(positions, self._random()[positions].float())


def _rounded(values: Tensor, noise: Tensor) -> Tensor:
    """Values in bfloat16, up or down with the probability that keeps their mean.

    The nearest number would lose steps of less than a 256th of the value, such as those of a running mean of squares.

    Args:
        values: float32.
        noise: int32, at random from 0 to 2^16 - 1.
    """
    return ((values.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).bfloat16()
