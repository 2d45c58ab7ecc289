"""The processes that a model is spread over.  What they do together, all of them do, or none does."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol, TypeVar
from uuid import uuid4

from shiradelta.errors import ArgumentError, TargetError
from shiradelta.hotswap.groups import forget_group, group_of
from shiradelta.models.live import Target, elsewhere
from shiradelta.models.sharded import ranks_of
from shiradelta.util.text import brief

ResultT = TypeVar("ResultT")

_DONE, _UNDONE = "done", "undone"

#: What a session of which a process is lost can still do.
_REVERT = "only revert() works now, in each process for itself: start the processes again"

#: Seconds that gloo can wait: it counts milliseconds, and sums of nanoseconds.
_SHORTEST, _LONGEST = 0.001, 1e8


class Ranks(Protocol):
    """The processes that take part in the calls of a session.

    Attributes:
        alone: whether this process is the only one.
        lost: whether another has ended, or did not answer in time.  Nothing more can be done together.
        members: their ranks in the default group; empty for a process alone.
    """

    alone: bool
    lost: bool
    members: Sequence[int]

    def agree(self, what: str, work: Callable[[], ResultT]) -> ResultT:
        """Does work that writes nothing, as all others do, and returns its result here.

        Args:
            what: the call, for messages; the same in all processes.
            work: the work.

        Raises:
            TargetError: another process refused the call, makes another one, or does not answer.
            BaseException: what the work raised here.
        """

    def check(self) -> None:
        """Checks that no process is known to be lost.  Raises TargetError."""

    def gather(self, known: ResultT) -> list[ResultT]:
        """What all processes know, in the order of their ranks; called after `agree`.  Raises TargetError as that."""

    def decide(self, what: str, error: BaseException | None) -> None:
        """Ends a call that may have written weights: it counts if all processes did it, and is to be undone otherwise.

        Every process ends such a call with this, also one that refused it or had nothing to write.

        Args:
            what: the call, for messages.
            error: why this process could not do it; None if it did.

        Raises:
            TargetError: another process could not do it, or does not answer.
            BaseException: the error.
        """


class Alone(Ranks):
    """This process alone."""

    alone, lost = True, False
    members = ()

    def agree(self, what: str, work: Callable[[], ResultT]) -> ResultT:
        return work()

    def check(self) -> None:
        pass

    def gather(self, known: ResultT) -> list[ResultT]:
        return [known]

    def decide(self, what: str, error: BaseException | None) -> None:
        if error is not None:
            raise error


class Together(Ranks):
    """Several processes, with a gloo group of their own.

    Votes travel in the group, so the end of a process is noticed at once.  Whether a call counts is decided in one
    place, the store of the default group: the first process that has all votes, or has waited long enough, writes it
    there, and the others obey.

    Args:
        ranks: their ranks in the default group.
        timeout: seconds to wait for a process.
        remedy: what to do when one is lost.
    """

    alone = False

    def __init__(self, ranks: Sequence[int], timeout: float, remedy: str = _REVERT) -> None:
        import torch.distributed as dist

        self.lost, self._remedy = False, remedy
        self._dist, self._timeout, self.members = dist, timeout, list(ranks)
        self._own = dist.get_rank()
        try:
            self._group = group_of(tuple(ranks), timeout)
        except RuntimeError as error:
            raise self._lost_error(error) from None
        self._store = dist.distributed_c10d._get_default_store()
        self._votes, self._last_key = 0, ""
        self._name = self._exchange(uuid4().hex)[0]

    def agree(self, what: str, work: Callable[[], ResultT]) -> ResultT:
        error: BaseException | None = None
        try:
            result = work()
        except BaseException as raised:
            error = raised
        self._vote(what, error)
        return result

    def check(self) -> None:
        if self.lost:
            raise self._lost_error()

    def gather(self, known: ResultT) -> list[ResultT]:
        return self._exchange(known)

    def decide(self, what: str, error: BaseException | None) -> None:
        failed: BaseException | None = None
        try:
            self._vote(what, error)
        except BaseException as raised:
            failed = raised
        try:
            key, before = f"shiradelta/{self._name}/{self._votes}", self._last_key
            decision = self._store.compare_set(key, "", _UNDONE if failed else _DONE).decode()
            self._last_key = key
            if self._own == self.members[0] and before:
                with suppress(Exception):  # not every store deletes
                    self._store.delete_key(before)  # all others have read it, as they have voted since
        except Exception as unreachable:  # the process that has the store has ended
            self.lost, decision = True, _UNDONE
            failed = failed or self._lost_error(unreachable)
        if decision != _DONE:
            raise failed or TargetError(f"another rank could not do {what}, so that nothing has changed; try again")

    def _vote(self, what: str, error: BaseException | None) -> None:
        self._votes += 1  # in all processes, whatever comes of it
        said = f"{type(error).__name__}: {error}" if error is not None else None
        try:
            if self._all_agree(what, error is None):
                return
            votes = self._exchange((what, said))
        except TargetError:
            if error is not None:
                raise error from None
            raise
        if error is not None:
            raise error
        for rank, (other, refusal) in zip(self.members, votes, strict=True):
            if other != what:
                raise TargetError(
                    f"rank {rank} calls {brief(other, 80)} where rank {self._own} calls {brief(what, 80)}; make the"
                    " same calls in all processes, in the same order"
                )
            if refusal is not None:
                raise TargetError(f"rank {rank} refuses {what}, so that no rank changes: {refusal}")

    def _all_agree(self, what: str, agrees: bool) -> bool:
        """Whether all ranks make the same call and agree.  One exchange of few bytes: most calls need no more."""
        import torch

        call = int.from_bytes(hashlib.blake2b(what.encode(), digest_size=8).digest(), "little", signed=True)
        own = torch.tensor([call, int(agrees)])
        found = [torch.empty_like(own) for _ in self.members]
        self._together(lambda: self._dist.all_gather(found, own, group=self._group))
        return all(one.tolist() == [call, 1] for one in found)

    def _exchange(self, own: Any) -> list[Any]:
        found: list[Any] = [None] * len(self.members)
        self._together(lambda: self._dist.all_gather_object(found, own, group=self._group))
        return found

    def _together(self, exchange: Callable[[], object]) -> None:
        """Does what all ranks do at once.  After a failure the group is lost."""
        self.check()
        try:
            exchange()
        except BaseException as error:  # Ctrl-C, too, may leave the others in the middle of it
            self.lost = True
            forget_group(tuple(self.members), self._timeout)
            if isinstance(error, RuntimeError | ValueError):
                raise self._lost_error(error) from None
            raise

    def _lost_error(self, why: Exception | None = None) -> TargetError:
        reason = f" ({brief(str(why), 80)})" if why is not None else ""
        return TargetError(f"a rank has ended, or did not answer within {self._timeout:g} s{reason}; {self._remedy}")


@contextmanager
def agreed(ranks: Ranks, what: str) -> Iterator[None]:
    """A context whose work all processes do: an error in one of them is an error in all; as `Ranks.agree`."""
    error: BaseException | None = None
    try:
        yield
    except BaseException as raised:
        error = raised

    def say() -> None:
        if error is not None:
            raise error

    ranks.agree(what, say)


def ranks_for(targets: Mapping[str, Target], group: Any, timeout: float) -> Ranks:
    """The processes that a model is spread over.

    Args:
        targets: the model's tensors in this process, by name.
        group: a process group; None for the ranks of the model's DTensors.
        timeout: seconds to wait for a process.

    Raises:
        ArgumentError: the group is none that this process is in, or no process can wait that long.
    """
    if not _SHORTEST <= timeout <= _LONGEST:
        raise ArgumentError(f"timeout={timeout!r} is no time to wait; give seconds, from {_SHORTEST} to {_LONGEST:.0e}")
    if group is None:
        ranks = ranks_of(target.holder for target in targets.values())
    else:
        import torch.distributed as dist

        try:
            ranks = dist.get_process_group_ranks(group)
        except (AttributeError, KeyError, ValueError, RuntimeError):
            raise ArgumentError(
                f"group {brief(repr(group))} is no process group; give one of torch.distributed"
            ) from None
        if dist.get_rank() not in ranks:
            raise ArgumentError("this process is not in the group; make a HotSwap in its processes only")
    return Together(ranks, timeout) if len(ranks) > 1 else Alone()


def with_those_elsewhere(targets: dict[str, Target], ranks: Ranks) -> dict[str, Target]:
    """The tensors of a model by name, also those of which this process has nothing."""
    if ranks.alone:
        return targets
    own = {name: (target.known_shape, target.dtype) for name, target in targets.items()}
    found = dict(targets)
    for names in ranks.gather(own):
        for name, (shape, dtype) in names.items():
            mine = found.get(name)
            is_unknown = mine is not None and mine.extent is not None and not mine.parts and mine.dtype == "?"
            if shape is not None and dtype != "?" and (mine is None or is_unknown):
                found[name] = elsewhere(name, shape, dtype)
    return found
