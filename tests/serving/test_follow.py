"""A serving engine that follows a chain: each version's bits, wherever its follower was killed; and what is refused."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import shiradelta as sd
from shiradelta.chain import Chain, Step
from shiradelta.errors import ArgumentError, BaseMismatchError, ChainError, TargetError
from shiradelta.serving.follow import EngineFollower
from shiradelta.serving.session import ServedWeights, SwapRequest
from shiradelta.serving.vllm_client import VLLM, weight_version
from tests.chain.models import Model, change, set_step, tensor, write

pytest.importorskip("zstandard")
SHAPES = {"q.weight": (8, 16), "k.weight": (8, 16), "norm.weight": (16,)}
STEPS = 4


class Fused(nn.Module):
    """A model whose engine has q and k in one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.qk = nn.Parameter(torch.zeros(16, 16, dtype=torch.bfloat16), requires_grad=False)
        self.norm = nn.Parameter(torch.zeros(16, dtype=torch.bfloat16), requires_grad=False)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        where = {"q.weight": self.qk.data[:8], "k.weight": self.qk.data[8:], "norm.weight": self.norm.data}
        names = set()
        for name, one in weights:
            where[name].copy_(one)
            names.add(name)
        return names

    def has(self, model: Model) -> bool:
        """Whether all bits are those of a version."""
        own = torch.cat([self.qk.reshape(-1), self.norm]).view(torch.int16).numpy().view("<u2")
        return np.array_equal(own, np.concatenate([model[name][2] for name in SHAPES]))


class Killed(BaseException):
    """The follower's process ends here."""


class Engine(VLLM):
    """vLLM, as far as a follower sees it.

    Attributes:
        log: the steps of its updates.
        dies: the step after which the follower is killed; "" for none.
    """

    def __init__(self, model: Fused, checkpoint: Path) -> None:
        self.weights = ServedWeights(model, checkpoint)
        self.said, self.log, self.dies, self.begun = "default", list[str](), "", False

    def _note(self, step: str) -> None:
        self.log.append(step)
        if step.startswith(self.dies) and self.dies:
            raise Killed

    def version(self) -> str:
        return self.said

    def _init(self, info: dict[str, Any]) -> None:
        raise AssertionError("it is")

    def _pause(self, running: str) -> None:
        self._note(f"pause {running}")

    def _start(self) -> None:
        if self.begun:
            raise TargetError("start_weight_update called while a weight update is already active")
        self.begun = True
        self._note("start")

    def _send(self, request: dict[str, Any]) -> None:
        try:
            self.weights.do(SwapRequest(**request))
        except sd.ShiraDeltaError as error:
            self.begun = False  # as vLLM does
            raise TargetError(f"vLLM refuses: {error}") from error
        self._note("send")

    def _finish(self, version: str) -> None:
        self.said, self.begun = version, False
        self._note("finish")

    def _reset_caches(self) -> None:
        self._note("caches")

    def _resume(self) -> None:
        if self.dies == "":  # a killed process sends nothing
            self._note("resume")


UPDATE = ["pause wait", "start", "send", "finish", "caches", "resume"]


class Scene:
    """Five versions, the chain of their steps, and an engine that was started with the first one."""

    def __init__(self, root: Path, form: str) -> None:
        rng = np.random.default_rng(0)
        self.root, self.models = root, [{name: tensor(rng, shape) for name, shape in SHAPES.items()}]
        before = write(root / "0", self.models[0])
        self.chain = Chain.create(root / "chain", before)
        for version in range(1, STEPS + 1):
            self.models.append(change(self.models[-1], rng))
            sd.save_delta(root / "step.shd", set_step(self.models[-2], self.models[-1]))
            self.chain.publish(root / "step.shd", base=before if form == "context" else None)
            before = write(root / str(version), self.models[-1])
        self.model = Fused()
        self.model.load_weights(
            (name, torch.from_numpy(bits.reshape(shape).view("<i2")).view(torch.bfloat16))
            for name, (_, shape, bits) in self.models[0].items()
        )
        self.engine = Engine(self.model, root / "0")

    def follower(self, **options: Any) -> EngineFollower:
        return EngineFollower(self.chain, self.engine, 0, **options)


@pytest.fixture(params=["plain", "context"])
def scene(request: pytest.FixtureRequest, tmp_path: Path) -> Scene:
    return Scene(tmp_path, request.param)


def test_an_engine_gets_each_version_between_two_batches(scene: Scene):
    seen: list[tuple[str, Step]] = []
    follower = scene.follower(
        before=lambda step: seen.append(("before", step)), after=lambda step: seen.append(("after", step))
    )
    assert follower.version == 0
    for version in range(1, STEPS + 1):
        scene.engine.log.clear()
        done = follower.follow(version)
        assert seen[-2:] == [("before", done[-1]), ("after", done[-1])]
        assert scene.engine.log == UPDATE
        assert scene.model.has(scene.models[version])
        assert follower.version == version
        name = f"step {version - 1} -> {version}"
        assert scene.engine.said == weight_version({name: 1.0}, f"{scene.chain.manifest.id}:{version}")
        assert list(scene.engine.weights.swap.loaded) == [name]
    assert follower.follow(STEPS - 1) == []  # the last step can be taken back
    assert (follower.version, scene.model.has(scene.models[STEPS - 1])) == (STEPS - 1, True)
    with pytest.raises(ChainError, match=f"its base is version {STEPS - 1}") as caught:
        follower.follow(1)
    assert caught.value.reason == "not_kept"
    assert [str(step) for step in follower.follow()] == [f"step {STEPS - 1} -> {STEPS}"]
    assert scene.model.has(scene.models[STEPS])


