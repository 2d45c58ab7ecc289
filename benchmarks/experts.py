"""A family of experts against one delta, on four tasks at once: what routes gain, and what a prompt costs.

`python -m benchmarks.experts OUT` tunes the language model of bytes that `benchmarks.quality.small` pretrains to the
four tasks of benchmarks/fusion_tasks.py (a query, then its answer; nothing says which task it is): as a family, and as
one delta with as many steps as the family's base delta, and as the whole family.  It writes experts.csv to a folder,
nats a byte of held-out answers, and prints milliseconds a prompt.  A CPU takes some minutes a seed.
"""

from __future__ import annotations

import argparse
import csv
import random
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.fusion_tasks import TASKS, load
from benchmarks.quality.small import PADDING, WIDTH, Small
from benchmarks.table import print_table, seconds
from shiradelta import experts
from shiradelta.experts.training import FamilyTraining

#: A query and its answer, as bytes; both end with a byte that no text has.
Example = tuple[bytes, bytes]
END = b"\n"
#: The longest query, so that an answer follows it within the model's positions.
PROMPT = 30
BATCH, RATE = 16, 0.3
#: Prompts that are timed.
TIMED = 40


def examples(task: str, part: int, count: int) -> list[Example]:
    """Some examples of a task: of part 0 to train on, of part 2 to score."""
    pairs = random.Random(0).sample(load(task, 500)[part], count)
    cut = [(query.encode()[: PROMPT - 1] + END, answer.encode()) for query, answer in pairs]
    return [(query, answer[: WIDTH - len(query) - 1] + END) for query, answer in cut]


