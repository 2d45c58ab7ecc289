"""One seed: what is trained, what each way of using it scores, and what it costs."""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.experts.subjects import Example, Scale, Subject
from benchmarks.table import seconds
from shiradelta import HotSwap, experts
from shiradelta.experts.training import FamilyTraining

#: Prompts that are timed, and answers that are scored at a time where all have the same weights.
TIMED, TOGETHER = 20, 16
#: The rows of a seed.
METHODS = (
    "base model",
    "one delta",
    "one delta, twice the steps",
    "experts, one weight average a prompt",
    "experts, ensemble of logits",
    "experts, the best one",
    "experts, one weight average a group",
)


class Experiment:
    """Trains and scores with one seed.

    Attributes:
        costs: seconds of training, milliseconds a prompt, bytes; whole when `run` has ended.
    """

    def __init__(self, subject: Subject, scale: Scale, sparsity: float, members: int, seed: int) -> None:
        self.subject, self.members, self.seed = subject, members, seed
        self.settings = experts.TrainSettings(
            sparsity=sparsity, mask="rand", steps=scale.steps, batch=scale.batch, relative_lr=scale.relative_lr,
            seed=seed, values="int8",
        )  # fmt: skip
        self.costs: dict[str, float] = {}
        self.model = subject.load()
        self._begun = self._before = time.perf_counter()

    def run(self) -> Iterator[tuple[str, dict[str, float]]]:
        """The methods as they come: (method, task -> nats)."""
        subject, model = self.subject, self.model
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            longer = replace(self.settings, steps=2 * self.settings.steps)
            training = FamilyTraining(model, subject.train, subject.loss, longer, self._progress)
            every = range(len(subject.train))
            training.base(every, folder / "long.shd")
            print(f"seed {self.seed}: learning rate {training.relative_lr:.3g}", flush=True)
            yield METHODS[0], self._together()
            swap = HotSwap(model)
            swap.load("long", folder / "long.shd")
            with swap.applied("long"):
                yield METHODS[2], self._together()
            family = self._family(replace(self.settings, relative_lr=training.relative_lr), folder / "family")
            router = self._router(family)
            sizes = [family.path(one).stat().st_size for one in family.digests]
            self.costs["MB, a member"] = statistics.fmean(sizes) / 1e6
            with router.swap.applied("base"):
                yield METHODS[1], self._together()
            yield from self._routed(router)
            self._cost(router)

    def _router(self, family: experts.ExpertFamily) -> experts.ExpertRouter:
        return experts.ExpertRouter(self.model, family, self.subject.prompt_loss, TOGETHER)

    def _progress(self, what: str, done: int, total: int) -> None:
        """Notes seconds by kind of work, and says how far it is."""
        kind, now = f"s, {what.split(':')[0].split('-')[0]}", time.perf_counter()
        self.costs[kind] = self.costs.get(kind, 0) + now - self._before
        self._before = now
        if done % 50 == 0 or done == total:
            print(f"seed {self.seed}, {now - self._begun:.0f} s: {what}, {done} of {total}", flush=True)

    def _family(self, settings: experts.TrainSettings, folder: Path) -> experts.ExpertFamily:
        """Trains it, and says which tasks each expert is for."""
        subject = self.subject
        family = experts.train_family(
            self.model, subject.train, subject.loss, folder, prompt_loss=subject.prompt_loss, experts=self.members,
            settings=settings, prompt_batch=TOGETHER, progress=self._progress,
        )  # fmt: skip
        router = self._router(family)
        some = random.Random(self.seed).sample(range(len(subject.train)), min(200, len(subject.train)))
        groups: list[int] = router.cosines([subject.train[index] for index in some]).argmax(1).tolist()
        for number, name in enumerate(family.experts):
            tasks = Counter(subject.tasks_of_train[i] for i, group in zip(some, groups, strict=True) if group == number)
            print(f"{name}: {family.examples[number]} examples; nearest of {len(some)}: {dict(tasks)}", flush=True)
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

    def _routed(self, router: experts.ExpertRouter) -> Iterator[tuple[str, dict[str, float]]]:
        subject, swap = self.subject, router.swap
        every = [one for some in subject.held_out.values() for one in some]
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
        found = [0.0] * len(every)
        for group in router.groups(every):
            with swap.applied(group.strengths):
                for index, nats in zip(group.indices, self._scores([every[i] for i in group.indices]), strict=True):
                    found[index] = nats
        yield METHODS[6], self._by_task(found)

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
        every = [one for some in self.subject.held_out.values() for one in some]
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
