"""Folds give the bits that their steps give one after the other, or are refused by name."""

from __future__ import annotations

import os
import tempfile
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import shiradelta as sd
from shiradelta import TensorDelta
from shiradelta.chain import chain as chain_module
from shiradelta.chain import runs as module
from shiradelta.chain.difference import shifted
from shiradelta.chain.fold import fold_tensor
from shiradelta.chain.runs import Run, Runs, merged
from shiradelta.format.arithmetic import fingerprint
from shiradelta.util.arrays import distinct
from tests.chain.models import Model, add_step, change, replayed, same, set_step, small, tensor, write
from tests.chain.test_chain import Run as Training


def random_step(before: Model, rng: np.random.Generator) -> dict[str, TensorDelta]:
    """Sets, adds, adds whole tensors and removes some."""
    sets, adds = set_step(before, change(before, rng, 0.3)), add_step(before, rng)
    step = {}
    for name, (dtype, shape, bits) in before.items():
        how = rng.choice(["set", "ulp", "add", "drop", "replace", "leave"], p=[0.3, 0.2, 0.1, 0.1, 0.1, 0.2])
        every = fingerprint(np.arange(bits.size), bits)
        if how == "drop":
            step[name] = TensorDelta(shape, None, None, dtype, "drop", base_fingerprint=every)
        elif how == "replace":
            new = rng.choice(["bfloat16", "uint8"]), (int(rng.integers(3, 5)), 3)
            _, shape, bits = tensor(rng, new[1], new[0])
            step[name] = TensorDelta(shape, None, bits, str(new[0]), "replace", base_fingerprint=every)
        elif how == "ulp" and name in sets:
            step[name] = shifted(sets[name])
        elif name in {"set": sets, "add": adds}.get(how, {}):
            step[name] = {"set": sets, "add": adds}[how][name]
    for name, (dtype, shape, bits) in small(int(rng.integers(9))).items():
        if name not in before and rng.random() < 0.5:
            shape = shape if rng.random() < 0.7 else (bits.size,)
            step[name] = TensorDelta(shape, None, bits, dtype, "new")
    return step


@pytest.mark.slow
@given(st.integers(0, 1 << 30), st.integers(2, 6), st.booleans())
@example(248, 2, False)
def test_a_fold_gives_what_its_steps_give(seed: int, steps: int, has_base: bool):
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        run = Training(Path(folder))
        for number in range(steps):
            path = Path(folder) / f"{number}.shd"
            sd.save_delta(path, random_step(run.models[-1], rng), values="int8")
            run.models.append(replayed(run.models[-1], path))
            run.chain.publish(path, base=write(Path(folder) / f"model{number}", run.models[-2]))
        assert run.chain.verify() == []
        start = int(rng.integers(steps - 1))
        base = write(Path(folder) / "base", run.models[start]) if has_base else None
        step = run.chain.fold(start, steps, base=base)
        with run.chain.open_step(step) as delta:
            assert same(replayed(run.models[start], Path(str(delta.file))), run.models[steps])
        assert run.chain.verify() == []
        assert same(run.reached(None, steps), run.models[steps])


@pytest.mark.parametrize(("numel", "sizes"), [(5000, [1, 3000, 1, 0, 2, 400, 5000, 7]), (1 << 40, [3, 900, 0, 1, 50])])
def test_runs_merge_to_the_same_whatever_their_sizes(numel: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch):
    """Many elements among few positions, and few among many, in several ranges."""
    monkeypatch.setattr(module, "_SPAN", 512)
    monkeypatch.setattr(module, "_WAITING", 4)
    rng = np.random.default_rng(0)
    places = distinct(rng.integers(0, numel, 5000)) if numel > 5000 else np.arange(numel)
    before = dict(zip(places.tolist(), rng.integers(0, 1 << 16, places.size).tolist(), strict=True))
    now, runs, parts = dict(before), Runs(numel), []
    for size in sizes:
        at = np.sort(rng.choice(places[: 3 * max(sizes)], size, replace=False))
        bits = rng.integers(0, 1 << 16, size).astype("<u2")
        old = np.array([now[each] for each in at.tolist()], "<u2")
        parts.append(Run(at, bits, fingerprint(at, old)))
        runs.add(parts[-1])
        now |= dict(zip(at.tolist(), bits.tolist(), strict=True))
    found = runs.all()
    assert found is not None
    listed = sorted({each for run in parts for each in run.positions.tolist()})
    for run in (found, merged(parts)):
        assert run.positions.tolist() == listed
        assert run.bits.tolist() == [now[each] for each in listed]
        assert run.base == fingerprint(run.positions, np.array([before[each] for each in listed], "<u2"))


def test_steps_whose_fingerprints_contradict_each_other_are_refused(tmp_path: Path):
    """What a chain lists may come from a stranger."""
    run = Training(tmp_path, 1)
    step = run.step(publish=False)
    with sd.open_delta(step) as delta:
        wrong = {
            name: TensorDelta(one.shape, one.positions(), one.bits(), one.dtype, "set", base_fingerprint=1)
            for name, one in delta.items()
        }
    sd.save_delta(step, wrong)
    run.chain.publish(step)  # without the base nobody can tell
    run.chain.fold(0, 2)  # nor here: the sums hold
    other = TensorDelta((5,), [1], np.zeros(1, "<u2"), "bfloat16", "set", base_fingerprint=0)
    sd.save_delta(tmp_path / "other.shd", {"layers.0.up.weight": other})
    with sd.open_delta(run.files[0]) as one, sd.open_delta(tmp_path / "other.shd") as two:
        name = "layers.0.up.weight"
        with pytest.raises(sd.ChainError, match="was of another form before"):
            fold_tensor(name, [("a", one[name]), ("b", two[name])], None)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such limit")
def test_more_steps_are_folded_than_files_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import resource

    run = Training(tmp_path, 24)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = {int(each) for each in os.listdir("/dev/fd")}
    free = (limit for limit in range(len(used), 1 << 16) if limit - sum(at < limit for at in used) > 12)
    low = next(free), limits[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, low)
    try:
        run.chain.fold(0, 24)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == low
        monkeypatch.setattr(chain_module, "open_files", lambda _: nullcontext())
        with pytest.raises(sd.ShiraDeltaError, match=r"Too many open files\)*; open fewer at a time"):
            run.chain.fold(1, 24)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert run.chain.verify() == []
    assert same(run.reached(None, 24), run.models[24])
