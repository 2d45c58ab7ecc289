"""Least squares on the second moments of each layer's inputs, layer by layer, from forward passes alone.

For a linear layer with the student's inputs X and the teacher's outputs Y, it minimises |X (W + S)' - Y|^2 over S with
few nonzeros.  X comes from layers that are refitted already, so later layers compensate for the error of earlier ones.
Only X'X and X'(Y - X W') are needed of X and Y.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from itertools import chain
from typing import cast

import torch
from torch import Tensor, nn

from shiradelta.fit.refit.replay import Replay, watching
from shiradelta.fit.tuned_weights import Rounding, TunedWeights
from shiradelta.models.layers import is_conv1d
from shiradelta.nonzeros.vector import Nonzeros
from shiradelta.select.largest_torch import largest

#: Added to the diagonal, as a share of its mean, because some hundred texts do not span all inputs.
DAMPING = 0.1
#: Number of candidates at first, as a multiple of the nonzeros that are kept, and rounds in which they are pruned.
CANDIDATES, ROUNDS = 5.0, 4
#: Relative error within which two ways to compute a linear layer agree in bfloat16.
ALIKE = 0.02
#: Elements of the small systems that are solved together: those that fit a core's cache, or that keep a GPU busy.
_SOLVED, _SOLVED_ON_GPU = 1 << 20, 1 << 26


class Enough(Exception):  # noqa: N818
    """Raised to end a forward pass early."""


def refit(
    linears: Sequence[nn.Module],
    forward: Callable[[Sequence[int]], object],
    teacher: Callable[[], AbstractContextManager[None]],
    nonzeros: Nonzeros,
    quantiser: Callable[[Mapping[int, Tensor]], Rounding],
    parts: Sequence[Sequence[int]],
    weights: Callable[[Sequence[int], int], Tensor | None] = lambda part, rows: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    model: nn.Module | None = None,
) -> list[int]:
    """Gives linear layers a new mask and new values; other tensors keep theirs.

    Args:
        linears: the layers that may be refitted, as `own_linears` finds them.
        forward: runs the model on some examples.
        teacher: a context in which `forward` runs the teacher.
        nonzeros: mask and values to begin with; each tensor keeps its number of nonzeros.
        quantiser: takes the positions of some tensors, by index; what it returns rounds their values as a reader will
            see them, so that later layers compensate.
        parts: examples of each forward pass.
        weights: (a part, rows that a layer gets of it) -> how much each row counts; None if all count alike.
        progress: called with (layers done, number of layers).
        model: what `forward` runs, once and with nothing but the examples to depend on; passes go through its layers a
            few times each then (`Replay`).  None if that is unknown.

    Returns:
        Indices of the tensors that keep theirs.
    """
    positions, values = nonzeros.by_tensor(nonzeros.positions), nonzeros.by_tensor(nonzeros.values)
    index_of = {id(part.parameter): index for index, part in enumerate(nonzeros.parts)}

    def write(indices: Sequence[int]) -> None:
        if indices:
            here = {index: positions[index] for index in indices}
            parts_of = [nonzeros.parts[index] for index in indices]
            some = Nonzeros([p.parameter for p in parts_of], [p.stored for p in parts_of], list(here.values()))
            some.values = some.joined([values[index] for index in indices])
            some.write(quantiser(here)(some.values))
            done.append(some)

    nonzeros.write(None)
    chains: list[Sequence[nn.Module]] = []
    with nullcontext() if model is None else watching(model, chains):
        groups = _groups([module for module in linears if id(module.weight) in index_of], lambda: forward(parts[0]))
    replay = Replay(chains, passes=2 * len(parts))
    linear = {index_of[id(module.weight)] for group in groups for module in group}
    left = [index for index in index_of.values() if index not in linear]
    done: list[Nonzeros] = []
    write(left)
    for number, group in enumerate(groups):
        progress(number, len(groups))
        indices = [index_of[id(module.weight)] for module in group]
        replay.go_on(group, chain.from_iterable(groups[number + 1 :]))
        moments = _moments(partial(replay.run, forward), teacher, group, parts, weights)
        if moments is None or not moments[0].any():  # no example reaches it, or only zeros do: it keeps its values
            write(indices)
            left += indices
            continue
        inputs, crosses = moments
        for module, index, cross in zip(group, indices, crosses, strict=True):
            positions[index], values[index] = solve(inputs, cross, positions[index].numel())
            if is_conv1d(module):
                rows, columns = len(inputs), cross.shape[1]
                positions[index], order = (positions[index] % rows * columns + positions[index] // rows).sort()
                values[index] = values[index][order]
        write(indices)
    for some in done:
        some.write(None)
    nonzeros.reset(positions, values)
    return left


def own_linears(model: nn.Module) -> list[nn.Module]:
    """Linear layers whose weight no other module uses: a tied weight has more inputs than the layer's own."""
    users = Counter(id(weight) for module in model.modules() for weight in module.parameters(recurse=False))
    found = (m for m in model.modules() if isinstance(m, nn.Linear) or is_conv1d(m))
    return [module for module in found if users[id(module.weight)] == 1]


