"""Chains: publishing in order, folding exactly, the cheapest way, garbage, and what is refused by which name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

import shiradelta as sd
from shiradelta.chain import Chain, FolderFollower
from shiradelta.chain.fold import fold
from shiradelta.cli import main
from shiradelta.errors import CHAIN_REASONS, ArgumentError, TargetError
from shiradelta.io.writer import writing
from tests.chain.models import Model, add_step, change, read, replayed, same, set_step, small, write
from tests.scenes import contents

ROOT = Path(__file__).parents[2]


class Run:
    """A training run: a chain, and every version as arrays."""

    def __init__(self, folder: Path, steps: int = 0) -> None:
        self.folder = folder
        self.rng = np.random.default_rng(1)
        self.models: list[Model] = [small()]
        self.chain = Chain.create(folder / "chain", write(folder / "model", self.models[0]))
        self.files: list[Path] = []
        for _ in range(steps):
            self.step()

    def step(self, *, adds: bool = False, publish: bool = True) -> Path:
        before = self.models[-1]
        delta = add_step(before, self.rng) if adds else set_step(before, change(before, self.rng))
        path = self.folder / f"{len(self.files)}.shd"
        sd.save_delta(path, delta, values="f32")
        if publish:
            self.chain.publish(path)
        self.models.append(replayed(before, path))
        self.files.append(path)
        return path

    def reached(self, start: int | None, stop: int) -> Model:
        """The model at a version, by the cheapest way."""
        way = self.chain.way(start, stop)
        root = Path(self.chain.store.name)
        model = self.models[start or 0] if way.anchor is None else read(root / way.anchor.folder)
        for step in way.steps:
            with self.chain.open_step(step) as delta:
                model = replayed(model, Path(str(delta.file)))
        return model


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path, 3)


def reason(call: Callable[[], object]) -> str:
    with pytest.raises(sd.ChainError) as caught:
        call()
    line = str(caught.value)
    assert f"[{caught.value.reason}]; " in line
    assert "\n" not in line
    return caught.value.reason


def test_every_version_is_reached_from_every_other_and_from_the_anchor(run: Run):
    run.step(adds=True)
    for stop in range(5):
        assert same(run.reached(None, stop), run.models[stop])
        for start in range(stop + 1):
            assert same(run.reached(start, stop), run.models[stop])
    assert run.chain.verify() == []


def test_steps_out_of_order_are_refused_by_name_and_nothing_is_written(run: Run):
    step = run.step(publish=False)
    before = contents(Path(run.chain.store.name))
    publish = run.chain.publish
    assert reason(lambda: publish(step, version=5)) == "gap"
    assert reason(lambda: publish(run.files[2])) == "duplicate"
    assert reason(lambda: publish(run.files[0], version=1)) == "duplicate"
    assert reason(lambda: publish(step, version=2)) == "taken"
    plain = run.folder / "plain.shd"
    tensors = {"layers.0.up.weight": sd.TensorDelta((24, 16), [1], [1.0], "bfloat16")}
    sd.save_delta(plain, tensors)
    assert reason(lambda: publish(plain)) == "no_fingerprint"
    for shape, name in (((16, 24), "layers.0.up.weight"), ((4,), "nothing")):
        bits = np.zeros(1, "<u2")
        sd.save_delta(plain, {name: sd.TensorDelta(shape, [1], [1.0], "bfloat16", base_bits=bits)})
        assert reason(lambda: publish(plain)) == "wrong_base"
    assert reason(lambda: Chain.create(run.chain.store, run.folder / "model")) == "exists"
    with run.chain.store.locked():
        assert reason(lambda: publish(step)) == "busy"
    assert contents(Path(run.chain.store.name)) == before
    assert publish(step, version=4).stop == 4


def test_a_step_for_another_model_is_refused_where_the_base_is_given(run: Run, tmp_path: Path):
    head = write(tmp_path / "head", run.models[3])
    other = change(run.models[3], run.rng)
    wrong = tmp_path / "wrong.shd"
    sd.save_delta(wrong, set_step(other, change(other, run.rng, 0.9)))
    assert reason(lambda: run.chain.publish(wrong, base=head)) == "wrong_base"
    assert reason(lambda: run.chain.publish(wrong, base=tmp_path / "model")) == "other_model"
    assert run.chain.publish(run.step(adds=True, publish=False), base=head).stop == 4


def test_a_folder_is_published_as_what_differs_whole_tensors_too(run: Run, tmp_path: Path):
    before = run.models[-1]
    after = change(before, run.rng)
    del after["mask"]
    after["head.weight"] = small(5)["layers.0.up.weight"]
    one, other = write(tmp_path / "before", before), write(tmp_path / "after", after)
    assert reason(lambda: run.chain.publish(other)) == "no_fingerprint"
    run.chain.publish(other, base=one, context="none")
    assert same(run.reached(None, 4), after)
    back = run.chain.publish(one, base=other, context="none")
    assert same(run.reached(3, 5), before)
    assert back.gives == run.chain.manifest.states()[3]
    run.chain.fold(3, 5)
    assert same(run.reached(3, 5), before)


def test_a_chain_does_not_lie_in_its_model(run: Run):
    model, before = run.folder / "model", contents(run.folder)
    for place in (model, model / "chain", model / ".." / "model" / "a" / "b"):
        with pytest.raises(TargetError, match=r"lies in the model's folder .*; name one beside it"):
            Chain.create(place, model)
    assert contents(run.folder) == before


def test_a_model_that_is_one_file_is_an_anchor_too(run: Run, tmp_path: Path):
    file = run.folder / "model" / "model.safetensors"
    chain = Chain.create(tmp_path / "of file", file)
    chain.publish(run.files[0], base=file)
    assert chain.publish_anchor(write(tmp_path / "first", run.models[1]) / file.name).bytes > 0
    assert chain.verify() == []
    for version in (0, 1):
        FolderFollower(chain, tmp_path / f"copy{version}").follow(version)
        assert same(read(tmp_path / f"copy{version}"), run.models[version])
    shutil.copy(file, tmp_path / "weights.bin")
    with pytest.raises(sd.ShiraDeltaError):
        Chain.create(tmp_path / "other", tmp_path / "weights.bin")
    assert not (tmp_path / "other" / "chain.json").exists()


def test_a_step_that_comes_twice_with_its_base_is_called_so(run: Run, tmp_path: Path):
    """A trainer that was killed tries again with the base that it had."""
    step = run.step(publish=False)
    before, after, other = (
        write(tmp_path / name, model)
        for name, model in (("before", run.models[3]), ("after", run.models[4]), ("other", run.models[2]))
    )
    publish = run.chain.publish
    publish(step, base=before, version=4)
    for what in (after, step):
        for version in (4, None):
            with pytest.raises(sd.ChainError, match=rf"{what.name}: .*version 4; the newest is 4\) \[duplicate\]"):
                publish(what, base=before, version=version)
    with pytest.raises(sd.ChainError, match=r"other: .*\[taken\]"):
        publish(other, base=before, version=4)
    assert reason(lambda: publish(other, base=before)) == "other_model"
    assert reason(lambda: publish(other, base=before, version=5)) == "other_model"
    publish(after, base=after, version=5)  # nothing changes
    assert reason(lambda: publish(after, base=after, version=5)) == "duplicate"
    assert publish(after, base=after).stop == 6


def test_a_fold_is_one_step_that_gives_the_same(run: Run):
    folded = run.chain.fold(0, 3)
    assert run.chain.way(0, 3).steps == (folded,)
    assert same(run.reached(0, 3), run.models[3])
    assert run.chain.verify() == []
    assert reason(lambda: run.chain.fold(0, 3)) == "duplicate"
    assert reason(lambda: run.chain.fold(2, 3)) == "duplicate"
    assert reason(lambda: run.chain.fold(0, 9)) == "not_published"


def test_what_no_chain_can_have_is_refused_before_anything_is_done(run: Run):
    chain, path, before = run.chain, run.step(publish=False), contents(run.folder)
    calls: dict[str, Callable[[], object]] = {
        r"version is -1; give 1 or more": lambda: chain.publish(path, version=-1),
        r"version is 0; give 1 or more": lambda: chain.publish(path, version=0),
        r"3 -> 1 does not lead forward; give a stop after": lambda: chain.fold(3, 1),
        r"2 -> 2 does not lead forward; give a stop after": lambda: chain.fold(2, 2),
        r"3 -> 1 goes back, .*a follower takes steps back": lambda: chain.way(3, 1),
        r"Chain.way: start is 'a'; give": lambda: chain.way("a", 2),  # type: ignore[arg-type]
        r"Chain.way: stop is None; give": lambda: chain.way(0, None),  # type: ignore[arg-type]
        r"Chain.open_step: step is '0'; give": lambda: chain.open_step("0"),  # type: ignore[arg-type]
    }
    for message, call in calls.items():
        with pytest.raises(ArgumentError, match=message):
            call()
    for version in (-1, 9):
        for refused in (
            lambda version=version: chain.way(version, 2),
            lambda version=version: chain.way(None, version),
            lambda version=version: chain.collect(version),
            lambda version=version: chain.publish_anchor(run.folder / "model", version),
        ):
            with pytest.raises(sd.ChainError, match=rf"version {version}; the newest is 3\) \[not_published\]"):
                refused()
    assert contents(run.folder) == before


def test_sums_are_folded_with_the_base(run: Run, tmp_path: Path):
    for _ in range(2):
        run.step(adds=True)
    wrong = write(run.folder / "wrong", run.models[1])
    assert reason(lambda: run.chain.fold(2, 5, base=wrong)) == "wrong_base"
    run.chain.fold(2, 5, base=write(run.folder / "base", run.models[2]))
    assert same(run.reached(2, 5), run.models[5])
    run.chain.fold(1, 4)  # it is built from the anchor
    assert same(run.reached(1, 4), run.models[4])
    assert run.chain.verify() == []
    steps = [run.chain.open_step(step) for step in run.chain.manifest.steps if not step.is_fold]
    with writing(tmp_path / "fold.shd") as writer:
        assert reason(lambda: fold(steps, writer, None)) == "needs_base"


def test_shifts_are_folded_into_shifts(tmp_path: Path):
    """Steps between checkpoints move elements by few numbers; so does their fold."""
    models = [small()]
    rng = np.random.default_rng(0)
    folders = [write(tmp_path / "0", models[0])]
    chain = Chain.create(tmp_path / "chain", folders[0])
    for number in range(1, 4):
        models.append(change(models[-1], rng))
        folders.append(write(tmp_path / str(number), models[-1]))
        chain.publish(folders[-1], base=folders[-2])
    folded = chain.fold(0, 3)
    with chain.open_step(folded) as delta:
        assert delta["layers.0.up.weight"].op == "ulp"
        assert same(replayed(models[0], Path(str(delta.file))), models[3])
    assert chain.verify() == []
    FolderFollower(chain, tmp_path / "copy").follow()
    assert same(read(tmp_path / "copy"), models[3])


def test_garbage_goes_and_every_reachable_step_stays(run: Run):
    run.step()
    root = Path(run.chain.store.name)
    (root / "steps" / "000004-000005-0123456789abcdef.shd").write_bytes(b"of a publisher that was killed")
    report = run.chain.collect()
    assert (report.forgotten, report.files) == ((), 1)
    assert reason(lambda: run.chain.collect(9)) == "not_published"
    run.chain.publish_anchor(write(run.folder / "third", run.models[3]), 3)
    run.chain.fold(0, 2)
    report = run.chain.collect(3)
    assert set(report.forgotten) == {"step 0 -> 1", "step 1 -> 2", "step 0 -> 2", "step 2 -> 3", "anchor 0"}
    assert same(run.reached(None, 4), run.models[4])
    assert same(run.reached(3, 4), run.models[4])
    assert reason(lambda: run.chain.way(2, 4)) == "pruned"
    assert reason(lambda: run.chain.way(None, 2)) == "pruned"
    assert {path.parent.name for path in root.rglob("*.shd")} == {"steps"}
    assert len(list(root.rglob("*.shd"))) == 1
    assert run.chain.verify() == []


def test_an_anchor_is_the_version_that_it_says(run: Run):
    anchor = run.chain.publish_anchor
    assert reason(lambda: anchor(run.folder / "model")) == "other_model"
    assert reason(lambda: anchor(run.folder / "model", 0)) == "duplicate"
    assert reason(lambda: anchor(run.folder / "model", 8)) == "not_published"
    folder = write(run.folder / "head", run.models[3])
    (folder / "secrets").symlink_to("/etc/hostname")
    with pytest.raises(sd.TargetError, match="secrets: is a link"):
        anchor(folder)
    (folder / "secrets").unlink()
    (folder / "with blank").touch()
    with pytest.raises(sd.TargetError, match="cannot hold a file of this name"):
        anchor(folder)
    (folder / "with blank").unlink()
    anchor(folder)
    assert run.chain.way(None, 3).steps == ()


def test_a_chain_that_is_replaced_damaged_or_gone_is_named(run: Run, tmp_path: Path):
    root = Path(run.chain.store.name)
    step = run.chain.manifest.steps[1]
    file = root / step.path
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + b"\1")
    assert reason(lambda: run.chain.open_step(step)) == "wrong_bytes"
    (problem,) = run.chain.verify()
    assert str(file) in problem
    file.unlink()
    assert reason(lambda: run.chain.open_step(step)) == "missing_file"
    file.write_bytes(whole)
    assert run.chain.verify() == []
    Chain.create(tmp_path / "other", tmp_path / "model")
    shutil.copy(tmp_path / "other" / "chain.json", root)
    assert reason(run.chain.refresh) == "other_chain"
    (root / "chain.json").unlink()
    assert reason(lambda: Chain.open(root)) == "no_chain"
    assert reason(lambda: Chain.open(tmp_path / "model" / "config.json")) == "no_chain"


def test_two_publishers_take_turns_and_neither_loses_a_step(run: Run):
    other = Chain.open(run.chain.store.name)
    run.step()
    step = run.step(publish=False)
    assert other.head == 3
    assert other.publish(step).stop == 5
    assert run.chain.refresh().head == 5
    assert same(run.reached(None, 5), run.models[5])


def test_the_commands_do_what_the_methods_do(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(run.folder)

    def command(words: str, code: int = 0) -> str:
        result = CliRunner().invoke(main, ["chain", *words.split()])
        assert result.exit_code == code, result.output
        return result.stdout if not code else result.stderr

    run.step(publish=False)
    assert "version 0 is model" in command("init second model")
    assert command("publish chain 3.shd --version 4").startswith("step 3 -> 4: ")
    assert json.loads(command("fold chain 0 4 --json"))["stop"] == 4
    assert "the newest version is 4" in command("list chain")
    assert json.loads(command("list chain --json"))["head"] == 4
    write(run.folder / "head", run.models[4])
    assert "anchor 4" in command("anchor chain head")
    assert "1 file removed" not in command("gc chain")
    assert "anchor 0" in command("gc chain --before 4")
    assert "up to version 4" in command("verify chain")
    assert "[gap]" in command("publish chain 3.shd --version 9", 1)
    next(Path("chain", "anchors").rglob("config.json")).write_text("{}")
    assert CliRunner().invoke(main, ["chain", "verify", "chain"]).exit_code == 1


def test_the_specification_lists_every_reason():
    text = (ROOT / "spec" / "CHAIN.md").read_text().partition("## 6. Reason codes")[2]
    rows = dict(line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `"))
    assert {code.strip("`"): what for code, what in rows.items()} == {
        code: what for code, (what, _) in CHAIN_REASONS.items()
    }


def test_versions_of_packed_weights_are_followed_bit_for_bit(tmp_path: Path):
    """They are bits like all others; the configuration says that they are packed, and so do their names."""
    rng = np.random.default_rng(0)
    state = {
        "l.qweight": rng.integers(-(2**31), 2**31, (64, 32)).astype(np.int32),
        "l.scales": rng.random((2, 32)).astype(np.float16),
    }
    for version in range(3):
        (folder := tmp_path / str(version)).mkdir()
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text('{"quantization_config": {"quant_method": "gptq", "bits": 4}}')
        state = {name: array.copy() for name, array in state.items()}
        state["l.qweight"][version] ^= 0xF0
        state["l.scales"][0, version] *= 2
    chain = Chain.create(tmp_path / "chain", tmp_path / "0")
    for version in 1, 2:
        chain.publish(tmp_path / str(version), base=tmp_path / str(version - 1))
    chain.fold(0, 2, base=tmp_path / "0")
    assert chain.verify() == []
    follower = FolderFollower(tmp_path / "chain", tmp_path / "copy")
    for version in 0, 1, 2, 1:
        follower.follow(version)
        found, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("copy", str(version)))
        assert all(np.array_equal(found[name], array) for name, array in wanted.items())
