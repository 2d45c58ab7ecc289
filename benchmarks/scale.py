"""Simulates 1 to 10,000 nodes that follow one trainer: bytes, times, and what the death of a node costs.

`python -m benchmarks.scale` prints three tables: a step to fleets of several sizes, by several ways; one death; and the
same fleet on the wires of other projects.  Nothing is measured here.  The sizes of a step on each wire are those that
`benchmarks.wires` measured, and all other assumptions are the fields of `Fleet`.

A way is a function: it says when each node has a step, and who has sent how many bytes for it.  Links are fluid: a
store shares its rate among those that load at the same time.  The moments at which nodes look for a step, the calls
that fail, and the nodes with a slow link are random; a seed decides them, whichever node dies.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from shiradelta.util.text import table

Seconds = NDArray[np.float64]

#: Bits for each changed weight where 2.31 % of bf16 weights change, as `benchmarks.wires` measured them.
WIRES = {".shd": 8.5, "nemo-rl": 12.4, "slime": 18.4, "huggingface": 32.9, "vllm": 48.1}
CHANGED = 0.0231
#: How often a call to a store is tried, and the pause after the first failure, which doubles: `chain.remote`.
TRIES, PAUSE = 6, 0.2


@dataclass(frozen=True)
class Fleet:
    """What is assumed.  Rates are in bytes a second, times in seconds.

    Attributes:
        nodes: followers, each with one copy of the model.
        weights: of the model, in bf16.
        link: each node's link to the store and to other nodes, and the trainer's: 10 Gb/s.
        fabric: each node's link in a cluster for collectives: 400 Gb/s.
        store: what the object store sends to all together.
        poll: how often a node looks for a new step.
        hop: a message from one machine to another.
        patch: bytes of a delta a second, from the file to the live weights; the node pauses meanwhile.  `HotSwap` on an
            H100 took 46 ms for 131 MB.
        copy: the same for a whole model, from the host's memory to the device's.
        failing: share of calls to the store that fail.
        slow: share of nodes whose links have a tenth of the rate.
        children: how many nodes a node of the tree serves.
        patience: how long a node of the tree waits for its parent before it asks the store.
        watchdog: how long a collective waits for a process that is gone; PyTorch's default for NCCL.
        regroup: to form the group of a collective again.
        between_deaths: hours that a node lives; Llama 3's training had 419 failures on 2,048 nodes in 54 days.
    """

    nodes: int
    weights: float = 8e9
    link: float = 1.25e9
    fabric: float = 50e9
    store: float = 100e9
    poll: float = 1.0
    hop: float = 0.001
    patch: float = 2.8e9
    copy: float = 25e9
    failing: float = 0.001
    slow: float = 0.001
    children: int = 8
    patience: float = 10.0
    watchdog: float = 600.0
    regroup: float = 30.0
    between_deaths: float = 54 * 24 * 2048 / 419

    @property
    def whole(self) -> float:
        """Bytes of the model."""
        return 2 * self.weights

    def step(self, wire: str = ".shd") -> float:
        """Bytes of a step on a wire."""
        return self.weights * CHANGED * WIRES[wire] / 8

    def pause(self, size: float) -> float:
        """For how long a node does not work while it takes a step or a model of this size."""
        return size / (self.copy if size >= self.whole else self.patch)

    def links(self, rng: np.random.Generator, rate: float) -> Seconds:
        """The rate of each node's link."""
        return np.where(rng.random(self.nodes) < self.slow, rate / 10, rate)


@dataclass(frozen=True)
class Outcome:
    """One step to all nodes.

    Attributes:
        ready: when each node computes with it, in seconds from its publication; infinite for one that died.
        trainer: bytes that the trainer sends.
        others: bytes that the store and the nodes send.
        pause: for how long a node does not work.
    """

    ready: Seconds
    trainer: float
    others: float
    pause: float


#: A fleet, the bytes of a step, a generator and the nodes that die before they have the step -> what happens.
Way = Callable[[Fleet, float, np.random.Generator, list[int]], Outcome]


