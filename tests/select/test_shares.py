"""Shares, patterns and counts; how a count over the model is shared out."""

from __future__ import annotations

import numpy as np
import pytest

from shiradelta.errors import ArgumentError
from shiradelta.select.histogram import CLASSES, Histogram, allocate
from shiradelta.select.shares import check_scope, check_share, count_for, exact_count_for, parse_sparsity


def test_parsing():
    assert parse_sparsity("1:64") == (1 / 64, (1, 64))
    assert parse_sparsity("0.25") == parse_sparsity(np.float32(0.25)) == parse_sparsity("25%") == (0.25, None)
    for wrong, message in (("3:2", "not a pattern"), ("0:4", "not a pattern"), ("much", "not a pattern")):
        with pytest.raises(ArgumentError, match=message):
            parse_sparsity(wrong)
    for share in (0, -1, 1.01, float("nan"), None, "2"):
        with pytest.raises(ArgumentError, match="not a share"):
            parse_sparsity(share)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="not a share"):
        check_share("0.5")
    with pytest.raises(ArgumentError, match="take tensor or model"):
        check_scope("layer")


def test_counts_agree_but_where_a_share_is_less_than_half_an_element():
    for numel in (1, 2, 3, 100, 101):
        for share in (0.01, 0.3, 0.5, 1):
            if round(share * numel):
                assert count_for(share, numel) == exact_count_for(share, numel, "w")
    assert count_for(0.001, 10) == 1
    assert count_for(0.5, 0) == 0
    for numel in (10, 0):
        with pytest.raises(ArgumentError, match=f"'w' with none of its {numel}"):
            exact_count_for(0.001, numel, "w")


@pytest.mark.parametrize("k", [0, 1, 17, 250, 600, 5000])
def test_sharing_out_a_count(k: int):
    """Every class above the limit is taken whole, the one at the limit in proportion."""
    generator = np.random.default_rng(k)
    classes = {name: generator.integers(0, 12, size) for name, size in (("a", 400), ("b", 200), ("c", 0))}
    found = allocate(
        {name: Histogram.of_counts(np.bincount(own, minlength=CLASSES)) for name, own in classes.items()}, k
    )
    everything = np.sort(np.concatenate(list(classes.values())))[::-1]
    assert sum(found.values()) == min(k, everything.size)
    if 0 < k < everything.size:
        limit = everything[k - 1]
        left = k - int(np.sum(everything > limit))
        for name, own in classes.items():
            above, at = int(np.sum(own > limit)), int(np.sum(own == limit))
            assert above <= found[name] <= above + at
            assert abs(found[name] - above - left * at / int(np.sum(everything == limit))) <= 1
