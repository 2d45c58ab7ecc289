"""Modules whose weights hold a sparse delta, of which the nonzeros alone are trained.

A forward pass uses the weights as they lie there, patched in place; nothing is cloned.  A backward pass makes the
dense gradient of one weight, a few rows at a time, keeps what lies at the mask and drops the rest.

Sampled products, which compute the gradient at the mask alone, do not pay at the densities of adapters.  At 1 % every
tile of 128 x 128 has some 160 nonzeros, so that both operands are read in full all the same; and gathering two columns
of 4,096 tokens moves 16 KB a nonzero, 5 microseconds a thousand of them at an H100's 3.3 TB/s, where the dense product
of a 4096 x 4096 layer takes 0.2 ms, about 1 microsecond a thousand.
"""

from __future__ import annotations

import copy
import copyreg
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from shiradelta.errors import DeltaError

#: Elements of a dense gradient that are made at a time: more than the layers of a 7B model have.
CHUNK = 1 << 26

#: (module, name of its weight) -> (values [n] that gradients are to reach, where they are).
Source = Callable[[nn.Module, str], "tuple[Tensor, Place]"]


class Place:
    """The nonzeros of one weight.

    Attributes:
        parameter: the weight, which takes no gradient itself.
        stored: the dtype that sums are rounded to.
        positions: integers [n], increasing, flat in the weight.
        base: [n], the base's weights there.
        kept: bool [n], those that are trained; changed in place, for compiled graphs know it.  None: all.  The others
            were dropped: their values are zero, and their base stays known, should somebody overwrite the weight.
    """

    def __init__(self, parameter: nn.Parameter, stored: torch.dtype, positions: Tensor, base: Tensor) -> None:
        self.parameter: Tensor = parameter
        self.stored = stored
        self.numel = parameter.numel()
        self.columns = self.numel // parameter.shape[0] if parameter.dim() > 1 else self.numel
        self.move(positions, base)

    def move(self, positions: Tensor, base: Tensor, kept: Tensor | None = None) -> None:
        """Takes another mask; the weight has to hold the base."""
        self.kept = None if kept is None else kept.to(positions.device, copy=True)
        self.positions = positions
        self.base = base
        #: Adding zero would make +0 of them; a file does not list values that are zero.
        self._negative_zeros = bool(((base == 0) & base.signbit()).any())
        #: Versions of the values that the weight holds and of the weight; None if they may have changed in other ways.
        self.written: tuple[int, int] | None = None
        rows = self.numel // max(self.columns, 1)
        step = max(1, CHUNK // max(self.columns, 1))
        edges = [*range(0, rows, step), rows]
        ends = torch.tensor(edges, device=positions.device, dtype=torch.int64) * self.columns
        cuts = torch.searchsorted(positions.long(), ends).tolist()
        #: (first row, last row + 1, first nonzero, last nonzero + 1) of each chunk.
        self.chunks = list(zip(edges[:-1], edges[1:], cuts[:-1], cuts[1:], strict=True))
        self._narrow()

    def drop(self, kept: Tensor) -> None:
        """Trains no more than these, bool [n]."""
        if self.kept is None:
            self.kept = torch.ones_like(self.positions, dtype=torch.bool)
        self.kept &= kept
        self._narrow()

    def _narrow(self) -> None:
        """Sees to it that what was dropped takes no time: those that are kept are a place of their own."""
        self._narrowed: tuple[Tensor, Place] | None = None  # where among all, and what they are
        self._whole: tuple[int, int] | None = None  # version and address of the weight when all were written last
        if self.kept is not None and not self.kept.all():
            among = self.kept.nonzero()[:, 0]
            own = copy.copy(self)
            own.parameter = torch.empty(0)  # it is given one each time
            own.move(self.positions[among], self.base[among])
            self._narrowed = among.to(self.positions.dtype), own

    def masked(self, values: Tensor) -> Tensor:
        """[n], zero at what was dropped."""
        return values if self.kept is None else values.where(self.kept, 0)

    def gather(self, rows: Callable[[int, int], Tensor]) -> Tensor:
        """Elements at the mask of a matrix that is made a few rows at a time; float32."""
        if not torch.compiler.is_compiling() and self._narrowed is not None:
            among, own = self._narrowed
            values = torch.zeros(self.positions.shape, dtype=torch.float32, device=self.positions.device)
            values[among] = own.gather(rows)
            return values
        found = []
        for first, last, start, stop in self.chunks:
            where = self.positions[start:stop]
            found.append(rows(first, last).reshape(-1)[where - first * self.columns if first else where].float())
        return self.masked(found[0] if len(found) == 1 else torch.cat(found))

    def write(self, values: Tensor | None, weight: Tensor | None = None) -> None:
        """Puts base + values into the weight, rounded as it will be stored; None puts the base back."""
        weight = self.parameter if weight is None else weight
        self.follow(weight)
        self.written = None
        now = weight._version, weight.data_ptr()
        if values is not None and self._narrowed is not None and self._whole == now:  # the others have the base
            among, own = self._narrowed
            own.write(values[among], weight)
            return
        total = self.base if values is None else self.total(values)
        flat(weight)[self.positions] = total.to(weight.dtype)
        self._whole = now

    def follow(self, other: Tensor) -> None:
        """To the device of another tensor."""
        if self.positions.device != other.device:
            self.positions, self.base = self.positions.to(other.device), self.base.to(other.device)
            self.kept = None if self.kept is None else self.kept.to(other.device)
            self._narrow()

    def total(self, values: Tensor) -> Tensor:
        """fl32(W + v), rounded as the file's reader will (spec/FORMAT.md, section 6.1); one pass where v is float32."""
        values = self.masked(values)
        total = (values.float() + self.base).to(self.stored)
        return torch.where(values == 0, self.base, total) if self._negative_zeros else total

    def refresh(self, weight: Tensor, values: Tensor) -> None:
        """Writes values that may have changed since they were written.

        Between a backward pass and the next forward pass anything may have changed them, also what leaves no trace
        in a tensor's version: a fused optimizer's own kernel, or `.data`.  What is written here leaves none either, so
        that the weight's version tells whether others have overwritten it, as `load_state_dict` does.
        """
        self.follow(weight)
        if weight is not self.parameter:
            self.parameter = self.parameter.detach()[:0].clone()  # FSDP has its parts; the whole is not to be kept
            self.write(values.detach(), weight)
        elif self.written != (versions := (values._version, weight._version)):
            self.write(values.detach(), weight)
            self.written = versions


class _Linear(torch.autograd.Function):
    """A linear layer; `across` if its weight is stored [in, out], as Conv1D does."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, weight: Tensor, bias: Tensor | None, place: Place, across: bool
    ) -> Tensor:
        # A weight that is not the place's own is there for this pass alone (FSDP), and comes back without the patch.
        ctx.passing = weight is not place.parameter
        ctx.save_for_backward(x, weight, values if ctx.passing else None)
        ctx.place, ctx.across = place, across
        matrix = weight.to(x.dtype)
        outputs = nn.functional.linear(x.reshape(-1, x.shape[-1]), matrix.T if across else matrix, bias)
        # Of more than two dimensions it would be a view, which what follows could not change in place (x += y).
        result: Tensor = torch.ops.aten._unsafe_view.default(outputs, [*x.shape[:-1], outputs.shape[-1]])
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise DeltaError(
                "gradients of gradients (create_graph=True) do not reach the nonzeros of linear layers; take first ones"
            )
        (grad,) = grads
        x, weight, values = ctx.saved_tensors
        if ctx.passing:
            ctx.place.write(values, weight)
        outputs, inputs = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        left, right = (inputs, outputs) if ctx.across else (outputs, inputs)
        found = ctx.place.gather(lambda start, stop: left[:, start:stop].T @ right)
        if not torch.compiler.is_compiling():
            ctx.place.written = None
        back = None
        if ctx.needs_input_grad[0]:
            matrix = weight.to(grad.dtype)
            back = grad @ (matrix.T if ctx.across else matrix)
        return back, found, None, outputs.sum(0) if ctx.needs_input_grad[3] else None, None, None


class _Embedding(torch.autograd.Function):
    """A table of which a batch uses few rows: their gradients alone are made."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, values: Tensor, weight: Tensor, padding: int | None, place: Place) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.padding, ctx.place = padding, place
        return nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (ids,) = grads, ctx.saved_tensors
        place: Place = ctx.place
        used, inverse = ids.reshape(-1).unique(return_inverse=True)
        positions = place.positions.long()
        place.written = None
        if not len(used):
            return None, torch.zeros(len(positions), dtype=torch.float32, device=grad.device), None, None, None
        sums = torch.zeros(len(used), grad.shape[-1], dtype=torch.float32, device=grad.device)
        sums.index_add_(0, inverse, grad.reshape(-1, grad.shape[-1]).float())
        if ctx.padding is not None:
            sums[used == ctx.padding] = 0
        rows, columns = positions // place.columns, positions % place.columns
        at = torch.searchsorted(used, rows).clamp(max=len(used) - 1)
        return None, place.masked(torch.where(used[at] == rows, sums[at, columns], 0)), None, None, None


class _Alias(torch.autograd.Function):
    """The weight itself, for whatever uses it; its dense gradient is there in whole until it is gathered."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, place: Place) -> Tensor:
        ctx.place = place
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        place: Place = ctx.place
        matrix = grads[0].reshape(-1, max(place.columns, 1))
        found = place.gather(lambda start, stop: matrix[start:stop])
        if not torch.compiler.is_compiling():
            place.written = None
        return found, None, None


def patch(model: nn.Module, sources: Mapping[nn.Parameter, Source]) -> None:
    """Makes weights pass their gradients on to nonzeros, whatever uses them, until `unpatch`.

    A module that holds such a weight gets a class of its own, derived from what it was, in which the weight is a
    property; parameters, names and the state dict stay as they were.
    """
    for module in model.modules():
        own = {name: sources[p] for name, p in module._parameters.items() if p is not None and p in sources}
        if own:
            module.__dict__["_nonzeros"] = own
            module.__class__ = _derived(type(module), tuple(own))  # type: ignore[arg-type]


def unpatch(modules: Iterable[nn.Module]) -> None:
    """Takes out what `patch` did to some modules; others stay as they are."""
    for module in modules:
        if is_patched(module):
            module.__class__ = type(module).__mro__[1]
            del module.__dict__["_nonzeros"]


def is_patched(module: nn.Module) -> bool:
    """Whether it is a module whose weights pass their gradients on."""
    return "_nonzeros" in module.__dict__


@cache
def _derived(kind: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    members: dict[str, Any] = {name: _property(name) for name in names}
    if "weight" in names:
        if kind is nn.Linear or (kind.__name__, kind.__module__) == ("Conv1D", "transformers.pytorch_utils"):
            members["forward"] = _linear_forward
        elif kind is nn.Embedding:
            members["forward"] = _embedding_forward
    return type(kind.__name__, (kind,), {**members, "__module__": kind.__module__, "__reduce_ex__": _reduce})


def _reduce(module: nn.Module, protocol: Any) -> Any:
    """For copies and pickles: the class is not found by its name, and so made anew."""
    kind: Any = type(module).__mro__[1]
    make, given, *state = kind.__reduce_ex__(module, protocol)
    if make is copyreg.__newobj__:  # type: ignore[attr-defined]
        make, given = _made, (kind, tuple(module._nonzeros), *given[1:])  # type: ignore[arg-type]
    return (make, given, *state)


def _made(kind: type[nn.Module], names: tuple[str, ...], *given: Any) -> nn.Module:
    made = _derived(kind, names)  # type: ignore[arg-type]
    return made.__new__(made, *given)


def _property(name: str) -> property:
    def get(module: nn.Module) -> Tensor:
        weight, values, place = _current(module, name)
        if not torch.is_grad_enabled() or not values.requires_grad or is_spread(weight):
            return weight
        if weight is place.parameter:
            result: Tensor = _Alias.apply(values, weight, place)  # type: ignore[no-untyped-call]
            return result
        # One that is there for this pass alone would be read without the patch by the backward pass.
        total = place.total(values).to(weight.dtype)
        return weight.reshape(-1).index_put([place.positions.long()], total).view_as(weight)

    return property(get)


def _linear_forward(module: nn.Module, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return _plain(module, x)
    weight, values, place = _current(module, "weight")
    bias: Tensor | None = module.bias  # type: ignore[assignment]
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
        bias = None if bias is None else bias.to(x.dtype)
    across = type(module).__name__ == "Conv1D"
    result: Tensor = _Linear.apply(x, values, weight, bias, place, across)  # type: ignore[no-untyped-call]
    return result


def _embedding_forward(module: nn.Embedding, ids: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return _plain(module, ids)
    weight, values, place = _current(module, "weight")
    if module.max_norm is not None or module.scale_grad_by_freq:
        raise DeltaError("an embedding with max_norm or scale_grad_by_freq rewrites its weights; switch that off")
    if torch.compiler.is_compiling():  # which rows a batch uses is not known while tracing
        return nn.functional.embedding(ids, module.weight, module.padding_idx)
    result: Tensor = _Embedding.apply(ids, values, weight, module.padding_idx, place)  # type: ignore[no-untyped-call]
    return result


def _plain(module: nn.Module, x: Tensor) -> Tensor:
    """As the module's own class does it."""
    result: Tensor = type(module).__mro__[1].forward(module, x)  # type: ignore[attr-defined]
    return result


def _current(module: nn.Module, name: str) -> tuple[Tensor, Tensor, Place]:
    """A module's weight with its nonzeros' values in it, the values, and where they are."""
    weight = module._parameters[name]
    values, place = module._nonzeros[name](module, name)  # type: ignore[index, operator]
    assert weight is not None
    if not torch.compiler.is_compiling() and not is_spread(weight):
        place.refresh(weight, values)
    return weight, values, place


def is_spread(weight: Tensor) -> bool:
    """Whether it is FSDP's, in parts; in use, in a forward pass, it is whole."""
    return hasattr(weight, "to_local")


def flat(parameter: Tensor) -> Tensor:
    """A weight's elements, to be read and written."""
    return parameter.data.view(-1)
