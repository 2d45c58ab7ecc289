"""Families of deltas: training, files, routes, and the weights that a route gives."""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, safe_open, save_file
from torch import Tensor, nn

import shiradelta
from shiradelta import experts
from shiradelta.errors import ArgumentError, BaseMismatchError, ShiraDeltaError, SourceError, TargetError
from shiradelta.experts.clusters import by_size
from shiradelta.experts.features import ZERO, Sketch, adam_scales
from shiradelta.experts.gradients import NonzeroGradients
from shiradelta.format import arithmetic

Example = tuple[Tensor, Tensor]
SIZE = 24
SETTINGS = experts.TrainSettings(sparsity=0.2, steps=60, batch=16, relative_lr=0.1, mask="rand")


def model(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(SIZE, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, SIZE)).to(dtype)


def example(task: int, number: int) -> Example:
    """Two tasks: inputs in one half of the dimensions are to be copied, those in the other negated."""
    generator = torch.Generator().manual_seed(2 * number + task)
    x = torch.zeros(SIZE)
    half = slice(0, SIZE // 2) if task == 0 else slice(SIZE // 2, SIZE)
    x[half] = torch.rand(SIZE // 2, generator=generator) + 0.5
    return x, x if task == 0 else -x


#: 60 examples, and the task of each: two of three are of task 0.
TASKS = [int(number % 3 == 2) for number in range(60)]
EXAMPLES = [example(task, number) for number, task in enumerate(TASKS)]


def loss(network: nn.Module, examples: Sequence[Example]) -> Tensor:
    x, y = (torch.stack(part) for part in zip(*examples, strict=True))
    dtype = next(network.parameters()).dtype
    return (network(x.to(dtype)) - y.to(dtype)).float().square().mean()


def prompt_loss(network: nn.Module, examples: Sequence[Any]) -> Tensor:
    """Looks at the inputs alone."""
    x = torch.stack([one[0] for one in examples])
    return network(x.to(next(network.parameters()).dtype)).float().square().mean()


def measured(network: nn.Module, task: int) -> float:
    with torch.no_grad():
        return float(loss(network, [example(task, number) for number in range(1000, 1020)]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families") / "family"
    network = model()
    before = {name: one.clone() for name, one in network.state_dict().items()}
    experts.train_family(
        network, EXAMPLES, loss, folder, prompt_loss=prompt_loss, experts=2, groups=TASKS, settings=SETTINGS, dims=256
    )
    assert all(torch.equal(one, before[name]) for name, one in network.state_dict().items())
    assert all(one.requires_grad for one in network.parameters())
    return folder


def test_each_prompt_goes_to_the_expert_of_its_task_which_is_better_there(trained: Path):
    network = model()
    router = experts.ExpertRouter(network, experts.open_family(trained), prompt_loss)
    for task in (0, 1):
        for number in range(1000, 1010):
            strengths = router.route([example(task, number)])
            assert max(strengths, key=strengths.__getitem__) == f"expert-{task}"
        losses = {}
        for name in ("base", "expert-0", "expert-1"):
            with router.swap.applied(name):
                losses[name] = measured(network, task)
        assert min(losses, key=losses.__getitem__) == f"expert-{task}"
        with router.swap.applied(strengths):
            assert measured(network, task) < losses["base"]
    assert router.swap.active == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str)
def test_a_route_gives_the_weight_average_bit_for_bit(dtype: torch.dtype, tmp_path: Path):
    network = model(dtype=dtype)
    family = experts.train_family(
        network, EXAMPLES, loss, tmp_path / "f", experts=2, groups=TASKS, settings=SETTINGS, dims=64
    )
    router = experts.ExpertRouter(network, family, prompt_loss)
    strengths = router.route(EXAMPLES[:3])
    assert list(strengths) == family.experts
    assert sum(strengths.values()) == pytest.approx(1, abs=1e-6)
    expected = {}
    for name, weight in network.state_dict().items():
        bits = weight.view(torch.uint16 if dtype == torch.bfloat16 else torch.uint32).numpy().reshape(-1).copy()
        total, listed = np.zeros(bits.size, np.float32), np.zeros(bits.size, bool)
        for member in sorted(strengths, key=family.digests.__getitem__):
            with shiradelta.open_delta(family.path(member)) as delta:
                if name not in delta:
                    continue
                where, part = delta[name].positions(), np.float32(strengths[member]) * delta[name].values()
                total[where] = np.where(listed[where], total[where] + part, part)
                listed[where] = True
        added = arithmetic.add(bits, str(dtype).removeprefix("torch."), total)
        expected[name] = np.where(listed, added, bits)
    router.swap.switch(strengths)
    for name, weight in network.state_dict().items():
        assert np.array_equal(weight.view(-1).view(torch.uint8).numpy(), expected[name].view(np.uint8)), name


@pytest.mark.slow
def test_a_family_that_was_read_is_the_one_that_was_written(trained: Path, tmp_path: Path):
    family = experts.open_family(trained)
    assert sorted(path.name for path in trained.iterdir()) == [
        "base.shd",
        "expert-0.shd",
        "expert-1.shd",
        "family.safetensors",
    ]
    assert family.experts == ["expert-0", "expert-1"]
    assert family.examples == (40, 20)
    assert family.centroids.shape == (2, 256)
    again = experts.train_family(
        model(), EXAMPLES, loss, tmp_path / "f", prompt_loss=prompt_loss, experts=2, groups=TASKS, settings=SETTINGS,
        dims=256,
    )  # fmt: skip
    assert again.digests == family.digests
    assert np.array_equal(again.centroids, family.centroids)
    assert all(np.array_equal(again.scales[name], scales) for name, scales in family.scales.items())


@pytest.mark.slow
def test_members_that_exist_already_become_the_same_family(trained: Path, tmp_path: Path):
    family = experts.open_family(trained)
    own = [family.path(name) for name in family.experts]
    again = experts.assemble_family(
        model(), family.path("base"), own, EXAMPLES, TASKS, prompt_loss, tmp_path / "f", dims=256
    )
    assert again.digests == family.digests
    assert np.array_equal(again.centroids, family.centroids)
    with pytest.raises(BaseMismatchError):
        experts.assemble_family(model(1), family.path("base"), own, EXAMPLES, TASKS, prompt_loss, tmp_path / "g")
    with pytest.raises(ArgumentError, match="give examples for each expert"):
        experts.assemble_family(model(), family.path("base"), own, EXAMPLES, [0] * 60, prompt_loss, tmp_path / "g")
    assert not (tmp_path / "g").exists()


def test_experts_that_are_the_same_delta_are_refused_before_the_work(trained: Path, tmp_path: Path):
    """A switch to both would refuse them, with each prompt."""

    def measured(model: nn.Module, prompts: Sequence[Any]) -> Tensor:
        pytest.fail("gradients were taken")

    own = [trained / "expert-1.shd", shutil.copy(trained / "expert-1.shd", tmp_path / "copy.shd")]
    with pytest.raises(ArgumentError, match="expert-0 and expert-1 are the same delta"):
        experts.assemble_family(model(), trained / "base.shd", own, EXAMPLES, TASKS, measured, tmp_path / "f", dims=64)
    assert [path.name for path in tmp_path.iterdir()] == ["copy.shd"]


def test_a_member_that_may_be_for_another_base_is_refused(trained: Path, tmp_path: Path):
    own = [trained / "expert-0.shd", trained / "expert-1.shd"]
    with shiradelta.open_delta(own[1]) as delta:
        bare = {
            name: shiradelta.TensorDelta(one.shape, one.positions(), one.values(), one.dtype)
            for name, one in delta.items()
        }
    shiradelta.save_delta(tmp_path / "bare.shd", bare)
    with pytest.raises(SourceError, match=r"bare\.shd: tensor '0\.weight' has no fingerprint"):
        experts.assemble_family(
            model(), trained / "base.shd", [own[0], tmp_path / "bare.shd"], EXAMPLES, TASKS, prompt_loss, tmp_path / "f"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["bare.shd"]


def test_what_does_more_than_add_is_no_member(trained: Path, tmp_path: Path):
    with shiradelta.open_delta(trained / "base.shd") as delta:
        name, shape = next((name, one.shape) for name, one in delta.items())
    put = shiradelta.TensorDelta(shape, [0], np.ones(1, np.uint32), "float32", op="set")
    shiradelta.save_delta(tmp_path / "set.shd", {name: put})
    own = [tmp_path / "set.shd", trained / "expert-1.shd"]
    with pytest.raises(SourceError, match="is set, not add"):
        experts.assemble_family(
            model(), trained / "base.shd", own, EXAMPLES, TASKS, prompt_loss, tmp_path / "f", dims=64
        )
    assert [path.name for path in tmp_path.iterdir()] == ["set.shd"]


def test_a_frozen_model_is_routed_in_inference_mode_as_well(trained: Path):
    network = model().requires_grad_(False)
    router = experts.ExpertRouter(network, experts.open_family(trained), prompt_loss)
    wanted = router.route(EXAMPLES[:2])
    with torch.inference_mode():
        assert router.route(EXAMPLES[:2]) == wanted
    assert not any(weight.requires_grad for weight in network.parameters())


def test_prompts_are_grouped_by_their_best_expert(trained: Path):
    router = experts.ExpertRouter(model(), experts.open_family(trained), prompt_loss)
    groups = router.groups(EXAMPLES[:9])
    assert [(group.expert, group.indices) for group in groups] == [
        ("expert-0", [0, 1, 3, 4, 6, 7]),
        ("expert-1", [2, 5, 8]),
    ]
    for group in groups:
        assert group.strengths == router.route([EXAMPLES[index] for index in group.indices])


def test_an_ensemble_weighs_the_outputs_of_its_members(trained: Path):
    network = model()
    router = experts.ExpertRouter(network, experts.open_family(trained), prompt_loss)
    x = EXAMPLES[0][0]
    with torch.no_grad():
        found = router.ensemble(lambda: network(x), {"expert-0": 0.75, "expert-1": 0.25})
        outputs = []
        for name in ("expert-0", "expert-1"):
            with router.swap.applied(name):
                outputs.append(network(x))
    assert torch.equal(found, outputs[0] * 0.75 + outputs[1] * 0.25)
    with pytest.raises(ArgumentError, match="give the strengths of `route`"):
        router.ensemble(lambda: network(x), {})


def test_route_weights_are_softmax_of_standardised_cosines():
    cosines = np.array([[0.3, -0.1, 0.2], [0.5, 0.5, 0.5]])
    standard = (cosines[0] - cosines[0].mean()) / cosines[0].std()
    expected = np.exp(standard) / np.exp(standard).sum()
    assert np.allclose(experts.route_weights(cosines)[0], expected, atol=1e-7)
    assert np.allclose(experts.route_weights(cosines)[1], 1 / 3)


# --- gradients and features ---


def test_gradients_are_those_of_autograd_at_the_nonzeros(trained: Path):
    network = model()
    gradients = NonzeroGradients(network, trained / "base.shd")
    found: list[list[Tensor]] = []
    gradients.each(EXAMPLES[:3], loss, lambda number, own: found.append(own), lambda *a: None, "")
    for number, one in enumerate(EXAMPLES[:3]):
        network.zero_grad()
        loss(network, [one]).backward()
        with shiradelta.open_delta(trained / "base.shd") as delta:
            for piece, gradient in zip(gradients.pieces, found[number], strict=True):
                whole = network.get_parameter(piece.weight).grad
                assert whole is not None
                assert torch.equal(gradient, whole.reshape(-1)[torch.from_numpy(delta[piece.tensor].positions())])
    scales = adam_scales(gradients, EXAMPLES[:3], loss, lambda *a: None)
    squares = [torch.stack(own).square().mean(0) for own in zip(*found, strict=True)]
    for piece, square in zip(gradients.pieces, squares, strict=True):
        wanted = torch.where(square > 0, 1 / (square.sqrt() + 1e-8), 0).numpy()
        exponents = scales[piece.tensor].astype(np.float64)
        given = np.where(exponents == ZERO, 0, np.exp2(exponents))
        assert np.array_equal(given == 0, wanted == 0)
        ratio = given[wanted > 0] / wanted[wanted > 0]
        assert ratio.min() > 0.7 and ratio.max() < 1.42  # noqa: PT018


def test_projected_features_keep_cosines(trained: Path):
    gradients = NonzeroGradients(model(), trained / "base.shd")
    scales = {name: np.zeros(count, np.int8) for name, count in gradients.counts.items()}
    random = torch.Generator().manual_seed(0)
    one = [torch.randn(len(piece.positions), generator=random) for piece in gradients.pieces]
    other = [a + torch.randn(a.shape, generator=random) for a in one]
    exact = torch.nn.functional.cosine_similarity(torch.cat(one), torch.cat(other), 0)
    found = []
    for seed in range(50):
        sketch = Sketch(gradients, scales, 256, seed)
        found.append(float(sketch.project(one) @ sketch.project(other)))
    assert np.mean(found) == pytest.approx(float(exact), abs=0.03)
    assert 0.005 < np.std(found) < 0.1


def test_a_projection_does_not_depend_on_blocks(trained: Path, monkeypatch: pytest.MonkeyPatch):
    gradients = NonzeroGradients(model(), trained / "base.shd")
    scales = {name: np.ones(count, np.int8) for name, count in gradients.counts.items()}
    values = [torch.ones(len(piece.positions)) for piece in gradients.pieces]
    whole = Sketch(gradients, scales, 64, 3).project(values)
    monkeypatch.setattr("shiradelta.experts.features._BLOCK", 7)
    assert np.array_equal(Sketch(gradients, scales, 64, 3).project(values), whole)
    assert not np.array_equal(Sketch(gradients, scales, 64, 4).project(values), whole)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda network, examples: loss(network, examples) * float("nan"), "example 1 has a gradient with NaN"),
        (lambda network, examples: torch.zeros((), requires_grad=True), "example 1 has no gradient"),
    ],
)
def test_a_useless_gradient_is_refused(broken: Callable[..., Tensor], message: str, trained: Path):
    network = model()
    router = experts.ExpertRouter(network, experts.open_family(trained), broken)
    with pytest.raises(ShiraDeltaError, match=message):
        router.route(EXAMPLES[:1])
    assert router.swap.active == {}
    with pytest.raises(ArgumentError, match="give a list of one prompt or more"):
        router.route([])


# --- clusters ---


def test_clusters_are_numbered_by_size():
    assert by_size(np.array([5, 2, 2, 9, 5, 2])).tolist() == [1, 0, 0, 2, 1, 0]


@pytest.mark.slow
def test_examples_are_clustered_by_task(tmp_path: Path):
    pytest.importorskip("sklearn")
    family = experts.train_family(
        model(), EXAMPLES, loss, tmp_path / "f", prompt_loss=prompt_loss, experts=2, settings=SETTINGS, dims=256
    )
    assert family.examples == (40, 20)
    with pytest.raises(ArgumentError, match="20 examples fall into 1 cluster, not 3; ask for fewer experts"):
        experts.train_family(
            model(), EXAMPLES[:1] * 20, loss, tmp_path / "g", experts=3, settings=SETTINGS, dims=256
        )  # fmt: skip
    assert not (tmp_path / "g").exists()


def test_clusters_without_scikit_learn_are_refused(monkeypatch: pytest.MonkeyPatch):
    from shiradelta.experts.clusters import birch

    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(shiradelta.MissingDependencyError, match=r"shiradelta\[experts\]"):
        birch(np.eye(4, dtype=np.float32), 2)


# --- what is refused ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 1}, "experts is 1; give 2 or more"),
        ({"dims": 0}, "dims is 0"),
        ({"expert_steps": 0}, "expert_steps is 0"),
        ({"prompt_batch": 0}, "prompt_batch is 0; give 1 or more"),
        ({"experts": 61}, "too few for 61 experts"),
        ({"experts": 2, "groups": [0] * 60}, "give examples for each expert"),
        ({"experts": 2, "groups": [0, 1]}, "no whole number for each of the 60 examples"),
        ({"settings": 5}, "settings is 5; give TrainSettings"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(ArgumentError, match=message):
        experts.train_family(model(), EXAMPLES, loss, tmp_path / "f", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dims": 0}, "dims is 0; give 1 or more"),
        ({"prompt_batch": 0}, "prompt_batch is 0; give 1 or more"),
        ({"experts": ["a.shd"]}, "experts is 1; give 2 or more"),
        ({"experts": "a.shd"}, "experts is 'a.shd'; give a list of paths"),
        ({"experts": ["a.shd"] * 61}, "too few for 61 experts"),
        ({"examples": iter(EXAMPLES)}, "give a list"),
    ],
)
def test_arguments_of_an_assembly_out_of_range(options: dict[str, Any], message: str, tmp_path: Path):
    given = {"experts": ["a.shd", "b.shd"], "examples": EXAMPLES, "groups": TASKS} | options
    with pytest.raises(ArgumentError, match=message):
        experts.assemble_family(model(), "base.shd", prompt_loss=prompt_loss, out=tmp_path / "f", **given)
    assert not list(tmp_path.iterdir())


def test_what_a_router_does_not_take(trained: Path):
    family = experts.open_family(trained)
    with pytest.raises(ArgumentError, match="prompt_batch is 0; give 1 or more"):
        experts.ExpertRouter(model(), family, prompt_loss, prompt_batch=0)
    with pytest.raises(ArgumentError, match="give an ExpertFamily"):
        experts.ExpertRouter(model(), trained, prompt_loss)  # type: ignore[arg-type]
    router = experts.ExpertRouter(model(), family, prompt_loss)
    runs: list[int] = []
    for weights, message in (
        ({"expert-0": float("nan")}, "finite numbers, and expert-0 has nan"),
        ({"expert-0": 1.0, "expert-1": float("inf")}, "finite numbers, and expert-1 has inf"),
        ({"expert-9": 1.0}, "'expert-9' is not loaded"),
        ({"expert-0": "1"}, "give a mapping of members to weights"),
        ("expert-0", "give a mapping of members to weights"),
    ):
        with pytest.raises(ArgumentError, match=message):
            router.ensemble(lambda: runs.append(1), weights)  # type: ignore[arg-type, func-returns-value]
    assert not runs
    assert not router.swap.active


def test_what_is_there_is_not_replaced(tmp_path: Path):
    (tmp_path / "f").mkdir()
    with pytest.raises(TargetError, match="is there already"):
        experts.train_family(model(), EXAMPLES, loss, tmp_path / "f", experts=2)


def test_a_family_of_another_model_is_refused(trained: Path):
    with pytest.raises(BaseMismatchError):
        experts.ExpertRouter(model(1), experts.open_family(trained), prompt_loss)
    with pytest.raises(SourceError, match="is no parameter of the model"):
        experts.ExpertRouter(nn.Linear(3, 3), experts.open_family(trained), prompt_loss)


def changed(folder: Path, **about: str) -> None:
    """Changes an index's metadata."""
    with safe_open(folder / "family.safetensors", "np") as stored:
        old = stored.metadata()
    save_file(load_file(folder / "family.safetensors"), folder / "family.safetensors", {**old, **about})


def replaced(folder: Path, **tensors: Any) -> None:
    """Changes tensors of an index; None takes one out."""
    with safe_open(folder / "family.safetensors", "np") as stored:
        about = stored.metadata()
    found = {**load_file(folder / "family.safetensors"), **tensors}
    save_file({name: one for name, one in found.items() if one is not None}, folder / "family.safetensors", about)


def damaged(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-40] ^= 1
    path.write_bytes(raw)


HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no index": (lambda folder: (folder / "family.safetensors").unlink(), "is no family of experts"),
    "missing member": (lambda folder: (folder / "expert-1.shd").unlink(), r"expert-1\.shd: is missing"),
    "swapped": (lambda folder: shutil.copy(folder / "base.shd", folder / "expert-0.shd"), r"expert-0\.shd: is not the"),
    "stranger": (lambda folder: shutil.copy(folder / "base.shd", folder / "expert-2.shd"), r"expert-2\.shd is not a m"),
    "damaged": (lambda folder: damaged(folder / "base.shd"), r"base\.shd, .*copy the whole folder"),
    "cut off": (lambda folder: (folder / "family.safetensors").write_bytes(b"\0" * 9), "header is damaged"),
    "a later format": (lambda folder: changed(folder, format="2"), "has format '2'"),
    "unknown key": (lambda folder: changed(folder, more="1"), "its metadata is .*more"),
    "no digests": (lambda folder: changed(folder, digests="5"), "digests are no list"),
    "paths": (lambda folder: changed(folder, digests='["../../a", "b", "c"]'), "does not list the digests"),
    "deep": (lambda folder: changed(folder, digests="[" * 100_000), "digests are no list"),
    "examples": (lambda folder: changed(folder, examples="[1]"), "does not list the number of examples"),
    "negative": (lambda folder: changed(folder, examples="[1, -1]"), "does not list the number of examples"),
    "seed": (lambda folder: changed(folder, seed="x"), "its seed is no number"),
    "no centroids": (lambda folder: replaced(folder, centroids=None), "no float32 centroids of 2 experts"),
    "few centroids": (lambda folder: replaced(folder, centroids=np.ones((1, 4), np.float32)), "centroids of 2 experts"),
    "NaN": (lambda folder: replaced(folder, centroids=np.full((2, 4), np.nan, np.float32)), "not of length 1"),
    "no dims": (lambda folder: replaced(folder, centroids=np.ones((2, 0), np.float32)), "not of length 1"),
    "unknown tensor": (lambda folder: replaced(folder, other=np.zeros(3, np.int8)), "tensor 'other' is int8"),
    "scales": (lambda folder: replaced(folder, **{"scales.0.weight": np.zeros(3, np.int8)}), "its scales are not"),
    "no scales": (lambda folder: replaced(folder, **{"scales.0.weight": None}), "its scales are not"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_folder_that_is_no_family_is_refused_by_name(kind: str, trained: Path, tmp_path: Path):
    change, message = HOSTILE[kind]
    folder = tmp_path / "family"
    shutil.copytree(trained, folder)
    experts.open_family(folder)
    change(folder)
    with pytest.raises(SourceError, match=message):
        experts.open_family(folder)


def test_no_bit_of_an_index_is_read_wrong(trained: Path, tmp_path: Path):
    folder = tmp_path / "family"
    shutil.copytree(trained, folder)
    index = folder / "family.safetensors"
    whole = index.read_bytes()
    rng = random.Random(0)
    for at in [*range(8, 24), len(whole) - 1, *rng.sample(range(len(whole)), 200)]:
        raw = bytearray(whole)
        raw[at] ^= 1 << rng.randrange(8)
        index.write_bytes(raw)
        with pytest.raises(SourceError):
            experts.open_family(folder)
    index.write_bytes(whole)
    experts.open_family(folder)


def test_only_additions_are_members(trained: Path, tmp_path: Path):
    folder = tmp_path / "family"
    shutil.copytree(trained, folder)
    (folder / "expert-0.shd").unlink()
    with shiradelta.open_delta(trained / "base.shd") as delta:
        name, shape = next((name, one.shape) for name, one in delta.items())
    put = shiradelta.TensorDelta(shape, [0], np.ones(1, np.uint32), "float32", op="set")
    shiradelta.save_delta(folder / "expert-0.shd", {name: put})
    with shiradelta.open_delta(folder / "expert-0.shd") as delta:
        digests = [*experts.open_family(trained).digests.values()]
        digests[1] = delta.digest
    changed(folder, digests=json.dumps(digests))
    with pytest.raises(SourceError, match="is set, not add"):
        experts.open_family(folder)
