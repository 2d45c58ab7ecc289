"""The codecs: id -> codec, one a file.  Sizes, layouts and checks are those of spec/FORMAT.md, 3.2 to 5.

A codec works on the decoded bytes of one section and knows nothing of files.  It raises FormatError with
a reason code; the reader adds file, tensor and offset.
"""

from __future__ import annotations

from collections.abc import Mapping

from shiradelta.format.arithmetic import Positions
from shiradelta.format.codecs import affine, bitmap, floats, raw, rice, struct
from shiradelta.format.codecs.base import AllPositions, IndexCodec, ValueCodec
from shiradelta.format.registry import IndexCodec as IndexId
from shiradelta.format.registry import ValueCodec as ValueId

__all__ = ["INDEX_CODECS", "VALUE_CODECS", "IndexCodec", "ValueCodec", "smallest_index_codec"]

INDEX_CODECS: Mapping[IndexId, IndexCodec] = {
    IndexId.RICE: rice.Rice(),
    IndexId.RAW: raw.Raw(),
    IndexId.BITMAP: bitmap.Bitmap(),
    IndexId.STRUCT: struct.Struct(),
    IndexId.ALL: AllPositions(),
}

VALUE_CODECS: Mapping[ValueId, ValueCodec] = {
    ValueId.F32: floats.Float("float32"),
    ValueId.F16: floats.Float("float16"),
    ValueId.BF16: floats.Float("bfloat16"),
    ValueId.I8: affine.Int8(),
    ValueId.I4: affine.Int4(),
    ValueId.SIGN: affine.Sign(),
    ValueId.BITS: floats.Bits(),
}


def smallest_index_codec(
    positions: Positions, shape: tuple[int, ...], codecs: Mapping[IndexId, IndexCodec] = INDEX_CODECS
) -> IndexId:
    """The canonical codec for these positions: the smallest section, ties to the lowest id."""
    sizes = {id: codec.size(positions, shape) for id, codec in codecs.items()}
    return min((size, id) for id, size in sizes.items() if size is not None)[1]