def through_store(fleet: Fleet, size: float, rng: np.random.Generator, dead: list[int]) -> Outcome:
    """The trainer uploads a step; each node finds it at its next look, and downloads it."""
    links = fleet.links(rng, fleet.link)
    uploaded = size / min(fleet.link, fleet.store)
    begun = uploaded + fleet.hop + rng.uniform(0, fleet.poll, fleet.nodes) + _pauses(fleet, rng)
    begun[dead] = np.inf
    ready = np.maximum(_shared(begun, size, fleet.link, fleet.store), begun + size / links) + fleet.pause(size)
    return Outcome(ready, size, size * (fleet.nodes - len(dead)), fleet.pause(size))


def through_tree(fleet: Fleet, size: float, rng: np.random.Generator, dead: list[int]) -> Outcome:
    """Each node checks a step, then passes it on.  Where its parent is gone, it takes the store's after a while."""
    links, gone = fleet.links(rng, fleet.link), set(dead)
    has = np.zeros(fleet.nodes)
    served = np.zeros(fleet.nodes + 1, np.int64)  # by each node, the trainer's last
    parents = np.arange(fleet.nodes) // fleet.children - 1
    np.add.at(served, parents, 1)
    uploaded = size / min(fleet.link, fleet.store)
    for node, parent in enumerate(parents.tolist()):
        above, rate = (0.0, fleet.link) if parent < 0 else (has[parent], links[parent])
        has[node] = above + fleet.hop + size / min(rate / served[parent], links[node])
        if parent in gone:
            has[node] = max(above + fleet.patience, uploaded) + size / links[node]
    ready = has + fleet.pause(size)
    ready[dead] = np.inf
    first = int(served[-1])
    return Outcome(ready, size * (first + 1), size * (fleet.nodes - first), fleet.pause(size))


def broadcast_on(rate: Callable[[Fleet], float]) -> Way:
    """A collective on links of a rate: all nodes take part, at the rate of the slowest, and all wait for it."""

    def broadcast(fleet: Fleet, size: float, rng: np.random.Generator, dead: list[int]) -> Outcome:
        slowest = min(rate(fleet), float(fleet.links(rng, rate(fleet)).min()))
        once = fleet.hop * np.log2(fleet.nodes + 1) + size / slowest
        lost = (fleet.watchdog + fleet.regroup) if dead else 0.0
        ready = np.full(fleet.nodes, once + lost)
        ready[dead] = np.inf
        return Outcome(ready, size, size * (fleet.nodes - 1), once + lost)

    return broadcast


def _pauses(fleet: Fleet, rng: np.random.Generator) -> Seconds:
    """How long each node waits between calls that fail.  After the last one, it looks again."""
    waited, left = np.zeros(fleet.nodes), np.arange(fleet.nodes)
    tries = 0
    while left.size:
        left = left[rng.random(left.size) < fleet.failing]
        tries += 1
        waited[left] += fleet.poll if tries % TRIES == 0 else PAUSE * 2 ** (tries % TRIES - 1)
    return waited


def _shared(begun: Seconds, size: float, each: float, together: float) -> Seconds:
    """When downloads of one size end that share a rate, of which each can use a part."""
    order = np.argsort(begun, kind="stable")
    starts = begun[order]
    starts = starts[np.isfinite(starts)]
    ends = np.full(begun.size, np.inf)
    now = done = 0.0  # `done`: bytes that a download would have that has always been there
    goals: list[float] = []
    ended = 0
    while ended < starts.size:
        active = len(goals) - ended
        rate = min(each, together / active) if active else 0.0
        next_end = now + (goals[ended] - done) / rate if active else np.inf
        next_start = starts[len(goals)] if len(goals) < starts.size else np.inf
        moment = min(next_end, next_start)
        done, now = done + rate * (moment - now), moment
        if next_start <= next_end:
            goals.append(done + size)
        else:
            done = goals[ended]  # exactly
            ends[order[ended]] = now
            ended += 1
    return ends


#: Name -> how a step travels, and what of a fleet it is.
WAYS: dict[str, tuple[Way, Callable[[Fleet], float]]] = {
    "delta, store": (through_store, Fleet.step),
    "delta, tree": (through_tree, Fleet.step),
    "whole, store": (through_store, lambda fleet: fleet.whole),
    "whole, NCCL, 10 Gb/s": (broadcast_on(lambda fleet: fleet.link), lambda fleet: fleet.whole),
    "whole, NCCL, 400 Gb/s": (broadcast_on(lambda fleet: fleet.fabric), lambda fleet: fleet.whole),
}


