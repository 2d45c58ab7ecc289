"""One seed: what is trained, what each way of using it scores, and what it costs."""

from __future__ import annotations

import json
import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.experts.subjects import Example, Scale, Subject
from benchmarks.table import seconds
from shiradelta import HotSwap, experts
from shiradelta.experts.features import DIMS
from shiradelta.experts.training import FamilyTraining
from shiradelta.experts.unfinished import UnfinishedFamily

#: Prompts that are timed, and answers that are scored at a time where all have the same weights.
TIMED, TOGETHER = 20, 16
#: The rows of a seed, in the order in which they come.
METHODS = (
    "base model",
    "one delta",
    "experts, one weight average a group",
    "experts, one weight average a prompt",
    "experts, ensemble of logits",
    "experts, the best one",
    "one delta, twice the steps",
)


class Experiment:
    """Trains and scores with one seed.

    Args:
        folder: keeps the models and what they took, so that an experiment that was cut goes on.
        done: methods that have their row.

    Attributes:
        costs: seconds of training, milliseconds a prompt, bytes; whole when `run` has ended.
    """

    def __init__(
        self,
        subject: Subject,
        scale: Scale,
        sparsity: float,
        members: int,
        seed: int,
        folder: Path,
        done: Collection[str],
    ) -> None:
        self.subject, self.members, self.seed, self.folder, self.done = subject, members, seed, folder, done
        self.settings = experts.TrainSettings(
            sparsity=sparsity, mask="rand", steps=scale.steps, batch=scale.batch, relative_lr=scale.relative_lr,
            seed=seed, values="int8",
        )  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        self._notes = folder / "costs.json"
        self.costs: dict[str, float] = json.loads(self._notes.read_text()) if self._notes.exists() else {}
        self.model = subject.load()
        self._begun = self._before = time.perf_counter()

    def run(self) -> Iterator[tuple[str, dict[str, float]]]:
        """The methods that have no row yet, as they come: (method, task -> nats)."""
        family = self._family()
        self._log("family")
        router = self._router(family)
        of: dict[str, Callable[[], dict[str, float]]] = {
            "base model": self._together,
            "one delta": partial(self._with, router.swap, "base"),
            "experts, one weight average a group": partial(self._by_group, router),
        }
        for method, score in of.items():
            if method not in self.done:
                yield method, score()
        if not set(METHODS[3:6]) <= set(self.done):
            yield from self._by_prompt(router)
        if not any(what.startswith("ms,") for what in self.costs):
            self._cost(router)
        longer = self.folder / "long.shd"
        if not longer.exists():
            settings = replace(self.settings, steps=2 * self.settings.steps, relative_lr=self.costs["learning rate"])
            training = FamilyTraining(self.model, self.subject.train, self.subject.loss, settings, self._progress)
            training.base(range(len(self.subject.train)), self.folder / "long.new")
            (self.folder / "long.new").rename(longer)
        if METHODS[6] not in self.done:
            router.swap.load("long", longer)
            yield METHODS[6], self._with(router.swap, "long")
        self._keep()

    def _with(self, swap: HotSwap, name: str) -> dict[str, float]:
        with swap.applied(name):
            return self._together()

    def _keep(self) -> None:
        self._notes.write_text(json.dumps(self.costs, indent=1) + "\n")

    def _log(self, what: str) -> None:
        print(f"seed {self.seed}, {time.perf_counter() - self._begun:.0f} s: {what}", flush=True)

    def _router(self, family: experts.ExpertFamily) -> experts.ExpertRouter:
        return experts.ExpertRouter(self.model, family, self.subject.prompt_loss, TOGETHER)

    def _progress(self, what: str, done: int, total: int) -> None:
        """Notes seconds by kind of work, and says how far it is."""
        kind, now = f"s, {what.split(':')[0].split('-')[0]}", time.perf_counter()
        self.costs[kind] = self.costs.get(kind, 0) + now - self._before
        self._before = now
        if done % 50 == 0 or done == total:
            self._log(f"{what}, {done} of {total}")

    def _family(self) -> experts.ExpertFamily:
        """Trains it, or opens it, and says which tasks each expert is for."""
        subject, path = self.subject, self.folder / "family"
        if path.exists():
            return experts.open_family(path)
        identity = [vars(self.settings), len(subject.train), self.members]
        state = UnfinishedFamily(self.folder / "family.train", identity, self._log)
        training = FamilyTraining(self.model, subject.train, subject.loss, self.settings, self._progress, state)
        family = training.family(path, subject.prompt_loss, self.members, None, None, DIMS, TOGETHER)
        training.finished()
        self.costs["learning rate"] = training.relative_lr or math.nan
        self.costs["MB, a member"] = statistics.fmean(family.path(n).stat().st_size for n in family.digests) / 1e6
        self._keep()
        some = random.Random(self.seed).sample(range(len(subject.train)), min(64, len(subject.train)))
        nearest = self._router(family).cosines([subject.train[index] for index in some]).argmax(1).tolist()
        for number, name in enumerate(family.experts):
            tasks = Counter(
                subject.tasks_of_train[i] for i, group in zip(some, nearest, strict=True) if group == number
            )
            self._log(f"{name}: {family.examples[number]} examples; nearest of {len(some)}: {dict(tasks)}")
        return family

    @torch.no_grad()
    def _scores(self, some: Sequence[Example]) -> list[float]:
        found: list[float] = []
        for start in range(0, len(some), TOGETHER):
            part = some[start : start + TOGETHER]
            found += self.subject.scores(*self.subject.predict(self.model, part), part)
        return found

    def _together(self) -> dict[str, float]:
        """With the weights as they are."""
        return {task: statistics.fmean(self._scores(some)) for task, some in self.subject.held_out.items()}

    def _by_prompt(self, router: experts.ExpertRouter) -> Iterator[tuple[str, dict[str, float]]]:
        subject, swap = self.subject, router.swap
        every = self._every
        routes = router.each(every)
        averages = []
        for one, route in zip(every, routes, strict=True):
            with swap.applied(route):
                averages += self._scores([one])
        yield METHODS[3], self._by_task(averages)
        # As `ExpertRouter.ensemble`, but each expert answers all prompts before the next is switched in.
        members: list[list[Tensor]] = []
        alone: list[list[float]] = []
        for name in router.family.experts:
            with swap.applied(name):
                members.append(self._logits(every))
                alone.append(self._scores(every))
        right = [subject.right(one).to(members[0][0].device) for one in every]
        ensemble = []
        for index, route in enumerate(routes):
            logits = torch.stack([route[n] * own[index] for n, own in zip(route, members, strict=True)]).sum(0)
            ensemble += subject.scores(logits, right[index], [every[index]])
        yield METHODS[4], self._by_task(ensemble)
        best = [max(range(self.members), key=list(route.values()).__getitem__) for route in routes]
        yield METHODS[5], self._by_task([alone[expert][index] for index, expert in enumerate(best)])

    def _by_group(self, router: experts.ExpertRouter) -> dict[str, float]:
        every = self._every
        found = [0.0] * len(every)
        for group in router.groups(every):
            with router.swap.applied(group.strengths):
                for index, nats in zip(group.indices, self._scores([every[i] for i in group.indices]), strict=True):
                    found[index] = nats
        return self._by_task(found)

    @property
    def _every(self) -> list[Example]:
        """The held-out examples, one task after the other."""
        return [one for some in self.subject.held_out.values() for one in some]

    @torch.no_grad()
    def _logits(self, some: Sequence[Example]) -> list[Tensor]:
        """Of each example, float32."""
        found: list[Tensor] = []
        for start in range(0, len(some), TOGETHER):
            part = some[start : start + TOGETHER]
            logits = self.subject.predict(self.model, part)[0].float()
            found += torch.split(logits, [self.subject.length(one) for one in part])
        return found

    def _by_task(self, nats: Sequence[float]) -> dict[str, float]:
        """Of the held-out examples, one task after the other."""
        left = iter(nats)
        return {task: statistics.fmean(next(left) for _ in some) for task, some in self.subject.held_out.items()}

    def _cost(self, router: experts.ExpertRouter) -> None:
        """Milliseconds a prompt, medians."""
        every = self._every
        timed = random.Random(1).sample(every, min(TIMED, len(every)))
        routes = [router.route([one]) for one in timed]

        def forward(number: int) -> Tensor:
            return self.subject.predict(self.model, [timed[number]])[0]

        def switch(number: int) -> None:
            router.swap.switch(routes[number])

        @torch.no_grad()
        def each(work: Callable[[int], object]) -> float:
            def whole(number: int) -> None:
                work(number)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()

            return 1000 * statistics.median(seconds(partial(whole, number), 1) for number in range(len(timed)))

        self.costs |= {
            "ms, a forward pass": each(forward),
            "ms, a route": each(lambda number: router.route([timed[number]])),
            "ms, a route of many": 1000 * seconds(lambda: router.each(timed), 1) / len(timed),
            "ms, a switch to an average": each(switch),
            "ms, an ensemble's passes and switches": each(
                lambda number: router.ensemble(lambda: forward(number), routes[number])
            ),
        }
        router.swap.revert()
        self._keep()
