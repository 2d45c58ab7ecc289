"""Followers: a folder and a live model go from version to version, exactly, whatever interrupts them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import shiradelta as sd
from shiradelta.chain import Chain, FolderFollower, InFlight, LiveFollower, Step, follow, status
from shiradelta.cli import main
from shiradelta.errors import ArgumentError, TargetError
from tests.chain.models import Model, read, same, small, write
from tests.chain.test_chain import Run, reason
from tests.killing import VICTIMS, kill_repeatedly, write_inputs
from tests.scenes import contents, weights


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path, 3)


def test_a_new_folder_begins_with_an_anchor_and_follows(run: Run, tmp_path: Path):
    follower = FolderFollower(run.chain.store, tmp_path / "copy")
    assert follower.version is None
    assert [str(step) for step in follower.follow()] == ["step 0 -> 1", "step 1 -> 2", "step 2 -> 3"]
    assert same(read(follower.folder), run.models[3])
    assert follower.follow() == []
    run.step(adds=True)
    assert [step.stop for step in follower.follow()] == [4]
    assert same(read(follower.folder), run.models[4])
    assert status(follower.folder).version == follower.version == 4
    assert sd.verify(follower.folder, full=True).state == "patched"
    assert (follower.folder / "config.json").read_text() == (run.folder / "model" / "config.json").read_text()


def test_a_file_in_place_of_the_folder_is_refused(run: Run, tmp_path: Path):
    (tmp_path / "copy").write_bytes(b"not a folder")
    with pytest.raises(TargetError, match=r"copy: is a file; give a model's folder"):
        FolderFollower(run.chain, tmp_path / "copy").follow()
    assert (tmp_path / "copy").read_bytes() == b"not a folder"


def test_a_version_that_the_chain_does_not_have_takes_nothing_back(run: Run, tmp_path: Path):
    follower = FolderFollower(run.chain, tmp_path / "copy")
    follower.follow()
    for version in (-1, 9):
        with pytest.raises(sd.ChainError, match=rf"version {version}; the newest is 3\) \[not_published\]"):
            follower.follow(version)
        assert follower.version == 3


def test_a_live_model_is_of_a_version_that_the_chain_has(run: Run):
    late = Chain.open(run.folder / "chain")
    run.step()
    swap = sd.HotSwap({"w": np.zeros((8, 8), np.float32)})
    for version in (-1, 99):
        with pytest.raises(sd.ChainError, match=rf"version {version}; the newest is 4\) \[not_published\]"):
            LiveFollower(run.chain, swap, version)
    assert LiveFollower(late, swap, 4).version == 4  # published since it was opened


def test_of_two_that_begin_a_folder_at_once_one_is_told_of_the_other(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder, write_anchor = tmp_path / "copy", follow.write_anchor
    first, second = FolderFollower(run.chain, folder), FolderFollower(run.chain, folder)

    def overtaken(*args: Any) -> None:
        monkeypatch.setattr(follow, "write_anchor", write_anchor)
        second.follow()
        write_anchor(*args)

    monkeypatch.setattr(follow, "write_anchor", overtaken)
    with pytest.raises(TargetError, match=r"copy: exists by now, as another process has made it; wait for that one"):
        first.follow()
    assert first.version == second.version == 3
    assert same(read(folder), run.models[3])
    assert sorted(each.name for each in tmp_path.iterdir() if "copy" in each.name) == ["copy"]


def test_steps_are_taken_back_as_far_as_they_are_kept(run: Run, tmp_path: Path):
    run.step(adds=True)
    follower = FolderFollower(run.chain, tmp_path / "copy", keep=2)
    follower.follow()
    for version in (3, 2):
        assert follower.follow(version) == []
        assert same(read(follower.folder), run.models[version])
    assert reason(lambda: follower.follow(1)) == "not_kept"
    assert same(read(follower.folder), run.models[2])
    follower.follow()
    assert same(read(follower.folder), run.models[4])
    sd.revert(follower.folder)  # by hand: the record says what is left
    assert follower.version == status(follower.folder).version == 3
    follower.follow()
    assert same(read(follower.folder), run.models[4])
    assert reason(lambda: follower.follow(9)) == "not_published"


def test_a_folder_that_is_there_has_to_be_a_version(run: Run, tmp_path: Path):
    second = write(tmp_path / "second", run.models[2])
    assert status(second).version is None
    follower = FolderFollower(run.chain, second)
    assert follower.version == 2
    follower.follow()
    assert same(read(second), run.models[3])
    strange = write(tmp_path / "strange", {**run.models[2], "mask": small(3)["mask"]})
    before = contents(strange)
    assert reason(FolderFollower(run.chain, strange).follow) == "not_on_chain"
    assert contents(strange) == before
    other = Run(tmp_path / "other", 1)
    assert reason(FolderFollower(other.chain, second).follow) == "other_chain"


def test_what_is_not_of_the_chain_is_not_written_over(run: Run, tmp_path: Path):
    folder = tmp_path / "copy"
    follower = FolderFollower(run.chain, folder)
    follower.follow()
    name = "layers.1.up.weight"
    sd.save_delta(tmp_path / "style.shd", {name: sd.TensorDelta((8, 8), [3], [1.0], "float16")})
    sd.apply(folder, tmp_path / "style.shd")
    run.step()
    before = weights(folder)
    assert reason(follower.follow) == "not_on_chain"
    assert status(folder).version is None
    assert weights(folder) == before
    sd.revert(folder)
    assert follower.follow()[0].stop == 4
    run.step()
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-380] + bytes(380))
    with pytest.raises(sd.BaseMismatchError):
        follower.follow()
    assert file.read_bytes() == whole[:-380] + bytes(380)
    file.write_bytes(whole)
    follower.follow()
    assert same(read(folder), run.models[5])


def test_a_commit_keeps_the_version_only_of_weights_that_are_as_they_were_left(run: Run, tmp_path: Path):
    folder = tmp_path / "copy"
    FolderFollower(run.chain, folder).follow()
    shutil.copytree(folder, tmp_path / "changed")
    for each in (folder, tmp_path / "changed"):
        if each != folder:  # an element that no step lists
            changed: Model = read(each)
            listed = {int(at) for step in run.files for at in _positions(step)}
            at = next(number for number in range(384) if number not in listed)
            changed["layers.0.up.weight"][2][at] ^= 1
            write(tmp_path / "x", changed)
            shutil.copy(tmp_path / "x" / "model.safetensors", each)
            shutil.rmtree(tmp_path / "x")
        result = CliRunner().invoke(main, ["commit", str(each)])
        assert result.exit_code == 0, result.output
    assert status(folder).version == 3
    assert status(tmp_path / "changed").version is None


def _positions(step: Path) -> np.ndarray:
    with sd.open_delta(step) as delta:
        return delta["layers.0.up.weight"].positions() if "layers.0.up.weight" in delta else np.zeros(0, int)


def test_the_same_change_may_come_again(run: Run, tmp_path: Path):
    """Back and forth: the content digest of the third step is that of the first."""
    folder = tmp_path / "copy"
    follower = FolderFollower(run.chain, folder)
    for number in range(4, 8):
        before, after = (write(tmp_path / f"{number}{side}", run.models[-1 - side]) for side in (0, 1))
        run.chain.publish(after, base=before)
        run.models.append(run.models[-2])
        follower.follow()
        assert same(read(folder), run.models[number])
    assert len({step.delta for step in run.chain.manifest.steps}) < len(run.chain.manifest.steps)


def test_hooks_see_every_step_and_may_refuse_it(run: Run, tmp_path: Path):
    seen: list[str] = []

    def before(step: Step) -> None:
        seen.append(f"before {step.stop}")
        if step.stop == 3 and seen.count("before 3") == 1:
            raise RuntimeError("busy")

    follower = FolderFollower(
        run.chain, tmp_path / "copy", before=before, after=lambda s: seen.append(f"after {s.stop}")
    )
    with pytest.raises(RuntimeError, match="busy"):
        follower.follow()
    assert follower.version == 2
    assert same(read(follower.folder), run.models[2])
    watch = follower.watch(0, until=lambda: len(seen) > 6)
    assert [step.stop for step in watch] == [3]
    assert seen == ["before 1", "after 1", "before 2", "after 2", "before 3", "before 3", "after 3"]


def test_a_file_that_is_collected_meanwhile_is_said_by_the_manifest_of_then(run: Run, tmp_path: Path):
    publisher = run.chain

    def collect(step: Step) -> None:
        if step.stop == 1:
            publisher.publish_anchor(write(tmp_path / "third", run.models[3]))
            publisher.collect(3)

    follower = FolderFollower(run.chain.store, tmp_path / "copy", before=collect)
    assert reason(follower.follow) == "pruned"
    assert follower.version == 1
    assert same(read(follower.folder), run.models[1])
    newer = FolderFollower(run.chain.store, tmp_path / "newer")
    newer.follow()
    assert same(read(newer.folder), run.models[3])


def test_arguments_that_mean_nothing_are_refused(run: Run, tmp_path: Path):
    follower = FolderFollower(run.chain, tmp_path / "copy")
    for call, what in (
        (lambda: FolderFollower(run.chain, tmp_path / "copy", keep=0), "keep is 0"),
        (lambda: next(follower.watch(-1)), "every is -1"),
        (lambda: next(follower.watch(float("nan"))), "every is nan"),
        (lambda: InFlight("finish", -1), "seconds is -1"),
        (lambda: InFlight("finish", float("nan")), "seconds is nan"),
        (lambda: InFlight("mix"), "'mix' is unknown; take finish, abort"),
        (lambda: run.chain.publish(run.files[2], context="lossy"), "context is 'lossy', which is none of none, base"),
    ):
        with pytest.raises(ArgumentError, match=what):
            call()
    assert not follower.folder.exists()
    assert run.chain.refresh().head == 3


@pytest.mark.parametrize("adds", [False, True])
def test_a_live_model_follows_too(run: Run, adds: bool):
    names = {name: bits.reshape(shape) for name, (_, shape, bits) in run.models[0].items()}
    swap = sd.HotSwap({name: viewed(run.models[0], name, bits) for name, bits in names.items()})
    seen: list[int] = []
    follower = LiveFollower(run.chain, swap, 0, after=lambda step: seen.append(step.stop))

    def is_version(number: int) -> bool:
        now = {name: bits.reshape(-1) for name, bits in names.items()}
        return all(np.array_equal(now[name], bits) for name, (_, _, bits) in run.models[number].items())

    for _ in range(3):
        run.step(adds=adds)
        follower.follow()
        assert follower.version == run.chain.head == seen[-1]
        assert is_version(follower.version)
    follower.follow(5)
    assert follower.version == 5
    assert is_version(5)
    assert reason(lambda: follower.follow(4)) == "not_kept"
    follower.follow()
    assert is_version(6)
    swap.revert()
    assert follower.version == 5
    names["mask"][:] ^= 1
    run.step()
    with pytest.raises(sd.ShiraDeltaError):
        follower.follow()


def viewed(model: Model, name: str, bits: np.ndarray) -> np.ndarray:
    """A float array over the same memory; uint16 stands for bfloat16."""
    dtype = model[name][0]
    return bits.view({"float32": "<f4", "float16": "<f2"}.get(dtype, bits.dtype))


def test_the_commands_follow(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(run.folder)

    def command(words: str, code: int = 0) -> str:
        result = CliRunner().invoke(main, ["chain", *words.split()])
        assert result.exit_code == code, result.output
        return result.output

    assert command("follow chain copy --to 2").endswith("copy: version 2\n")
    assert json.loads(command("follow chain copy --json"))["version"] == 3
    assert "version 3 of chain" in command("status copy")
    assert json.loads(command("status copy --json"))["kept"] == 3
    assert "no version" in command("status model", 1)
    assert "give one of the two" in command("follow chain copy --to 2 --every 1", 2)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_follower_that_is_killed_goes_on(made: Path, tmp_path: Path):
    (tmp_path / "inputs").mkdir()
    write_inputs(tmp_path / "inputs", made / "bf16", made / "tuned_a")
    (victim,) = (each for each in VICTIMS if each.name == "chain follow")
    seen = kill_repeatedly(victim, tmp_path / "inputs", 16, 0, tmp_path / "work")
    assert sum(seen.values()) == 16
