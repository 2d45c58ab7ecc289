"""The simulation of fleets: bytes add up, times keep their order, and a death costs those whom it can reach."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from benchmarks.scale import PAUSE, TRIES, WAYS, Fleet, _shared, late, mean_late, outcome, steps_table
from shiradelta.chain import remote

FLEET = Fleet(300, slow=0.01, failing=0.05)
DELTAS = [way for way in WAYS if way.startswith("delta")]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("nodes", [1, 2, 9, 300])
def test_every_node_gets_the_step_once_and_the_same_seed_says_the_same(way: str, nodes: int):
    fleet = replace(FLEET, nodes=nodes)
    one, two, other = (outcome(fleet, way, seed) for seed in (1, 1, 2))
    size = WAYS[way][1](fleet)
    uploads = 0 if "NCCL" in way else 1
    assert one.trainer + one.others == pytest.approx(size * (nodes + uploads))
    assert np.array_equal(one.ready, two.ready)
    assert np.isfinite(one.ready).all()
    fastest = fleet.fabric if "400" in way else fleet.link
    assert (one.ready >= size / fastest).all()
    if nodes == 300 and "NCCL" not in way:
        assert not np.array_equal(one.ready, other.ready)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("node", [0, 150, 299])
def test_a_death_makes_no_node_earlier_and_reaches_whom_it_can(way: str, node: int):
    before, after = outcome(FLEET, way, 3), outcome(FLEET, way, 3, [node])
    others = np.arange(FLEET.nodes) != node
    assert np.isinf(after.ready[node])
    assert np.isfinite(after.ready[others]).all()
    delays = (after.ready - before.ready)[others]
    if "store" in way:
        assert (delays <= 1e-9).all()  # nobody waits for a node that only loads
    elif "tree" in way:
        below, level = 0, [node]
        while level:
            level = [child for one in level for child in range(8 * one + 8, min(8 * one + 16, FLEET.nodes))]
            below += len(level)
        assert np.count_nonzero(np.abs(delays) > 1e-9) == below
        assert (delays <= FLEET.patience).all()
    else:
        assert np.allclose(delays, FLEET.watchdog + FLEET.regroup)
    assert late(FLEET, way, 3, [node]) == [pytest.approx(np.maximum(delays, 0).sum())]


@pytest.mark.slow
def test_what_a_death_costs_on_average():
    for way in WAYS:
        mean = np.mean(late(replace(FLEET, nodes=80), way, 0, list(range(80))))
        assert mean_late(replace(FLEET, nodes=80), way, 0) == pytest.approx(mean, rel=0.2)


def test_downloads_share_a_store():
    alone = np.array([0.0, 10.0, np.inf])
    assert _shared(alone, 4, 2, 100).tolist() == [2, 12, np.inf]  # each at its own link
    assert _shared(np.zeros(4), 4, 2, 4).tolist() == [4, 4, 4, 4]  # all at a quarter of the store
    # The second begins when the first has one unit of four left; both share the rate of 4 until that is loaded.
    assert _shared(np.array([0.75, 0.0]), 4, 4, 4).tolist() == [2, 1.25]


@pytest.mark.parametrize("way", DELTAS)
def test_a_smaller_step_is_never_later(way: str):
    small, large = (outcome(replace(FLEET, weights=weights), way, 5).ready for weights in (8e9, 9e9))
    assert (small <= large).all()


def test_what_is_assumed_of_the_store_s_calls_is_so():
    tries: Any = remote._TRIES
    assert (tries + 1, remote._PAUSE) == (TRIES, PAUSE)


def test_the_table_has_a_row_for_each_way_and_size():
    rows = steps_table([1, 10], range(2))
    assert [row[:2] for row in rows[1:]] == [[way, size] for way in WAYS for size in ("1", "10")]
