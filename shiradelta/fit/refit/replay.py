"""Forward passes in which layers that are done with give what they gave before.

Least squares by layer need passes up to each layer.  Were all of these run from the start, their cost would grow with
the square of the number of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from shiradelta.models.forward import forward_replaced
from shiradelta.models.placement import layer_lists

#: Outputs are kept if those of all passes take at most this many bytes; otherwise every pass runs all layers.
MOST_BYTES = 4 << 30

#: Whose pass it is, and its examples.
PassKey = tuple[str, tuple[int, ...]]


class Replay:
    """Keeps what the last layer gave that is done with, for each pass.

    Args:
        chains: lists of layers, each of which gets what the one before it gives (`watching`).
        passes: how many different passes there are.
    """

    def __init__(self, chains: Sequence[Sequence[nn.Module]], passes: int) -> None:
        self._chains, self._passes = chains, passes
        self._chain: Sequence[nn.Module] = ()
        self._done = 0
        self._now: PassKey = ("", ())
        #: Pass -> (number of the layer in the chain, its output).
        self._kept: dict[PassKey, tuple[int, Any]] = {}

    def go_on(self, group: Sequence[nn.Module], ahead: Iterable[nn.Module]) -> None:
        """Takes the layers before a group of linear layers for done with, but for those with linear layers still ahead.

        Only in the chain that the group is in: what reads others may read the outputs of several of their layers.
        """
        wanted = {id(module) for module in group}
        chain = next((c for c in self._chains if any(id(m) in wanted for layer in c for m in layer.modules())), ())
        if chain is not self._chain:
            self._kept.clear()
        wanted |= set(map(id, ahead))
        left = (number for number, layer in enumerate(chain) if any(id(m) in wanted for m in layer.modules()))
        self._chain, self._done = chain, next(left, 0)

    def run(self, forward: Callable[[Sequence[int]], object], whose: str, part: Sequence[int]) -> object:
        """Runs a pass, which an exception may end early."""
        self._now = whose, tuple(part)
        done = self._chain[: self._done] if self._passes else ()
        with forward_replaced(done, lambda number, own: partial(self._call, number, own)):
            return forward(part)

    def _call(self, number: int, forward: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        last, output = self._kept.get(self._now, (-1, None))
        if number > last:
            output = forward(*arguments, **keywords)
            if sum(tensor.nbytes for tensor in _tensors(output)) * self._passes > MOST_BYTES:
                self._passes = 0
                self._kept.clear()
                return output
            self._kept[self._now] = number, output
        return _copied(output)  # the next layer may write into what it gets


@contextmanager
def watching(model: nn.Module, found: list[Sequence[nn.Module]]) -> Iterator[None]:
    """Within, a pass is watched; afterwards `found` has the lists of layers that are chains.

    In a chain every layer is called once, in order, with the very tensors that the layer before it gave, and with none
    that an earlier one gave.
    """
    lists = layer_lists(model)
    place = {layer: (which, number) for which, layers in enumerate(lists) for number, layer in enumerate(layers)}
    calls: list[list[int]] = [[] for _ in lists]
    made: dict[int, tuple[int, int]] = {}  # id of a tensor -> the layer that gave it last
    given: list[Tensor] = []  # so that no other tensor gets the same id
    broken: set[int] = set()

    def before(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        which, number = place[module]
        calls[which].append(number)
        sources = [made[id(t)] for t in _tensors([*arguments, *keywords.values()]) if id(t) in made]
        own = {source for of_list, source in sources if of_list == which}
        if own != ({number - 1} if number else set()):
            broken.add(which)

    def after(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        for tensor in _tensors(output):
            given.append(tensor)
            made[id(tensor)] = place[module]

    hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in place]
    hooks += [layer.register_forward_hook(after) for layer in place]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    found += [
        layers for which, layers in enumerate(lists) if calls[which] == list(range(len(layers))) and which not in broken
    ]


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in a value, in tuples and lists too."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for each in value for tensor in _tensors(each)] if isinstance(value, (tuple, list)) else []


def _copied(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.clone()
    return tuple(map(_copied, output)) if type(output) is tuple else output
