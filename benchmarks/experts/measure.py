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
from shiradelta import experts
from shiradelta.experts.training import FamilyTraining

#: Prompts that are timed, and answers that are scored at a time where all have the same weights.
TIMED, TOGETHER = 40, 16
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

    def run(self) -> Iterator[tuple[str, dict[str, float]]]:
        """The methods as they come: (method, task -> nats)."""
        subject, model = self.subject, self.model
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            longer = replace(self.settings, steps=2 * self.settings.steps)
            training = FamilyTraining(model, subject.train, subject.loss, longer, lambda what, done, total: None)
            every = range(len(subject.train))
            self._timed("s, one delta of twice the steps", lambda: training.base(every, folder / "long.shd"))
            settings = replace(self.settings, relative_lr=training.relative_lr)
            print(f"seed {self.seed}: learning rate {training.relative_lr:.3g}", flush=True)
            family = self._family(settings, folder / "family")
            router = experts.ExpertRouter(model, family, subject.prompt_loss)
            router.swap.load("long", folder / "long.shd")
            self.costs["MB, a member"] = (
                statistics.fmean(family.path(one).stat().st_size for one in family.digests) / 1e6
            )
            yield METHODS[0], self._together()
            for method, name in ((METHODS[1], "base"), (METHODS[2], "long")):
                with router.swap.applied(name):
                    yield method, self._together()
            yield from self._routed(router)
            self._cost(router)

    def _timed(self, what: str, work: Callable[[], None]) -> None:
        start = time.perf_counter()
        work()
        self.costs[what] = time.perf_counter() - start

    def _family(self, settings: experts.TrainSettings, folder: Path) -> experts.ExpertFamily:
        """Trains it, and notes what took how long, and which tasks each expert is for."""
        subject = self.subject
        start, spent = time.perf_counter(), dict[str, float]()

        def progress(what: str, done: int, total: int) -> None:
            nonlocal start
            kind = what.split(":")[0].split("-")[0]
            now = time.perf_counter()
            kind = "features" if "gradients" in kind else kind
            spent[kind] = spent.get(kind, 0) + now - start
            start = now

        family = experts.train_family(
            self.model, subject.train, subject.loss, folder, prompt_loss=subject.prompt_loss, experts=self.members,
            settings=settings, progress=progress,
        )  # fmt: skip
        self.costs |= {f"s, family: {what}": found for what, found in spent.items()}
        router = experts.ExpertRouter(self.model, family, subject.prompt_loss)
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
        routes = [router.route([one]) for one in every]

        def averaged(index: int) -> float:
            with swap.applied(routes[index]):
                return self._scores([every[index]])[0]

        def best(index: int) -> float:
            with swap.applied(max(routes[index], key=routes[index].__getitem__)):
                return self._scores([every[index]])[0]

        @torch.no_grad()
        def ensemble(index: int) -> float:
            right: list[Tensor] = []

            def run() -> Tensor:
                logits, labels = subject.predict(self.model, [every[index]])
                right[:] = [labels]
                return logits.float()

            return subject.scores(router.ensemble(run, routes[index]), right[0], [every[index]])[0]

        for method, of in zip(METHODS[3:6], (averaged, ensemble, best), strict=True):
            yield method, self._by_task([of(index) for index in range(len(every))])
        found = [0.0] * len(every)
        for group in router.groups(every):
            with swap.applied(group.strengths):
                for index, nats in zip(group.indices, self._scores([every[i] for i in group.indices]), strict=True):
                    found[index] = nats
        yield METHODS[6], self._by_task(found)

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
            "ms, a switch to an average": each(switch),
            "ms, an ensemble's passes and switches": each(
                lambda number: router.ensemble(lambda: forward(number), routes[number])
            ),
        }
        router.swap.revert()