def logits_of(model: nn.Module, some: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, the byte that comes, whether it is of the answer), of each position."""
    rows = torch.full((len(some), max(len(query + answer) for query, answer in some)), PADDING)
    said = torch.zeros(rows.shape, dtype=torch.bool)
    for number, (query, answer) in enumerate(some):
        rows[number, : len(query + answer)] = torch.tensor([*query, *answer])
        said[number, len(query) : len(query + answer)] = True
    rows = rows.to(next(model.parameters()).device)
    logits = model(input_ids=rows, attention_mask=(rows != PADDING).long()).logits[:, :-1]
    return logits, rows[:, 1:], said[:, 1:].to(rows.device)


def loss(model: nn.Module, some: Sequence[Example]) -> Tensor:
    """Of the answers."""
    logits, right, said = logits_of(model, some)
    return nn.functional.cross_entropy(logits[said], right[said])


def prompt_loss(model: nn.Module, some: Sequence[Example]) -> Tensor:
    """Of the queries."""
    logits, right, said = logits_of(model, [(query, b"") for query, _ in some])
    there = ~said & (right != PADDING)
    return nn.functional.cross_entropy(logits[there], right[there])


@torch.no_grad()
def score(run: Callable[[Sequence[Example]], tuple[Tensor, Tensor, Tensor]], some: Sequence[Example]) -> float:
    """Nats a byte of the answers, mean over examples."""
    found = []
    for one in some:
        logits, right, said = run([one])
        found.append(nn.functional.cross_entropy(logits[said], right[said]).item())
    return statistics.fmean(found)


def experiment(
    out: Path, seed: int, given: argparse.Namespace
) -> tuple[list[dict[str, str | float]], dict[str, float]]:
    """(a row for each method, with a column a task; milliseconds a prompt)."""
    model = Small(out / "small").load()
    train = [one for task in TASKS for one in examples(task, 0, given.examples)]
    held = {task: examples(task, 2, given.items) for task in TASKS}
    settings = experts.TrainSettings(
        sparsity=given.sparsity, mask="rand", steps=given.steps, batch=BATCH, relative_lr=RATE, seed=seed, values="int8"
    )
    rows: list[dict[str, str | float]] = []

    def note(method: str, of: Callable[[Sequence[Example]], float]) -> None:
        rows.append({"method": method, "seed": seed, **{task: of(some) for task, some in held.items()}})
        print(rows[-1], flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        options = {"prompt_loss": prompt_loss, "experts": given.experts}
        family = experts.train_family(model, train, loss, folder / "family", settings=settings, **options)
        print("examples of each expert:", family.examples, flush=True)
        longer = replace(settings, steps=2 * given.steps)
        training = FamilyTraining(model, train, loss, longer, lambda what, done, total: None)
        training.base(range(len(train)), folder / "long.shd")
        router = experts.ExpertRouter(model, family, prompt_loss)
        router.swap.load("long", folder / "long.shd")

        def plain(some: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
            return logits_of(model, some)

        def with_delta(name: str) -> Callable[[Sequence[Example]], float]:
            def of(some: Sequence[Example]) -> float:
                with router.swap.applied(name):
                    return score(plain, some)

            return of

        def averaged(some: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
            with router.swap.applied(router.route(some)):
                return plain(some)

        def together(some: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
            logits = router.ensemble(lambda: plain(some)[0], router.route(some))
            return logits, *plain(some)[1:]

        def best(some: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
            strengths = router.route(some)
            with router.swap.applied(max(strengths, key=strengths.__getitem__)):
                return plain(some)

        note("base model", lambda some: score(plain, some))
        note("one delta", with_delta("base"))
        note("one delta, twice the steps", with_delta("long"))
        note("experts, one weight average a prompt", lambda some: score(averaged, some))
        note("experts, ensemble of logits", lambda some: score(together, some))
        note("experts, the best one", lambda some: score(best, some))
        groups = router.groups([one for some in held.values() for one in some])
        every = [one for some in held.values() for one in some]
        by_group: dict[Example, float] = {}
        for group in groups:
            with router.swap.applied(group.strengths):
                by_group |= {every[index]: score(plain, [every[index]]) for index in group.indices}
        note("experts, one weight average a group", lambda some: statistics.fmean(by_group[one] for one in some))
        return rows, costs(router, plain, every)


def costs(
    router: experts.ExpertRouter, plain: Callable[[Sequence[Example]], tuple[Tensor, ...]], some: Sequence[Example]
) -> dict[str, float]:
    """Milliseconds a prompt, medians."""
    timed = random.Random(1).sample(list(some), TIMED)
    routes = [router.route([one]) for one in timed]

    @torch.no_grad()
    def each(work: Callable[[int], object]) -> float:
        times = [seconds(lambda number=number: work(number), 1) for number in range(TIMED)]  # type: ignore[misc]
        return 1000 * statistics.median(times)

    found = {
        "a forward pass": each(lambda number: plain([timed[number]])),
        "a route": each(lambda number: router.route([timed[number]])),
        "a switch to an average": each(lambda number: router.swap.switch(routes[number])),
        "an ensemble's passes and switches": each(
            lambda number: router.ensemble(lambda: plain([timed[number]])[0], routes[number])
        ),
    }
    router.swap.revert()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--examples", type=int, default=1000, help="to train on, of each task")
    parser.add_argument("--items", type=int, default=100, help="to score, of each task")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--sparsity", type=float, default=0.01)
    parser.add_argument("--experts", type=int, default=len(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, str | float]] = []
    times: list[dict[str, float]] = []
    for seed in range(given.seeds):
        found, cost = experiment(given.out, seed, given)
        rows += found
        times.append(cost)
        with open(given.out / "experts.csv", "w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    lines = [["", *TASKS, "mean"]]
    for method in dict.fromkeys(str(row["method"]) for row in rows):
        of = [[float(row[task]) for row in rows if row["method"] == method] for task in TASKS]
        means = [statistics.fmean(values) for values in of]
        lines.append([method, *(f"{value:.3f}" for value in [*means, statistics.fmean(means)])])
    print_table("nats a byte of held-out answers", lines)
    print_table(
        "milliseconds a prompt",
        [[what, f"{statistics.median(cost[what] for cost in times):.2f}"] for what in times[0]],
    )


if __name__ == "__main__":
    main()
