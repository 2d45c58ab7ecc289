"""Chains whose steps are read with the version before them only."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import shiradelta as sd
from shiradelta.chain import Chain, FolderFollower, LiveFollower
from shiradelta.errors import BaseMismatchError, ChainError, FormatError
from shiradelta.format import arithmetic
from shiradelta.format.digest import tensor_digest
from shiradelta.io.writer import writing
from tests.chain.models import Model, read, same, write


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Models of which each moves all weights by about the same amount from the one before."""
    rng, place = np.random.default_rng(0), tmp_path_factory.mktemp("versions")
    weights = {name: rng.normal(size=(96, 80)).astype(np.float32) * 0.03 for name in ("up", "down")}
    found = []
    for version in range(5):
        model: Model = {
            name: ("bfloat16", values.shape, arithmetic.from_float32(values.reshape(-1).astype(np.float32), "bfloat16"))
            for name, values in weights.items()
        }
        found.append(write(place / str(version), model))
        weights = {name: values + rng.normal(size=values.shape) * 3e-6 for name, values in weights.items()}
    return found


@pytest.fixture(scope="module")
def chain(versions: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("context") / "chain"
    made = Chain.create(place, versions[0])
    for before, after in pairwise(versions):
        step = made.publish(after, base=before)
        with made.open_step(step) as delta:
            assert delta.needs_base
    return place


def test_a_folder_follows_from_the_anchor_and_back(chain: Path, versions: list[Path], tmp_path: Path):
    follower = FolderFollower(chain, tmp_path / "model")
    for version in 0, 2, 4, 3, 4:
        follower.follow(version)
        assert same(read(tmp_path / "model"), read(versions[version]))


def test_a_live_model_follows(chain: Path, versions: list[Path]):
    live = {name: bits.reshape(shape).copy() for name, (_, shape, bits) in read(versions[0]).items()}
    follower = LiveFollower(chain, sd.HotSwap(live), 0)
    for version in range(1, 5):
        follower.follow(version)
        now = read(versions[version])
        assert all(np.array_equal(live[name].reshape(-1), bits) for name, (_, _, bits) in now.items())


def test_every_step_is_proved(chain: Path, versions: list[Path], tmp_path: Path):
    assert Chain.open(chain).verify() == []
    shutil.copytree(chain, copy := tmp_path / "chain")
    opened = Chain.open(copy)
    path = copy / opened.manifest.steps[1].path
    data = bytearray(path.read_bytes())
    data[-80] ^= 1
    path.write_bytes(data)
    problems = opened.verify()
    assert len(problems) == 3  # the step, and the versions behind it
    assert all(path.name in problem and "wrong_bytes" in problem for problem in problems)


@pytest.mark.parametrize("field", ["base_fingerprint", "result_fingerprint"])
def test_a_step_whose_fingerprint_lies_is_found(
    versions: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str
):
    """The content digest does not cover fingerprints, and this publisher has not checked them."""
    sd.convert(versions[1], tmp_path / "step.shd", base=versions[0], lossless=True)
    sd.convert(versions[1], tmp_path / "small.shd", base=versions[0], lossless=True, context="base")
    with (
        sd.open_delta(tmp_path / "step.shd") as plain,
        sd.open_delta(tmp_path / "small.shd") as small,
        writing(tmp_path / "lie.shd", "f32") as writer,
    ):
        for name, stored in small.items():
            assert stored.result_fingerprint is None  # it follows from the base
            record = stored.record._replace(result_fingerprint=plain[name].result_fingerprint)
            record = record._replace(**{field: getattr(record, field) ^ 1})
            sections = (stored.section(each).tobytes() for each in (record.index, record.values))
            writer.add_sections(record, tensor_digest(plain[name]), *sections)
    made = Chain.create(tmp_path / "chain", versions[0])
    with pytest.raises(ChainError, match="wrong_base"):
        made.publish(tmp_path / "lie.shd", base=versions[0])
    monkeypatch.setattr("shiradelta.chain.chain.check_contents", lambda *_: None)
    made.publish(tmp_path / "lie.shd", base=versions[0])
    monkeypatch.undo()
    (problem,) = made.verify()
    assert "fingerprint" in problem
    with pytest.raises(BaseMismatchError, match="fingerprint"):
        FolderFollower(made, tmp_path / "model").follow()


@pytest.mark.parametrize("given", [True, False])
def test_steps_are_folded_with_the_model_before_them(chain: Path, versions: list[Path], tmp_path: Path, given: bool):
    shutil.copytree(chain, copy := tmp_path / "chain")
    opened = Chain.open(copy)
    folded = opened.fold(1, 4, base=versions[1] if given else None)
    with opened.open_step(folded) as delta:
        assert delta.needs_base
    model = tmp_path / "model"
    shutil.copytree(versions[1], model)
    follower = FolderFollower(copy, model)
    assert [(step.start, step.stop) for step in follower.follow()] == [(1, 4)]
    assert same(read(model), read(versions[4]))


def test_the_form_is_chosen(versions: list[Path], tmp_path: Path):
    sizes = {}
    for context in "none", "base":
        made = Chain.create(tmp_path / context, versions[0])
        sizes[context] = made.publish(versions[1], base=versions[0], context=context).bytes
        with made.open_step(made.manifest.steps[0]) as delta:
            assert delta.needs_base == (context == "base")
    assert sizes["base"] < sizes["none"]


@pytest.mark.parametrize(("shape", "dtype"), [((960, 80), "bfloat16"), ((96, 80), "float16")])
def test_a_step_for_another_form_of_a_tensor_is_refused(
    versions: list[Path], tmp_path: Path, shape: tuple[int, int], dtype: str
):
    last = shape[0] * shape[1] - 1
    step = sd.TensorDelta(shape, [last], np.ones(1, np.uint16), dtype, "set", base_bits=np.zeros(1, np.uint16))
    sd.save_delta(tmp_path / "step.shd", {"up": step})
    with pytest.raises(ChainError, match="has it as bfloat16") as caught:
        Chain.create(tmp_path / "chain", versions[0]).publish(tmp_path / "step.shd", base=versions[0])
    assert caught.value.reason == "wrong_base"


def test_a_step_of_that_form_is_published_with_its_base_only(versions: list[Path], tmp_path: Path):
    sd.convert(versions[1], tmp_path / "1.shd", base=versions[0], lossless=True, context="base")
    made = Chain.create(tmp_path / "chain", versions[0])
    with pytest.raises(FormatError, match=r"base_needed\]; give the model before it \(--base\)"):
        made.publish(tmp_path / "1.shd")
    made.publish(tmp_path / "1.shd", base=versions[0])
    with pytest.raises(ChainError) as caught:
        made.publish(tmp_path / "1.shd", base=versions[1])
    assert caught.value.reason == "duplicate"
    assert FolderFollower(made, tmp_path / "model").follow()
    assert same(read(tmp_path / "model"), read(versions[1]))
