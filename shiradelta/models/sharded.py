"""DTensors, as tensor parallelism and FSDP2 make them: which elements of a tensor this process has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from shiradelta.models.memory import is_sharded, own_part
from shiradelta.models.names import Shape
from shiradelta.models.refusals import Refusal, RefusalKind
from shiradelta.models.views import Box, View, contiguous


def ranks_of(tensors: Iterable[Any]) -> list[int]:
    """The ranks that DTensors are spread over, in the default group."""
    meshes = {tensor.device_mesh for tensor in tensors if is_sharded(tensor)}
    return sorted({rank for mesh in meshes for rank in mesh.mesh.flatten().tolist()})


def refusal_of_placements(tensor: Any) -> Refusal | None:
    """Why this process cannot write its part of a DTensor, whatever that part is."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    if tensor.device_mesh.get_coordinate() is None:
        what = "is a DTensor of which this process has no part"
        return Refusal(RefusalKind.DISTRIBUTED, what, "make a HotSwap in the processes of its mesh only")
    for placement in tensor.placements:
        if not isinstance(placement, Replicate | Shard | _StridedShard):
            what = f"is a DTensor with the placement {placement}, whose elements no process has"
            return Refusal(RefusalKind.DISTRIBUTED, what, "redistribute it as Shard or Replicate")
    try:
        Spread().of(tensor)
    except _OtherSizeError as error:
        return Refusal(RefusalKind.DISTRIBUTED, str(error), "apply the delta before the model is distributed")
    return None


class Rows(NamedTuple):
    """A run of a tensor's elements: the rows that this process has.

    Attributes:
        start: position of the first element.
        stop: the one behind the last; not larger where this process has none.
        number: of this run among those of all processes, in the order of the positions.
        members: how many runs there are; copies of one count once.
    """

    start: int
    stop: int
    number: int
    members: int


def rows_of(tensor: Any, views: Sequence[View]) -> Rows | None:
    """The rows of a DTensor that this process has, where each process has a run of them; None where that is not so.

    Args:
        tensor: the DTensor.
        views: what `Spread` finds of it.
    """
    from torch.distributed.tensor import Replicate, Shard

    number, members = 0, 1
    for at, size, placement in zip(
        tensor.device_mesh.get_coordinate(), tensor.device_mesh.shape, tensor.placements, strict=True
    ):
        if type(placement) is Shard and placement.dim == 0:
            number, members = number * size + at, members * size
        elif type(placement) is not Replicate:
            return None
    if members == 1:
        return None
    return Rows(*(views[0].stored.span if views else (0, 0)), number, members)


class _OtherSizeError(Exception):
    """A part has another size than its placements say."""


class _Stretch(NamedTuple):
    """Neighbours along one dimension that a process has.

    Attributes:
        start: index of the first one in the tensor.
        own: its index in the process's part.
        size: how many they are.
    """

    start: int
    own: int
    size: int


class Spread:
    """Finds this process's parts of DTensors."""

    def __init__(self) -> None:
        self._known: dict[Any, list[_Stretch]] = {}

    def of(self, tensor: Any) -> tuple[View, ...]:
        """The elements of a DTensor that this process has, in its part of it: boxes, and none where it has none."""
        shape, own = tuple(tensor.shape), tuple(own_part(tensor).shape)
        runs = [self._stretches(tensor, dim) for dim in range(len(shape))]
        sizes = tuple(sum(run.size for run in some) for some in runs)
        if (0 not in own and sizes != own) or (0 in own and 0 not in sizes):
            raise _OtherSizeError(f"is a DTensor of which this process has {own} elements, and should have {sizes}")
        whole, part = contiguous(shape).strides, contiguous(own).strides
        views = []
        for chosen in product(*runs):
            box = tuple(run.size for run in chosen)
            stored = Box(box, whole, _reach(whole, [run.start for run in chosen]))
            weight = Box(box, part, _reach(part, [run.own for run in chosen]))
            views.append(View("", shape, weight, stored, contiguous(own).numel))
        return tuple(view for view in views if view.stored.numel)

    def _stretches(self, tensor: Any, dim: int) -> list[_Stretch]:
        """What this process has along a dimension.  torch itself spreads the indices as it spreads the tensor."""
        import torch
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor
        from torch.distributed.tensor.placement_types import _StridedShard

        size, mesh = tensor.shape[dim], tensor.device_mesh
        along: list[Any] = []
        for placement in tensor.placements:
            if getattr(placement, "dim", None) != dim:
                along.append(Replicate())
            elif isinstance(placement, _StridedShard):
                along.append(_StridedShard(0, split_factor=placement.split_factor))
            else:
                along.append(Shard(0))
        key = mesh, tuple(along), size
        if key not in self._known:
            indices = torch.arange(size, device=mesh.device_type)
            if any(not isinstance(one, Replicate) for one in along):
                indices = own_part(distribute_tensor(indices, mesh, along, src_data_rank=None))
            self._known[key] = _stretches_in(indices.cpu().numpy())
        return self._known[key]


def _stretches_in(indices: np.ndarray[Any, Any]) -> list[_Stretch]:
    starts = np.flatnonzero(np.diff(indices, prepend=-2) != 1).tolist()
    ends = [*starts[1:], len(indices)]
    return [_Stretch(int(indices[own]), own, end - own) for own, end in zip(starts, ends, strict=False) if end > own]


def _reach(strides: Shape, at: list[int]) -> int:
    return sum(stride * index for stride, index in zip(strides, at, strict=True))
