"""The options by which users choose a value codec."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from shiradelta.errors import ArgumentError
from shiradelta.format.codecs.base import ValueCodec
from shiradelta.util.registry import IdRegistry


class ValueOptions(Mapping[str, ValueCodec]):
    """Option ("int4") -> codec, of the codecs that a user can choose; follows the registry."""

    def __init__(self, codecs: IdRegistry[ValueCodec]) -> None:
        self._codecs = codecs

    def find(self, option: object) -> ValueCodec:
        """The codec of an option that a user gave.

        Raises:
            ArgumentError: the option is unknown; the message lists the known ones.
        """
        found = self._all().get(option) if isinstance(option, str) else None
        if found is None:
            raise ArgumentError(f"values {option!r} are unknown; take {', '.join(self)}")
        return found

    def __getitem__(self, option: str) -> ValueCodec:
        return self._all()[option]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def _all(self) -> dict[str, ValueCodec]:
        return {codec.option: codec for codec in self._codecs.values() if codec.option is not None}