def left_out(model: nn.Module, fitted: TunedWeights, left: Sequence[int]) -> list[str]:
    """Names of matrices and stacks of matrices among the weights that `refit` left; of embeddings that is expected."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    weights = ((fitted.targets[index].name, fitted.weights[index]) for index in left)
    return [name for name, weight in weights if weight.dim() > 1 and id(weight) not in tables]


def left_out_warnings(names: Sequence[str]) -> list[str]:
    """The warning of weights that `left_out` names."""
    if not names:
        return []
    some = "1 weight keeps its" if len(names) == 1 else f"{len(names)} weights keep their"
    return [
        f"{some} largest changes, because least squares refits plain linear layers that the examples reach, not stacked"
        f" experts, convolutions and the like, such as {names[0]!r}; method 'train' fits them"
    ]


def _groups(linears: Sequence[nn.Module], forward: Callable[[], object]) -> list[list[nn.Module]]:
    """Linear layers in the order of their calls; layers with the same input are grouped.

    Layers whose class computes something else than a linear layer, such as routers, are left out.
    """
    groups: list[list[nn.Module]] = []
    last: list[Tensor] = []
    seen: set[int] = set()
    others: set[nn.Module] = set()

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if id(module.weight) in seen or not inputs:  # a layer that is called twice has two inputs
            return
        seen.add(id(module.weight))
        if last and last[0] is inputs[0]:
            groups[-1].append(module)
        else:
            groups.append([module])
            last[:] = [inputs[0]]

    def after(module: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
        if not inputs or not _is_linear(module, inputs[0], output):
            others.add(module)

    hooks = [module.register_forward_pre_hook(hook) for module in linears]
    hooks += [module.register_forward_hook(after) for module in linears]
    with torch.no_grad(), _removing(hooks):
        forward()
    kept = ([module for module in group if module not in others] for group in groups)
    return [group for group in kept if group]


def _is_linear(module: nn.Module, x: Tensor, output: object) -> bool:
    """Whether a layer's output is that of a plain linear layer; a class derived from one may compute anything."""
    if type(module).forward is nn.Linear.forward or is_conv1d(module):
        return True
    expected = nn.Linear.forward(cast(nn.Linear, module), x)
    if not isinstance(output, Tensor) or output.shape != expected.shape:
        return False
    return bool((output.float() - expected.float()).norm() <= ALIKE * expected.float().norm())


def _moments(
    run: Callable[[str, Sequence[int]], object],
    teacher: Callable[[], AbstractContextManager[None]],
    group: list[nn.Module],
    parts: Sequence[Sequence[int]],
    weights: Callable[[Sequence[int], int], Tensor | None],
) -> tuple[Tensor, list[Tensor]] | None:
    """(X'X of a group's common input, X'(Y - X W') of each layer); None if no part calls all layers of the group."""
    sums: list[Tensor] = []
    for part in parts:
        with teacher():
            tuned = _outputs(partial(run, "teacher"), group, part)
        own = _outputs(partial(run, "student"), group, part)
        if tuned is None or own is None or tuned[0].shape != own[0].shape:  # experts that this part is not routed to
            continue
        (_, expected), (x, found) = tuned, own
        counts = weights(part, len(x))
        counted = x if counts is None else x * counts[:, None].to(x)
        terms = [counted.T @ x, *(counted.T @ (e - f) for e, f in zip(expected, found, strict=True))]
        sums = [total + term for total, term in zip(sums, terms, strict=True)] if sums else terms
    return (sums[0], sums[1:]) if sums else None


