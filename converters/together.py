"""A conversion that several processes make together: each takes some of the tensors, and the first writes the file."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shiradelta.errors import ArgumentError, SourceError, TargetError
from shiradelta.format.digest import tensor_digest
from shiradelta.io.reader import open_delta
from shiradelta.io.writer import DeltaWriter, writing
from shiradelta.util.text import brief

from .report import TensorReport


class Crew:
    """The processes of a group, which make one conversion.

    Args:
        group: a process group of torch.distributed; None for this process alone.

    Raises:
        ArgumentError: it is no group that this process is in.
    """

    def __init__(self, group: Any = None) -> None:
        self._group, self._rank, self._count = group, 0, 1
        if group is not None:
            import torch.distributed as dist

            try:
                self._rank, self._count = dist.get_rank(group), dist.get_world_size(group)
            except (AttributeError, KeyError, ValueError, RuntimeError):
                raise ArgumentError(
                    f"group {brief(repr(group))} is no process group; give one of torch.distributed"
                ) from None
            if self._rank < 0:
                raise ArgumentError("this process is not in the group; convert in its processes only")

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self._count == 1

    @property
    def first(self) -> bool:
        """Whether this process writes the file."""
        return self._rank == 0

    @contextmanager
    def writing(self, target: Path, values: str, zstd: bool, backend: str) -> Iterator[DeltaWriter]:
        """A context with a writer: of the file in the first process, of a part in memory in the others."""
        if self._rank == 0:
            with writing(target, values, zstd, backend, packed=zstd) as writer:
                yield writer
        else:
            yield DeltaWriter(io.BytesIO(), values, False, backend)

    def reports(self, writer: DeltaWriter, count: int, work: Callable[[int], TensorReport]) -> list[TensorReport]:
        """Does a part of the work, and gives the first process's writer what the others have made.

        Args:
            writer: the one of `writing`, to which the work adds tensors.
            count: how many tensors there are.
            work: converts the tensor with that number.

        Returns:
            The reports of all tensors, in all processes.

        Raises:
            SourceError: another process could not do its part.
            TargetError: another process has ended.
            Exception: what the work raised here.
        """
        if self.alone:
            return [work(number) for number in range(count)]
        error: Exception | None = None
        made: dict[int, TensorReport] = {}
        try:
            for number in range(self._rank, count, self._count):
                made[number] = work(number)
        except Exception as raised:
            error = raised
        said = None if error is None else f"{type(error).__name__}: {error}"
        found = self._exchange((said, made))
        if error is not None:
            raise error
        for rank, (refusal, _) in enumerate(found):
            if refusal is not None:
                raise SourceError(f"rank {rank} of {self._count} could not convert its part: {refusal}")
        part = io.BytesIO()
        if self._rank:
            writer.finish(part)
        for data in self._gather(part.getvalue())[1:]:
            _add(writer, data)
        every = {number: one for _, some in found for number, one in some.items()}
        return [every[number] for number in range(count)]

    def size(self, target: Path) -> int:
        """The size of the file that the first process has written."""
        size = target.stat().st_size if self._rank == 0 else 0
        return size if self.alone else int(self._exchange(size)[0])

    def _exchange(self, own: Any) -> list[Any]:
        """What all processes give, in the order of their ranks."""
        import torch.distributed as dist

        found: list[Any] = [None] * self._count
        with _answered():
            dist.all_gather_object(found, own, group=self._group)
        return found

    def _gather(self, own: bytes) -> list[bytes]:
        """What all processes give, in the first one; nothing in the others."""
        import torch.distributed as dist

        found: list[Any] = [None] * self._count if self._rank == 0 else []
        with _answered():
            dist.gather_object(own, found or None, dist.get_global_rank(self._group, 0), self._group)
        return found


@contextmanager
def _answered() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        why = brief(str(error), 80)
        raise TargetError(f"another rank has ended, or does not answer ({why}); start all of them again") from None


def _add(writer: DeltaWriter, data: bytes) -> None:
    """Gives a writer the tensors of a part."""
    with open_delta(data) as part:
        for stored in part.values():
            record = stored.record
            index, values = (stored.section(one).tobytes() for one in (record.index, record.values))
            writer.add_sections(record, tensor_digest(stored), index, values)