def outcome(fleet: Fleet, way: str, seed: int = 0, dead: list[int] | None = None) -> Outcome:
    """What a way makes of a step."""
    run, size = WAYS[way]
    return run(fleet, size(fleet), np.random.default_rng(seed), dead or [])


def late(fleet: Fleet, way: str, seed: int, nodes: list[int]) -> list[float]:
    """Seconds that the others together have a step later because one of these nodes has died, for each of them."""
    before = outcome(fleet, way, seed).ready
    found = []
    for node in nodes:
        delays = outcome(fleet, way, seed, [node]).ready - before
        found.append(float(np.maximum(np.delete(delays, node), 0).sum()))
    return found


def mean_late(fleet: Fleet, way: str, seed: int) -> float:
    """The mean of `late` over all nodes, by up to 16 of each level of the tree."""
    first, width, total = 0, fleet.children, 0.0
    while first < fleet.nodes:
        after = min(first + width, fleet.nodes)
        some = np.unique(first + (after - first) * (2 * np.arange(16) + 1) // 32).tolist()
        total += (after - first) * float(np.mean(late(fleet, way, seed, some)))
        first, width = after, width * fleet.children
    return total / fleet.nodes


def steps_table(sizes: list[int], seeds: range) -> list[list[str]]:
    """A step to fleets of several sizes."""
    rows = [["way", "nodes", "trainer sends", "all send", "half ready", "99 %", "all", "pause"]]
    for way in WAYS:
        for nodes in sizes:
            found = [outcome(Fleet(nodes), way, seed) for seed in seeds]
            times = [float(np.mean([np.quantile(one.ready, share) for one in found])) for share in (0.5, 0.99, 1)]
            sent = found[0].trainer, found[0].trainer + found[0].others
            pause = float(np.mean([one.pause for one in found]))
            rows.append([way, f"{nodes:,}", *map(_bytes, sent), *map(_time, times), _time(pause)])
    return rows


def deaths_table(sizes: list[int], seeds: range) -> list[list[str]]:
    """What one death costs the others, and how often it comes."""
    rows = [["way", "nodes", "deaths a day", "others late, mean", "worst", "of the fleet's time"]]
    for way in WAYS:
        for nodes in sizes:
            fleet = Fleet(nodes)
            mean = float(np.mean([mean_late(fleet, way, seed) for seed in seeds]))
            worst = max(late(fleet, way, seed, [0])[0] for seed in seeds)  # the first is nearest to the trainer
            a_day = nodes * 24 / fleet.between_deaths
            share = a_day * mean / (nodes * 86400)
            rows.append([way, f"{nodes:,}", f"{a_day:.2g}", _time(mean), _time(worst), f"{share:.1%}"])
    return rows


def wires_table(nodes: int, seeds: range) -> list[list[str]]:
    """The same step on other wires, through a store."""
    rows = [["wire", "bits a change", "a step", "all nodes load", "half ready", "all"]]
    fleet = Fleet(nodes)
    sizes = {wire: fleet.step(wire) for wire in WIRES} | {"whole model": fleet.whole}
    for wire, size in sizes.items():
        found = [through_store(fleet, size, np.random.default_rng(seed), []) for seed in seeds]
        times = [float(np.mean([np.quantile(one.ready, share) for one in found])) for share in (0.5, 1)]
        bits = f"{WIRES[wire]}" if wire in WIRES else "-"
        rows.append([wire, bits, _bytes(size), _bytes(size * nodes), *map(_time, times)])
    return rows


def _bytes(size: float) -> str:
    return f"{size / 1e12:,.1f} TB" if size >= 1e12 else f"{size / 1e9:,.2f} GB"


def _time(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds >= 100 else f"{seconds:.1f} s"


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 10, 100, 1000, 10_000])
    parser.add_argument("--seeds", type=int, default=10)
    options = parser.parse_args()
    seeds = range(options.seeds)
    print(
        "simulated, with",
        ", ".join(f"{name} {value:,.4g}" for name, value in asdict(Fleet(1)).items() if name != "nodes"),
        "\n",
    )
    for title, rows in (
        ("a step to all nodes", steps_table(options.nodes, seeds)),
        ("a node dies", deaths_table([size for size in options.nodes if size > 1], seeds[:2])),
        ("a step to 1,000 nodes on several wires, through a store", wires_table(1000, seeds)),
    ):
        print(f"{title}\n\n{table(rows)}\n")


if __name__ == "__main__":
    main()