@pytest.mark.parametrize("dies", ["pause", "start", "send", "finish", "caches"])
@pytest.mark.parametrize("back", [False, True])
def test_a_follower_that_was_killed_is_followed_by_one_that_goes_on(scene: Scene, dies: str, back: bool):
    scene.follower(policy="abort").follow(2)
    assert scene.engine.log[0] == "pause abort"
    scene.engine.dies = dies
    with pytest.raises(Killed):
        scene.follower().follow(1 if back else 3)
    scene.engine.dies = ""
    scene.engine.log.clear()
    goal = 1 if back else 3
    follower = scene.follower()
    follower.follow(goal)
    assert scene.engine.log[-1] == "resume"
    assert "caches" in scene.engine.log
    assert (follower.version, scene.model.has(scene.models[goal])) == (goal, True)
    follower.follow()
    assert (follower.version, scene.model.has(scene.models[STEPS])) == (STEPS, True)


@pytest.mark.parametrize("how", ["sent", "moved", "back", "ahead"])
def test_a_follower_that_was_killed_before_the_version_is_followed_by_another_kind(scene: Scene, how: str):
    """The next request is not the same one, so what the workers have is found out first."""
    scene.follower().follow(2 if how == "ahead" else 1)
    scene.engine.dies = "send"
    with pytest.raises(Killed):
        scene.follower().follow(1 if how == "ahead" else 2)
    scene.engine.dies = ""
    if how == "moved":
        (scene.root / "chain").rename(scene.root / "elsewhere")
        scene.chain = Chain.open(scene.root / "elsewhere")
    follower = scene.follower(send=how == "sent")
    for goal in (1, STEPS) if how == "back" else (STEPS,):
        follower.follow(goal)
        assert (follower.version, scene.model.has(scene.models[goal])) == (goal, True)
        assert scene.engine.log[-1] == "resume"


def test_weights_of_a_new_session_keep_the_version_that_they_have(scene: Scene):
    """Its workers know no step, as after one that was taken back, but the weights are the later ones."""
    scene.follower().follow(2)
    said = scene.engine.said
    scene.engine.weights = ServedWeights(scene.model, scene.root / "2")
    with pytest.raises(TargetError, match="refuses"):
        scene.follower().follow(2)
    assert scene.engine.said == said
    assert scene.model.has(scene.models[2])
    assert scene.engine.log[-1] == "resume"


def test_the_bytes_of_a_step_are_sent_where_workers_cannot_read_its_file(scene: Scene, monkeypatch: pytest.MonkeyPatch):
    sent: list[SwapRequest] = []
    update = scene.engine.update
    monkeypatch.setattr(scene.engine, "update", lambda request, **more: (sent.append(request), update(request, **more)))
    (step,) = scene.follower(send=True).follow(1)
    assert [len(data) for data in sent[0].data.values()] == [step.bytes]
    assert not sent[0].load
    assert scene.model.has(scene.models[1])


def test_a_step_that_changes_nothing_is_a_version_too(scene: Scene):
    follower = scene.follower()
    follower.follow(1)
    sd.save_delta(scene.root / "empty.shd", {})
    chain = Chain.create(scene.root / "other", scene.root / "1")
    chain.publish(scene.root / "empty.shd")
    scene.engine.said = "default"
    other = EngineFollower(chain, scene.engine, 0)
    scene.engine.update(SwapRequest(rebase=True))
    other.follow()
    assert (other.version, scene.engine.weights.swap.loaded) == (1, {})
    assert scene.model.has(scene.models[1])


def test_what_is_no_version_of_the_chain_is_refused_and_nothing_changes(scene: Scene, tmp_path: Path):
    other = Chain.create(tmp_path / "other", tmp_path / "0")
    scene.follower().follow(1)
    with pytest.raises(ChainError, match="the engine") as caught:
        EngineFollower(other, scene.engine, 0).follow()
    assert caught.value.reason == "other_chain"
    said = scene.engine.said
    for active, policy, words in (
        ({"style": 1.0}, None, "style is active"),
        ({"step 0 -> 1": 1.0, "style": 0.5}, None, "style is active"),
    ):
        scene.engine.said = weight_version(active, policy)
        with pytest.raises(ChainError, match=words):
            scene.follower().follow()
    scene.engine.said = "the trainer's 17"
    with pytest.raises(ChainError, match="its weights are the trainer's 17"):
        scene.follower().follow()
    scene.engine.said = said
    scene.engine.weights.swap.load("style", scene.root / "chain" / scene.chain.manifest.steps[0].path)
    with pytest.raises(TargetError, match="'style' was made for the base, which is to change; unload it"):
        scene.follower().follow()
    assert scene.model.has(scene.models[1])


def test_weights_that_something_else_has_written_are_refused(scene: Scene):
    scene.follower().follow(1)
    scene.model.norm.data[3] = 7
    with pytest.raises((TargetError, BaseMismatchError)):
        scene.follower().follow()
    assert scene.model.norm.data[3] == 7


def test_wrong_arguments_are_refused(scene: Scene):
    with pytest.raises(ArgumentError, match="'mix'"):
        scene.follower(policy="mix")
    with pytest.raises(ArgumentError, match="VLLMServer"):
        EngineFollower(scene.chain, "http://127.0.0.1:8000", 0)  # type: ignore[arg-type]
    follower = EngineFollower(scene.chain, scene.engine, 99)
    with pytest.raises(ChainError):
        follower.follow()
    assert scene.engine.log == []
