"""The registries of the codecs: one file and one row per codec; what a reader takes and `--values` offers follows."""

from __future__ import annotations

from shiradelta.format.codecs.all import AllPositions
from shiradelta.format.codecs.base import IndexCodec, ValueCodec
from shiradelta.format.codecs.bitmap import Bitmap
from shiradelta.format.codecs.bits import Bits
from shiradelta.format.codecs.float import Float
from shiradelta.format.codecs.from_base import FromBase
from shiradelta.format.codecs.int4 import Int4
from shiradelta.format.codecs.int8 import Int8
from shiradelta.format.codecs.options import ValueOptions
from shiradelta.format.codecs.raw import Raw
from shiradelta.format.codecs.rice import Rice
from shiradelta.format.codecs.seeded import Seeded
from shiradelta.format.codecs.sign import Sign
from shiradelta.format.codecs.struct import Struct
from shiradelta.format.codecs.tiled import Tiled
from shiradelta.format.codecs.ulp import Ulp
from shiradelta.format.codecs.ulp_from_base import UlpFromBase
from shiradelta.format.registry import ValueId
from shiradelta.util.registry import IdRegistry

FROM_BASE, SEEDED = FromBase(), Seeded(Rice())
INDEX_CODECS: IdRegistry[IndexCodec] = IdRegistry(
    "index codec", (Rice(), Raw(), Bitmap(), Struct(), AllPositions(), Tiled(), SEEDED, FROM_BASE)
)

F32 = Float(ValueId.F32, "F32", "f32", "float32")
F16, BF16 = Float(ValueId.F16, "F16", "f16", "float16"), Float(ValueId.BF16, "BF16", "bf16", "bfloat16")
BITS, ULP, ULP_FROM_BASE = Bits(), Ulp(), UlpFromBase()
VALUE_CODECS: IdRegistry[ValueCodec] = IdRegistry(
    "value codec", (F32, F16, BF16, Int8(), Int4(), Sign(), BITS, ULP, ULP_FROM_BASE)
)
#: Option that a user gives for values -> codec.
VALUE_OPTIONS = ValueOptions(VALUE_CODECS)
