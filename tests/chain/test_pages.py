"""Pages: a manifest names early steps by files of their rows, and nobody reads those that does not need them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shiradelta.chain import Chain, FolderFollower, pages
from shiradelta.chain.manifest import MANIFEST
from shiradelta.chain.rows import Page
from tests.chain.models import read, same, write
from tests.chain.test_chain import Run, reason


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "PAGE_STEPS", 3)
    monkeypatch.setattr(pages, "NEWEST", 2)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path, 9)


def listed(run: Run) -> dict[str, Any]:
    found = json.loads((run.folder / "chain" / MANIFEST).read_text())
    assert isinstance(found, dict)
    return found


def test_a_short_chain_has_none_and_is_what_earlier_readers_know(tmp_path: Path):
    run = Run(tmp_path, 4)
    assert listed(run)["format"] == 1
    assert "pages" not in listed(run)
    run.step()
    assert listed(run)["format"] == 2
    assert [(row["first"], row["last"]) for row in listed(run)["pages"]] == [(0, 2)]
    assert [row["start"] for row in listed(run)["steps"]] == [3, 4]


def test_a_manifest_stays_small(run: Run):
    for _ in range(12):
        run.step()
        assert len(listed(run)["steps"]) < 5
    steps = Chain.open(run.chain.store).manifest.steps
    assert [step.start for step in steps] == list(range(21))
    assert steps == run.chain.manifest.steps


def test_they_are_published_after_followed_folded_and_collected(run: Run, tmp_path: Path):
    copy = tmp_path / "copy"
    FolderFollower(run.chain, copy).follow(2)
    run.chain.fold(2, 7)
    run.step(adds=True)
    assert run.chain.verify() == []
    assert [(step.start, step.stop) for step in FolderFollower(run.chain, copy).follow()] == [
        (2, 7),
        (7, 8),
        (8, 9),
        (9, 10),
    ]
    assert same(read(copy), run.models[10])
    assert run.chain.collect().files == 0
    run.chain.publish_anchor(write(tmp_path / "five", run.models[5]), 5)
    report = run.chain.collect(5)
    assert report.forgotten == (
        *(f"step {n} -> {n + 1}" for n in range(3)),
        "step 2 -> 7",
        "step 3 -> 4",
        "step 4 -> 5",
        "anchor 0",
    )
    assert run.chain.verify() == []
    assert sorted(run.chain.store.files()) == sorted(run.chain.manifest.files())
    FolderFollower(run.chain, tmp_path / "late").follow()
    assert same(read(tmp_path / "late"), run.models[10])


@pytest.mark.slow
def test_publishing_and_following_the_newest_steps_reads_none(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    copy = tmp_path / "copy"
    FolderFollower(run.chain, copy).follow()

    def refuse(self: pages.Pages, page: Page) -> None:
        raise AssertionError(f"{page.path} is read")

    monkeypatch.setattr(pages.Pages, "_parsed", refuse)
    run.chain = Chain.open(run.folder / "chain")  # as another process does, which has read none
    assert reason(lambda: run.chain.publish(run.files[8])) == "duplicate"
    assert reason(lambda: run.chain.publish(run.files[8], version=9)) == "duplicate"
    assert reason(lambda: run.chain.publish(run.files[7], version=9)) == "taken"
    for _ in range(6):
        run.step()
        FolderFollower(Chain.open(run.folder / "chain"), copy).follow()
    assert same(read(copy), run.models[15])


def test_a_step_of_a_page_that_is_published_again_is_told(run: Run):
    chain = Chain.open(run.folder / "chain")
    assert reason(lambda: chain.publish(run.files[1], version=2)) == "duplicate"
    assert reason(lambda: chain.publish(run.files[1], version=3)) == "taken"
    assert reason(lambda: chain.fold(1, 2)) == "duplicate"


def test_a_page_that_goes_while_a_follower_looks_is_looked_up_again(run: Run, tmp_path: Path):
    chain = Chain.open(run.folder / "chain")
    chain.refresh()
    follower = FolderFollower(chain, tmp_path / "copy")
    other = Chain.open(run.folder / "chain")
    other.publish_anchor(write(tmp_path / "seven", run.models[7]), 7)
    stale = chain.manifest
    other.collect(7)
    refreshed = chain.refresh
    answers = iter([stale])

    def late() -> Any:
        chain.manifest = next(answers, None) or refreshed()
        return chain.manifest

    chain.refresh = late  # type: ignore[method-assign]
    follower.follow()
    assert same(read(tmp_path / "copy"), run.models[9])


def rewritten(page: Page, run: Run, change: Callable[[Any], object]) -> Page:
    """A page that is not what it was, with the digest of what it is now."""
    root = run.folder / "chain"
    rows = json.loads((root / page.path).read_text())
    change(rows)
    raw = json.dumps(rows).encode()
    (root / page.path).unlink()
    page = replace(page, bytes=len(raw), sha256=hashlib.sha256(raw).hexdigest())
    (root / page.path).write_bytes(raw)
    return page


CHANGES: dict[str, Callable[[Any], object]] = {
    "another key": lambda rows: rows.update(more=1),
    "no list": lambda rows: rows.update(steps={}),
    "no steps": lambda rows: rows.update(steps=[]),
    "other steps": lambda rows: rows["steps"].pop(),
    "steps out of order": lambda rows: rows["steps"].insert(1, rows["steps"][0]),
    "a step that leads back": lambda rows: rows["steps"][1].update(stop=0),
    "a step past the head": lambda rows: rows["steps"][1].update(stop=10),
    "a step of another state": lambda rows: rows["steps"][1].update(gives="0" * 64),
    "a gap": lambda rows: rows["steps"].pop(1),
    "a digest of another form": lambda rows: rows["steps"][0].update(sha256="x"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_does_not_agree_is_refused_when_it_is_read(run: Run, tmp_path: Path, change: Callable[[Any], object]):
    manifest = run.chain.manifest
    bad = replace(manifest, pages=(rewritten(manifest.pages[0], run, change), *manifest.pages[1:]))
    (run.folder / "chain" / MANIFEST).write_bytes(bad.to_json())
    assert reason(FolderFollower(run.folder / "chain", tmp_path / "copy").follow) == "bad_manifest"
    assert reason(Chain.open(run.folder / "chain").verify) == "bad_manifest"
    assert not (tmp_path / "copy").exists()


def test_what_is_damaged_or_missing_is_named(run: Run, tmp_path: Path):
    page = run.folder / "chain" / run.chain.manifest.pages[1].path
    whole = page.read_bytes()
    page.write_bytes(whole[:-1])
    assert reason(FolderFollower(run.folder / "chain", tmp_path / "copy").follow) == "wrong_bytes"
    page.unlink()
    assert reason(FolderFollower(run.folder / "chain", tmp_path / "copy").follow) == "missing_file"
    page.write_bytes(whole)
    FolderFollower(run.folder / "chain", tmp_path / "copy").follow()
    assert same(read(tmp_path / "copy"), run.models[9])
