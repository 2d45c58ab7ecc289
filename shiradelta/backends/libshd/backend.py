"""The fast backend: libshd, and the NumPy reference for what libshd does not do."""

from __future__ import annotations

from functools import cache

from shiradelta.backends.libshd.decoder import NativeDecoder, accepts
from shiradelta.backends.libshd.encoder import NativeRice, NativeTiled, NativeValues, at_least, fingerprint
from shiradelta.backends.libshd.from_base import NativeFromBase, NativeUlpFromBase
from shiradelta.backends.libshd.library import knows_index_codec, knows_value_codec, library
from shiradelta.backends.protocols import Backend
from shiradelta.format.codecs import INDEX_CODECS, VALUE_CODECS
from shiradelta.format.codecs.base import IndexCodec, ValueCodec
from shiradelta.format.codecs.seeded import Seeded


@cache
def backend() -> Backend:
    """Makes the backend.

    Raises:
        ShiraDeltaError: the library is not available.
    """
    library()
    index: dict[int, IndexCodec] = {id: one for id, one in INDEX_CODECS.by_id.items() if knows_index_codec(id)}
    values: dict[int, ValueCodec] = {id: one for id, one in VALUE_CODECS.by_id.items() if knows_value_codec(id)}
    native: tuple[IndexCodec, ...] = (NativeRice(), NativeTiled(), Seeded(NativeRice()), NativeFromBase())
    return Backend(
        "libshd",
        NativeDecoder,
        {**index, **{codec.id: codec for codec in native}},
        {
            **{id: NativeValues(codec) if codec.adds else codec for id, codec in values.items()},
            NativeUlpFromBase.id: NativeUlpFromBase(),
        },
        fingerprint,
        at_least,
        accepts,
    )
