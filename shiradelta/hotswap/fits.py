"""Which tensors of a file change which tensors of a model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shiradelta.format import registry
from shiradelta.format.codecs.base import Bytes
from shiradelta.format.record import Record
from shiradelta.format.registry import Flag
from shiradelta.format.table import Table
from shiradelta.hotswap.reading import PartlyRead
from shiradelta.io.reader import Delta, StoredTensor
from shiradelta.models.live import Target
from shiradelta.models.memory import is_array

#: A delta, the tensor that it changes, and the dtype of the tensor's elements.
Fit = tuple[StoredTensor, Target, str]


class Targets(tuple[Target, ...]):
    """Tensors of a model that deltas change, with what is looked up once for all deltas of the same ones."""

    @cached_property
    def different(self) -> frozenset[Target]:
        """Each of them once."""
        return frozenset(self)

    def chosen(self, numbers: Collection[int]) -> frozenset[Target]:
        """Those of different numbers."""
        return self.different if len(numbers) == len(self) else frozenset(self[number] for number in numbers)

    @cached_property
    def devices(self) -> frozenset[str]:
        """Where they are."""
        return frozenset(target.device for target in self)

    @cached_property
    def there(self) -> list[Target]:
        """Those that may move."""
        return [target for target in self if target.address]

    @cached_property
    def moving(self) -> list[Any]:
        """The torch tensors of those that may move."""
        return [target.tensor for target in self.there]

    @property
    def addresses(self) -> list[int]:
        """Of each, now; 0 for an array."""
        return [0 if is_array(target.tensor) else target.tensor.data_ptr() for target in self]

    @cached_property
    def counted(self) -> list[Any]:
        """The model's own tensors whose versions autograd counts."""
        return [target.holder for target in self.there if not target.holder.is_inference()]

    @cached_property
    def are_plain(self) -> NDArray[np.bool_]:
        """For each, whether it is a torch tensor whose elements lie row by row."""
        plain = [not is_array(target.tensor) and target.tensor.is_contiguous() for target in self]
        return np.array(plain, np.bool_)


@dataclass(frozen=True, eq=False)
class FitColumns:
    """Tensors of a file, and which tensors of a model they change.

    Attributes:
        table: the file's table.
        numbers: of the file's tensors in it, int64 [n].
        targets: the tensors that they change [n].
        dtypes: those of their elements [n].
    """

    table: Table
    numbers: NDArray[np.int64]
    targets: Targets
    dtypes: Sequence[str]

    @classmethod
    def of(cls, delta: Delta, fits: Sequence[Fit]) -> FitColumns:
        """These fits of a file."""
        numbers = np.array([delta.table.numbers[tensor.record.name] for tensor, _, _ in fits], np.int64)
        return cls(delta.table, numbers, Targets(target for _, target, _ in fits), [dtype for *_, dtype in fits])

    def some(self, which: NDArray[np.int64]) -> FitColumns:
        """Those of these numbers among them."""
        chosen = which.tolist()
        targets, dtypes = Targets(self.targets[i] for i in chosen), [self.dtypes[i] for i in chosen]
        return FitColumns(self.table, self.numbers[which], targets, dtypes)

    def __len__(self) -> int:
        return self.numbers.size

    def record(self, which: int) -> Record:
        """The row of one of them."""
        return self.table[int(self.numbers[which])]

    @cached_property
    def rows(self) -> NDArray[Any]:
        """The tensors' rows of the table, as `Table.rows`."""
        return self.table.rows[self.numbers]

    @property
    def nonzeros(self) -> NDArray[np.int64]:
        """Nonzeros of each tensor."""
        return self.table.nnz[self.numbers]

    @property
    def numel(self) -> NDArray[np.int64]:
        """Elements of each tensor."""
        return self.table.numel[self.numbers]

    @property
    def have_fingerprints(self) -> NDArray[np.bool_]:
        """For each tensor, whether the file has a fingerprint for elements of the target's dtype."""
        ids = {dtype: registry.DTYPE_OF_NAME[dtype].id for dtype in set(self.dtypes)}
        same = self.rows["dtype"] == np.array([ids[dtype] for dtype in self.dtypes], np.uint8)
        return same & (self.rows["flags"] & int(Flag.BASE_FINGERPRINT) != 0)  # type: ignore[no-any-return]

    @property
    def needs_base(self) -> NDArray[np.bool_]:
        """For each tensor, whether only the base's elements tell positions or values."""
        return self.table.needs_base[self.numbers]

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Bytes of an element of each target."""
        sizes = {dtype: registry.DTYPE_OF_NAME[dtype].size for dtype in set(self.dtypes)}
        return np.array([sizes[dtype] for dtype in self.dtypes], np.int64)


class Fits(NamedTuple):
    """Tensors of an open file, and which tensors of a model they change.

    Attributes:
        source: the file, in memory that nobody changes.
        delta: the same, open.
        columns: its tensors, and the model's.
        unread: reads its sections into this memory; None where they have been read.
    """

    source: Bytes
    delta: Delta
    columns: FitColumns
    unread: PartlyRead | None = None

    def read(self) -> None:
        """Reads the sections of these tensors, if they have not been read; errors are those of `PartlyRead.read`."""
        if self.unread is not None:
            self.unread.read(map(self.delta.table.__getitem__, self.columns.numbers.tolist()))

    def on(self, device: str) -> Fits:
        """Those of tensors on a device."""
        here = [target.device == device for target in self.columns.targets]
        return self._replace(columns=self.columns.some(np.flatnonzero(here)))

    def fits(self) -> Iterator[Fit]:
        """Each of them."""
        names = self.delta.table.names
        tensors = [self.delta[names[number]] for number in self.columns.numbers.tolist()]
        return zip(tensors, self.columns.targets, self.columns.dtypes, strict=True)