def _outputs(
    forward: Callable[[Sequence[int]], object], group: list[nn.Module], part: Sequence[int]
) -> tuple[Tensor, list[Tensor]] | None:
    """(the group's input, its layers' outputs) as matrices; None if not all are called.  Ends the pass after them."""
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def hook(number: int, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found[number] = inputs[0], output
        if len(found) == len(group):
            raise Enough

    hooks = [module.register_forward_hook(partial(hook, number)) for number, module in enumerate(group)]
    with torch.no_grad(), _removing(hooks), suppress(Enough):
        forward(part)
    if len(found) < len(group):
        return None
    outputs = [found[number][1] for number in range(len(group))]
    x = found[0][0]
    return x.reshape(-1, x.shape[-1]).float(), [y.reshape(-1, y.shape[-1]).float() for y in outputs]


@contextmanager
def _removing(hooks: Sequence[torch.utils.hooks.RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def solve(inputs: Tensor, cross: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(positions, increasing; values) of the `count` nonzeros of S [outputs, inputs].

    The candidates are the largest of the dense solution.  Each round prunes those whose removal costs least, given that
    the others of their row compensate (the rule of the optimal brain surgeon), and solves for the rest again.
    """
    inputs = inputs + DAMPING * inputs.diagonal().mean().clamp(min=1e-12) * torch.eye(len(inputs)).to(inputs)
    dense = torch.linalg.solve(inputs, cross).T.contiguous()
    importance = dense.abs() * inputs.diagonal().sqrt()
    numel = dense.numel()
    left = [min(numel, round(count * CANDIDATES ** (1 - r / (ROUNDS - 1)))) for r in range(ROUNDS)]
    chosen = largest(importance.view(-1), left[0])
    values, costs = _restricted(inputs, cross, chosen)
    for size in [*left[1:-1], min(count, numel)]:
        kept = largest(costs, size)
        chosen = chosen[kept]
        values, costs = _restricted(inputs, cross, chosen)
    return chosen, values


def _restricted(inputs: Tensor, cross: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """(least-squares values at the positions, cost of removing each one alone)."""
    size, rows = cross.shape
    row, column = positions // size, positions % size
    counts = torch.bincount(row, minlength=rows)
    first = counts.cumsum(0) - counts
    values, costs = torch.zeros_like(positions, dtype=inputs.dtype), torch.zeros_like(positions, dtype=inputs.dtype)
    # Rows of similar count are solved together, so that there is little padding.
    order = counts.argsort()[int((counts == 0).sum()) :]
    most = _SOLVED if positions.device.type == "cpu" else _SOLVED_ON_GPU
    while len(order):
        width = int(counts[order[-1]])
        batch = order[-max(1, most // (width * width)) :]
        order = order[: len(order) - len(batch)]
        slot = torch.arange(width, device=positions.device)
        there = slot < counts[batch][:, None]
        at = torch.where(there, first[batch][:, None] + slot, 0)
        columns = column[at]
        system = inputs[columns[:, :, None], columns[:, None, :]] * (there[:, :, None] & there[:, None, :])
        system += torch.diag_embed((~there).to(system.dtype))
        # The inverse of a root instead of `cholesky_inverse`, which takes one system at a time on a GPU.
        one = torch.eye(width).to(system).expand_as(system)
        root = torch.linalg.solve_triangular(torch.linalg.cholesky(system), one, upper=False)
        solution = (root.mT @ (root @ (cross[columns, batch[:, None]] * there).unsqueeze(2))).squeeze(2)
        cost = solution.square() / root.square().sum(1)  # by the diagonal of the inverse
        values[at[there]], costs[at[there]] = solution[there], cost[there]
    return values, costs
