"""A tensor of a file that is read with its base only, turned into what it does (FORMAT.md, 4.7 and 5.2)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, TypeVar

from shiradelta.backends.choose import choose
from shiradelta.errors import FormatError
from shiradelta.format.arithmetic import Array, Positions
from shiradelta.format.codecs import FROM_BASE, INDEX_CODECS, ULP_FROM_BASE, VALUE_CODECS
from shiradelta.format.codecs.base import Bytes
from shiradelta.format.codecs.from_base import FromBase
from shiradelta.format.codecs.ulp_from_base import UlpFromBase
from shiradelta.format.delta import TensorDelta
from shiradelta.format.record import Section
from shiradelta.io.reader import StoredTensor

Decoded = TypeVar("Decoded")


class Elements(ABC):
    """All elements of a tensor's base, flat, wherever they are: positions are decoded there.

    Attributes:
        any_thread: whether any thread may decode; otherwise only the one that asked for the elements, whose work on
            their device is in order.
    """

    any_thread = False

    @property
    @abstractmethod
    def size(self) -> int:
        """How many there are."""

    @property
    @abstractmethod
    def itemsize(self) -> int:
        """Bytes of each."""

    @abstractmethod
    def room(self, data: Bytes) -> int:
        """The fewest bytes of memory that `decode` takes beside its result."""

    @abstractmethod
    def decode(self, data: Bytes, nnz: int, shape: tuple[int, ...], room: int) -> Located:
        """The nonzeros of a FROM_BASE section; it is read and refused as by `FromBase.decode_on`.

        Args:
            data: the section.
            nnz: how many there are.
            shape: the tensor's.
            room: bytes of memory that it may take beside its result.
        """

    @abstractmethod
    def at(self, positions: Positions) -> Array:
        """Unsigned [positions], the elements' bits there."""


class Located(NamedTuple):
    """Where nonzeros are, and what their base has there.

    Attributes:
        positions: int64 [nnz].
        at: the base's elements there, as unsigned bits.
    """

    positions: Positions
    at: Array


class InMemory(Elements):
    """Elements in memory that NumPy sees.

    Args:
        bits: of all of them, flat.
    """

    any_thread = True

    def __init__(self, bits: Array) -> None:
        self._bits = bits

    @property
    def size(self) -> int:
        return self._bits.size

    @property
    def itemsize(self) -> int:
        return self._bits.itemsize

    def room(self, data: Bytes) -> int:
        return codecs_on_base()[0].room(data, self.size)

    def decode(self, data: Bytes, nnz: int, shape: tuple[int, ...], room: int) -> Located:
        positions = codecs_on_base()[0].decode_on(data, nnz, shape, self._bits)
        return Located(positions, self.at(positions))

    def at(self, positions: Positions) -> Array:
        return self._bits[positions]


def codecs_on_base() -> tuple[FromBase, UlpFromBase]:
    """Those of the fastest backend."""
    backend = choose(index_ids=(FROM_BASE.id,), value_ids=(ULP_FROM_BASE.id,))
    index, values = backend.index_codecs[FROM_BASE.id], backend.value_codecs[ULP_FROM_BASE.id]
    assert isinstance(index, FromBase)
    assert isinstance(values, UlpFromBase)
    return index, values


def restored(stored: StoredTensor, base: Array | Elements) -> TensorDelta:
    """What a tensor that is read with its base only does.

    Args:
        stored: the tensor.
        base: all elements of its base: their bits, flat, or where they are.

    Raises:
        FormatError: it is damaged, or was made for another base; most others are noticed here.
        LimitError: it takes too much memory.
    """
    return with_values(stored, located(stored, base))


def locating(stored: StoredTensor, base: Array | Elements) -> Callable[[], Located]:
    """`located` for any thread to call: what only this one may do is done."""
    elements = base if isinstance(base, Elements) else InMemory(base)
    if elements.any_thread:
        return partial(located, stored, elements)
    found = located(stored, elements)
    return lambda: found


def located(stored: StoredTensor, base: Array | Elements) -> Located:
    """The first half of `restored`, which works where the base is."""
    elements = base if isinstance(base, Elements) else InMemory(base)
    with named(stored, stored.record.index):
        found = positions_on(stored, elements, elements.decode)
    return found if isinstance(found, Located) else Located(found, elements.at(found))


def positions_on(stored: StoredTensor, base: Elements, decode: Callable[..., Decoded]) -> Decoded | Positions:
    """The positions of a tensor: what `decode` gives, called as `Elements.decode`, or as they are without the base.

    Raises:
        FormatError: the section is damaged, or the base has another size.
        LimitError: it takes too much memory.
    """
    record = stored.record
    stored.check_memory(record.decoded_size)
    # Readers go through all of it without looking at its size again.
    if (base.size, base.itemsize) != (record.numel, record.element_size):
        raise FormatError("wrong_base", f"{base.size} elements of {base.itemsize} bytes")
    data = stored.section(record.index)
    if record.index_codec == FROM_BASE.id:
        stored.check_memory(record.decoded_size + base.room(data))
        return decode(data, record.nnz, record.shape, stored.limit - record.decoded_size)
    # A decoder of files may refuse all of a tensor of which one section needs the base.
    return INDEX_CODECS.by_id[record.index_codec].decode(data, record.nnz, record.shape)


def with_values(stored: StoredTensor, found: Located) -> TensorDelta:
    """The second half of `restored`, which needs the base's elements at the positions only."""
    record = stored.record
    with named(stored, record.values):
        data, nnz, size = stored.section(record.values), record.nnz, record.element_size
        if record.value_codec == ULP_FROM_BASE.id:
            bits = codecs_on_base()[1].decode_on(data, nnz, size, found.at)
        else:
            codec = VALUE_CODECS.by_id[record.value_codec]
            codec.check(data, nnz, size)
            bits = codec.decode(data, nnz, size, 0, nnz)
    dtype, operation, known = record.dtype.name, record.operation.name, record.base_fingerprint
    return TensorDelta.trusted(record.shape, found.positions, bits, dtype, operation, found.at, known, stored.draw)


@contextmanager
def named(stored: StoredTensor, section: Section) -> Iterator[None]:
    """Errors in it say which section they are about."""
    try:
        yield
    except FormatError as error:
        error.tensor, error.file = stored.record.name, stored.file
        error.offset = section.offset if error.offset is None else error.offset
        raise
