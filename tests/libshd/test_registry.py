"""The ids of libshd's header and those that the library knows, against the registries of the package."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from shiradelta.backends.choose import choose
from shiradelta.backends.libshd.library import knows_index_codec, knows_value_codec
from shiradelta.errors import ShiraDeltaError
from shiradelta.format.codecs import INDEX_CODECS, VALUE_CODECS
from shiradelta.format.operations import OPERATIONS

HEADER = (Path(__file__).parents[2] / "libshd/include/shd.h").read_text(encoding="utf-8")
BYTE = range(256)


def constants(enum: str, prefix: str) -> dict[str, int]:
    """The constants of one enum of the header, without their prefix."""
    (body,) = re.findall(rf"^enum {enum} {{(.*?)^}};", HEADER, re.M | re.S)
    return {name: int(id) for name, id in re.findall(rf"SHD_{prefix}_(\w+) = (\d+)", body)}


@pytest.mark.parametrize(
    ("enum", "prefix", "members", "nothing"),
    [
        ("shd_index_codec", "INDEX", INDEX_CODECS, {"NONE": 0}),
        ("shd_value_codec", "VALUES", VALUE_CODECS, {"NONE": 0}),
        ("shd_op", "OP", OPERATIONS, {}),
    ],
)
def test_the_header_has_the_ids_of_the_registry(enum: str, prefix: str, members: Any, nothing: dict[str, int]):
    rows = {row.name.upper(): int(id) for id, row in members.by_id.items()}
    assert constants(enum, prefix) == nothing | rows


def test_the_library_knows_the_codecs_of_the_registry():
    """If not, it may have been built from older sources: docs/extend/value-codec.md says how to build it again."""
    try:
        choose("libshd")
    except ShiraDeltaError as error:
        pytest.skip(str(error))
    assert {id for id in BYTE if knows_index_codec(id)} == {0, *INDEX_CODECS.by_id}
    assert {id for id in BYTE if knows_value_codec(id)} == set(VALUE_CODECS.by_id)
