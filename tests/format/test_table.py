"""The table as columns says what its records say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import shiradelta as sd
from shiradelta.format.table import Table
from tests.reference import VALID
from tests.swapping import adapter, random_delta


@pytest.mark.parametrize("path", sorted(VALID.glob("*.shd")), ids=lambda path: path.stem)
def test_columns_and_records_are_the_same(path: Path):
    with sd.open_delta(path) as delta:
        table = delta.table
        records = list(table)
    assert table.names == [record.name for record in records]
    assert [table.numbers[record.name] for record in records] == list(range(len(table)))
    assert table.nnz.tolist() == [record.nnz for record in records]
    assert table.numel.tolist() == [record.numel for record in records]
    assert table.zstd.tolist() == [record.index.zstd or record.values.zstd for record in records]
    assert table.needs_base.tolist() == [record.needs_base for record in records]
    assert table.unpacked_size() == sum(record.unpacked_size for record in records)
    assert table.unpacked_size(table.names[:1]) == sum(record.unpacked_size for record in records[:1])
    assert table.index_codecs == {record.index_codec for record in records} - {0}
    assert table.value_codecs == {record.value_codec for record in records} - {0}
    assert {own.name for own in table.operations} == {record.operation.name for record in records}
    assert all(
        table.named(record.name) is record is table[number - len(table)] for number, record in enumerate(records)
    )
    assert table[1:] == records[1:]


def test_files_for_the_same_tensors_have_the_same_key():
    def table(
        name: str = "w", shape: tuple[int, ...] = (8, 4), dtype: str = "bfloat16", op: str = "add", nnz: int = 5
    ) -> Table:
        tensor = random_delta(shape, nnz, nnz, dtype, op)
        return sd.open_delta(adapter({name: tensor, "z": tensor})).table

    assert table().target_key == table(nnz=7).target_key
    others: dict[str, Any] = {"name": "v", "shape": (4, 8), "dtype": "float16", "op": "set"}
    keys = {table(**{argument: value}).target_key for argument, value in others.items()}
    assert len(keys | {table().target_key}) == len(others) + 1
