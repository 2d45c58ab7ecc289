"""Classes of rows and columns that TILED takes."""

from itertools import combinations

import numpy as np
import pytest

from shiradelta.format.codecs.line_classes import ClassTable, bits_of, by_number, refined


def classes_of(listed, bits):
    row, column = np.nonzero(listed)
    return row, column, by_number(row, column, listed.sum(1), listed.sum(0), bits)


def blocks(rng, rows=480, columns=640, groups=4):
    """Rows of a group have their nonzeros in columns of one group, all lines about as many."""
    share = np.full((groups, groups), 0.005) + np.eye(groups) * 0.08
    of_rows, of_columns = rng.integers(groups, size=rows), rng.integers(groups, size=columns)
    return rng.random((rows, columns)) < share[of_rows][:, of_columns]


def factors(rng, rows=480, columns=640):
    """Rows and columns differ by a factor."""
    share = np.exp(rng.normal(0, 0.8, (rows, 1))) * np.exp(rng.normal(0, 0.8, columns)) * 0.02
    return rng.random((rows, columns)) < share


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("make", [blocks, factors])
def test_refined_classes_take_no_more_bits_and_have_their_own_table(make, bits):
    listed = make(np.random.default_rng(0))
    row, column, before = classes_of(listed, bits)
    found = refined(before, row, column)
    assert found.table.bits < 1.001 * before.table.bits  # what is saved is rounded
    held = [np.arange(1 << bits)[:, None] == lines for lines in (found.rows, found.columns)]
    assert np.array_equal(found.table.nonzeros, held[0].astype(int) @ listed.astype(int) @ held[1].T.astype(int))
    assert np.array_equal(found.table.elements, np.outer(held[0].sum(1), held[1].sum(1)))


def test_blocks_that_numbers_of_nonzeros_do_not_show_are_found():
    listed = blocks(np.random.default_rng(0))
    row, column, classes = classes_of(listed, 4)
    of_lines = bits_of(listed.sum(1), np.full(480, 640)).sum()
    for _ in range(3):
        classes = refined(classes, row, column)
    assert classes.table.bits < 0.85 * of_lines


def test_lines_with_few_nonzeros_keep_their_classes():
    listed = np.random.default_rng(0).random((400, 300)) < 0.003
    row, column, classes = classes_of(listed, 4)
    assert refined(classes, row, column) is classes


@pytest.mark.parametrize("listed", [np.eye(64, dtype=bool), np.ones((32, 48), bool), np.tri(64, dtype=bool)])
def test_empty_and_full_classes_are_no_special_case(listed):
    row, column, classes = classes_of(listed, 4)
    found = refined(classes, row, column)
    assert np.isfinite(found.table.bits)
    assert found.table.nonzeros.sum() == listed.sum()


@pytest.mark.parametrize("seed", range(5))
def test_mergers_take_the_fewest_bits_of_all_that_merge_neighbours(seed):
    rng = np.random.default_rng(seed)
    elements = rng.integers(100, 1000, (8, 4)).astype(np.float64)
    table = ClassTable(np.floor(elements * rng.random((8, 1)) * rng.random((8, 4))), elements)
    mergers = table.mergers()
    assert list(mergers) == [1, 2, 3]
    order = np.argsort(table.nonzeros.sum(1) / table.elements.sum(1))
    for bits, into in mergers.items():
        every = [
            np.searchsorted(starts, np.arange(8), side="right") for starts in combinations(range(1, 8), (1 << bits) - 1)
        ]
        possible = []
        for each in every:
            of_classes = np.empty(8, np.int64)
            of_classes[order] = each
            possible.append(table.merged(of_classes).bits)
        assert table.merged(into).bits == pytest.approx(min(possible))
