"""Work on several threads gives what one thread gives, whatever fails."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import pytest

from shiradelta.util.threads import ahead, in_ranges, map_in_threads, meanwhile, share_processors


@pytest.mark.parametrize("said", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}])
def test_what_the_environment_says_of_waiting_holds(said: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    share_processors()
    assert {name: os.environ[name] for name in names if name in os.environ} == (said or {"GOMP_SPINCOUNT": "1000"})


@pytest.mark.parametrize("units", [0, 1, 5, 64])
@pytest.mark.parametrize("threads", [1, 3, 16])
def test_ranges_cover_everything_once(units: int, threads: int):
    seen: list[int] = []
    in_ranges(lambda first, last: seen.extend(range(first, last)), units, threads)
    assert sorted(seen) == list(range(units))


@pytest.mark.usefixtures("no_threads")
def test_the_caller_works_where_no_thread_can_be_had():
    seen: list[tuple[int, int]] = []
    in_ranges(lambda first, last: seen.append((first, last)), 9, 3)
    assert seen == [(0, 3), (3, 6), (6, 9)]


def fail_at(number: int) -> Callable[[int], int]:
    def work(item: int) -> int:
        if item == number:
            raise ValueError(f"item {item}")
        return item * item

    return work


@pytest.mark.parametrize("count", [0, 1, 2, 40])
def test_results_are_in_order(count: int):
    expected = [item * item for item in range(count)]
    assert map_in_threads(fail_at(-1), range(count), 3) == expected
    assert list(ahead(fail_at(-1), range(count))) == expected


def test_an_exception_comes_through():
    with pytest.raises(ValueError, match="item 3"):
        map_in_threads(fail_at(3), range(9), 2)
    with pytest.raises(ValueError, match="item 3"):
        list(ahead(fail_at(3), range(9)))
    done: list[int] = []

    def work(first: int, last: int) -> None:
        if first == 0:
            raise ValueError("the first range")
        done.append(first)

    with pytest.raises(ValueError, match="the first range"):
        in_ranges(work, 9, 3)
    assert sorted(done) == [3, 6], "the others ended"


def test_only_a_few_results_are_made_ahead():
    made: list[int] = []
    results = ahead(lambda item: made.append(item), range(100), threads=2)
    next(results)
    results.close()
    assert len(made) <= 4


def test_work_is_done_while_a_block_runs():
    begun, let_on, ended = threading.Event(), threading.Event(), threading.Event()

    def work(_: int) -> None:
        begun.set()
        assert let_on.wait(60)
        ended.set()

    with meanwhile(work, [0]):
        assert begun.wait(60)
        let_on.set()
    assert ended.is_set()


def test_a_block_ends_with_its_own_exception_or_that_of_a_work():
    done: list[int] = []

    def work(item: int) -> None:
        if item == 1:
            raise ValueError(f"item {item}")
        done.append(item)

    with pytest.raises(ValueError, match="item 1"), meanwhile(work, range(4)):
        pass
    with pytest.raises(KeyError), meanwhile(work, range(4)):
        raise KeyError
    assert sorted(done) == [0, 0, 2, 2, 3, 3], "all works have ended"


def test_what_comes_first_is_done_before_a_block():
    done: list[str] = []
    with meanwhile(lambda item: done.append("work"), range(3), lambda item: done.append("first")):
        assert done.count("first") == 3
    assert sorted(done) == ["first"] * 3 + ["work"] * 3


def test_a_block_does_not_run_where_what_comes_first_failed():
    done: list[int] = []

    def first(item: int) -> None:
        if item == 1:
            raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match="item 1"), meanwhile(done.append, range(3), first):
        done.append(3)
    assert sorted(done) == [0, 2]


@pytest.mark.usefixtures("no_threads")
def test_work_comes_first_where_no_thread_can_be_had():
    done: list[int] = []
    with meanwhile(done.append, range(3)):
        done.append(3)
    assert done == [0, 1, 2, 3]
