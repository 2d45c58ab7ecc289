"""The operations that a hot-swap session needs from a backend of live tensors.

A session decides which deltas are on which tensor.  A backend holds the compressed deltas beside the tensors and works
on their elements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

from shiradelta.format.arithmetic import Array as Bits
from shiradelta.format.arithmetic import Positions
from shiradelta.format.codecs.base import Bytes
from shiradelta.hotswap.fits import Fits
from shiradelta.hotswap.layers import Array, Held, Layer, Patch, Stack
from shiradelta.io.restored import Elements
from shiradelta.models.live import Target
from shiradelta.models.views import View


class Part(NamedTuple):
    """A patch of a weight that has elements of tensors of the checkpoint.

    Attributes:
        patch: the patch.
        below: what is on the weight now, in levels.
        shown: which elements of each tensor it has: views of one another, the tensor's own first.
    """

    patch: Patch
    below: Stack
    shown: Sequence[tuple[View, ...]]


class Overwritten(NamedTuple):
    """The elements of a tensor that layers change, in NumPy.

    Attributes:
        target: the tensor.
        dtype: the dtype of its elements, as deltas call it.
        positions: where, increasing.
        base: the base's elements there, as bits.
        present: those that are there now.
    """

    target: Target
    dtype: str
    positions: Positions
    base: Bits
    present: Bits


class LiveBackend(Protocol):
    """Work on the elements of tensors in one kind of memory.  All backends give the same bits.

    Layers are given in the order of their deltas' digests.  Where several levels are given, the topmost comes first:
    the last layer that saved an element has the base's.

    Attributes:
        name: what a user calls it.
        reads_on_base: whether `hold` takes deltas that are read with their base only, of targets that are whole.  It
            decodes them with the weights that are there, and refuses them if these have another fingerprint.
    """

    name: str
    reads_on_base: bool

    def buffer(self, size: int) -> Bytes:
        """Host memory to read a file into."""

    def all_elements(self, target: Target, below: Stack) -> Elements:
        """All elements of a tensor, row by row, for a delta that is read with them only.

        Args:
            target: the tensor.
            below: what is on it, the topmost first; what they have saved takes the place of what is there.
        """

    def hold(self, files: Sequence[Fits]) -> Held:
        """Checks deltas completely and copies them, compressed, to where the targets are.

        Args:
            files: files in memory from `buffer`, with tensors to load.

        Raises:
            FormatError: a section is damaged, or the weights are not the base that it is read with.
            LimitError: a delta that is read with its base takes too much memory.
        """

    def room(self, size: int) -> Array:
        """Bytes to save elements in."""

    def fingerprints(self, held: Held, below: Sequence[Layer]) -> Callable[[], list[int]]:
        """Fingerprints of the base at each patch's positions; `below` is what is on the targets now, in levels.

        What it returns waits for them: a device may compute them until then.
        """

    def part_fingerprints(self, parts: Sequence[Part]) -> list[list[tuple[int, int]]]:
        """Fingerprints of (the base, what is there now) at the positions of patches that views show.

        Positions count as in the checkpoint's tensors.  One list a part, with one pair for each of its views.
        """

    def replace(self, before: Sequence[Layer], after: Sequence[Layer]) -> None:
        """Replaces the layers on the tensors: saves the base's elements and writes the results (FORMAT.md, 6.2).

        Layers that share their room are one delta with two strengths.  If the call raises, the patches of `after`
        that may have been written are marked as `filled`.
        """

    def restore(self, layers: Sequence[Layer]) -> None:
        """Puts back the saved elements of all patches that are `filled`."""

    def share_positions(self, one: Patch, other: Patch) -> bool:
        """Whether two patches of a target have a position in common."""

    def changed(self, layers: Sequence[Layer]) -> int:
        """Number of elements whose bits differ from the base's now; the layers are those of all levels."""

    def overwritten(self, layers: Sequence[Layer]) -> Iterator[Overwritten]:
        """What the layers have changed; they are those of all levels."""

    def stream(self, given: Any) -> Any:
        """The stream to queue work on: the given one if it is this device's, or the calling thread's current one.

        None on a CPU.
        """

    def ordered(self, stream: Any, reads: bool = False) -> AbstractContextManager[None]:
        """A context whose work follows all earlier work of this backend, on a stream that `stream` gave.

        With `reads`, leaving the block waits for the work, so later work need not.
        """
