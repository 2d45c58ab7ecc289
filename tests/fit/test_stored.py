"""Models whose weights in memory are not the tensors of their files: stacked, renamed, split and tied."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import shiradelta
from shiradelta.errors import SourceError
from shiradelta.fit import Fit
from shiradelta.fit.fitted import FitJob, FitTarget
from shiradelta.fit.own_model import restored
from shiradelta.fit.stored import LoadedWeights, Piece
from shiradelta.fit.tuned_weights import TunedWeights, exact_homes, write_exact
from shiradelta.format.delta import TensorDelta
from shiradelta.models.views import Box, View, contiguous
from shiradelta.text.batches import split
from tests import BRIEF
from tests.fit import test_fit
from tests.fit.test_fit import write_tokenizer
from tests.fit.test_stream import LAYERS, LLAMA, TOKENS, write_pair

pytestmark = pytest.mark.slow


def stacked() -> nn.Module:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**LLAMA, num_local_experts=3))


def renamed() -> nn.Module:
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**LAYERS, **TOKENS))


def fused_on_disk() -> nn.Module:
    return transformers.NomicBertModel(transformers.NomicBertConfig(**LAYERS, pad_token_id=0))


def tied() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True))


KINDS: dict[Callable[[], nn.Module], str] = {
    stacked: "model.layers.0.block_sparse_moe.experts.1.w2.weight",
    renamed: "embed_out.weight",
    fused_on_disk: "encoder.layers.0.attn.Wqkv.weight",
    tied: "model.embed_tokens.weight",
}
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


#: The time goes by the number of batches.
SETTINGS = replace(test_fit.SETTINGS, batch=40)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def distance(patched: Path, tuned: Path, out: Path) -> float:
    """Of a patched folder from the fine-tune, measured with the model that transformers loads from it."""
    fit = replace(SETTINGS, method="refit")
    found: float = shiradelta.convert(tuned, out, 0.05, patched, fit=fit).fit.base
    return found


#: The others need nothing that these do not: on a desk each of them has one of the methods.
ALL_METHODS = (stacked, fused_on_disk)
FITTED = [
    pytest.param(method, kind, id=f"{method}-{kind.__name__}")
    for method, kind in product(("train", "refit"), KINDS)
    if not BRIEF or kind in ALL_METHODS or (method == "train") == (kind is tied)
]


@pytest.mark.parametrize(("method", "kind"), FITTED)
def test_the_file_holds_the_checkpoints_tensors_and_gives_what_was_measured(kind: Any, method: str, tmp_path: Path):
    torch.manual_seed(0)
    base, tuned = write_pair(kind(), tmp_path)
    fit = replace(SETTINGS, method=method, steps=20)
    plain = shiradelta.convert(tuned, tmp_path / "plain.shd", 0.05, base)
    report = shiradelta.convert(tuned, tmp_path / "fitted.shd", 0.05, base, fit=fit)
    names = {tensor.name for tensor in plain.tensors}
    assert KINDS[kind] in names
    assert {tensor.name for tensor in report.tensors} == names
    assert not [warning for warning in report.warnings if "not fitted" in warning]
    assert report.nnz == plain.nnz
    assert report.fit.fitted < report.fit.topk < report.fit.base
    energies = {tensor.name: tensor.energy for tensor in plain.tensors}
    assert {tensor.name: tensor.energy for tensor in report.tensors} == pytest.approx(energies, rel=1e-5)
    for name, measured in (("plain", report.fit.topk), ("fitted", report.fit.fitted)):
        shiradelta.apply(base, tmp_path / f"{name}.shd", out=tmp_path / name)
        assert distance(tmp_path / name, tuned, tmp_path / "again.shd") == pytest.approx(measured, rel=1e-4)


@kinds
def test_exact_changes_reach_the_weights_that_hold_them_and_go_again(kind: Any, tmp_path: Path):
    torch.manual_seed(0)
    kind().save_pretrained(tmp_path / "base")
    model = type(kind()).from_pretrained(tmp_path / "base")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    files = load_file(tmp_path / "base" / "model.safetensors")
    shape = tuple(files[KINDS[kind]].shape)
    positions = np.arange(3, files[KINDS[kind]].numel(), 7)
    values = np.random.default_rng(0).standard_normal(positions.size).astype(np.float32)
    files[KINDS[kind]].view(-1)[positions] += torch.from_numpy(values)
    (tmp_path / "changed").mkdir()
    (tmp_path / "changed" / "config.json").write_bytes((tmp_path / "base" / "config.json").read_bytes())
    save_file(files, tmp_path / "changed" / "model.safetensors", {"format": "pt"})
    expected = type(model).from_pretrained(tmp_path / "changed").state_dict()
    job = FitJob(
        fit=Fit(["text"], model=model),
        targets=[],
        exact=[(KINDS[kind], TensorDelta(shape, positions, values, "float32"))],
        base=tmp_path,
        source=tmp_path,
        codec="f32",
        whole_model=False,
        out=tmp_path,
        progress=print,
    )
    with restored(job):
        weights = LoadedWeights(model)
        for name, view, delta in exact_homes(job.exact, weights):
            write_exact(weights.by_name[name].data.view(-1), delta, view)
        assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@kinds
def test_files_in_the_form_of_the_memory_are_found_as_they_are(kind: Any):
    model = kind()
    own = model.state_dict(keep_vars=True)
    homes = LoadedWeights(model).find({name: tuple(weight.shape) for name, weight in own.items()})
    assert not homes.missing
    for name, weight in own.items():
        ((first, view),) = homes.found[name]
        assert view.is_same
        assert own[first] is weight


@pytest.mark.parametrize("method", ["train", "refit"])
def test_a_tied_tensor_that_is_stored_twice_changes_alike(method: str, tmp_path: Path):
    torch.manual_seed(0)
    base, tuned = write_pair(tied(), tmp_path)
    for folder in (base, tuned):
        weights = load_file(folder / "model.safetensors")
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    fit = replace(SETTINGS, method=method, steps=5)
    report = shiradelta.convert(tuned, tmp_path / "a.shd", 0.05, base, fit=fit)
    with shiradelta.open_delta(tmp_path / "a.shd") as delta:
        one, other = delta["lm_head.weight"], delta["model.embed_tokens.weight"]
        assert one.positions().tolist() == other.positions().tolist()
        assert one.values().tolist() == other.values().tolist()
    shiradelta.apply(base, tmp_path / "a.shd", out=tmp_path / "patched")
    assert distance(tmp_path / "patched", tuned, tmp_path / "b.shd") == pytest.approx(report.fit.fitted, rel=1e-4)


def target(name: str, delta: Sequence[float], count: int, dtype: str = "float32") -> FitTarget:
    rows = np.float32(delta)[:, None]
    return FitTarget(name, dtype, (len(delta),), lambda: lambda a, b: rows[a:b], count)


def expert(name: str, delta: Sequence[float], index: int, of: int, dtype: str = "float32") -> Piece:
    """One of several vectors that are stacked on loading."""
    size = len(delta)
    view = View(name, (size,), Box((size,), (1,), index * size), contiguous((size,)), of * size)
    return Piece(target(name, delta, 2, dtype), view)


def test_a_weight_of_which_the_file_has_a_part_is_changed_there_only():
    weight = nn.Parameter(torch.zeros(3, 4), requires_grad=False)
    fitted = TunedWeights()
    fitted.add("all", weight, [expert("b", [0, 5, 1, 2], 1, 3), expert("a", [3, 0, 0, -4], 0, 3)])
    nonzeros = fitted.topk()
    assert nonzeros.positions[0].tolist() == [0, 3, 5, 7], "the largest of each, as without a fit"
    assert fitted.tuned[weight].tolist() == [[3, 0, 0, -4], [0, 5, 1, 2], [0, 0, 0, 0]]
    assert weight not in fitted.covered
    found = fitted.selections(nonzeros)
    assert {name: (one.positions.tolist(), one.values.tolist()) for name, one in found.items()} == {
        "a": ([0, 3], [3, -4]),
        "b": ([1, 3], [5, 2]),
    }
    weight = nn.Parameter(torch.zeros(2, 4), requires_grad=False)
    fitted.add("all", weight, [expert("a", [3, 0, 0, -4], 0, 2), expert("b", [0, 5, 1, 2], 1, 2)])
    assert weight in fitted.covered


def test_tensors_that_cannot_be_one_weight_are_refused_by_name():
    weight = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(SourceError, match="'a' in float32 and 'b' in bfloat16 become one weight"):
        TunedWeights().add("all", weight, [expert("a", [1, 2], 0, 2), expert("b", [1, 2], 1, 2, "bfloat16")])
    with pytest.raises(SourceError, match="'a' and 'b' share elements once loaded"):
        TunedWeights().add("all", weight, [expert("a", [1, 2, 3, 4], 0, 1), expert("b", [1, 2], 1, 2)])


def test_values_are_rounded_in_the_order_of_the_file():
    """Codecs round groups of 128 values; a file has the experts' one after the other, the memory by rows."""
    rng = np.random.default_rng(0)
    deltas = {name: rng.standard_normal(400).astype(np.float32) * scale for name, scale in (("a", 1), ("b", 100))}
    pieces = []
    for index, (name, delta) in enumerate(deltas.items()):
        rows = delta[:, None]
        one = FitTarget(name, "float32", (400,), lambda rows=rows: lambda a, b: rows[a:b], 300)
        pieces.append(Piece(one, View(name, (400,), Box((400,), (2,), index), contiguous((400,)), 800)))
    fitted = TunedWeights()
    fitted.add("all", nn.Parameter(torch.zeros(400, 2), requires_grad=False), pieces)
    nonzeros = fitted.topk()
    nonzeros.values = fitted.quantiser_of(nonzeros, "int4")(nonzeros.values)
    alone = TunedWeights()
    for piece in pieces:
        alone.add(piece.target.name, nn.Parameter(torch.zeros(400)), [Piece(piece.target, own(piece))])
    plain = alone.topk()
    plain.values = alone.quantiser_of(plain, "int4")(plain.values)
    for name, one in alone.selections(plain).items():
        np.testing.assert_array_equal(fitted.selections(nonzeros)[name].values, one.values)


def own(piece: Piece) -> View:
    """The view of a tensor that is stored as it is."""
    return replace(piece.view, weight=piece.view.stored, numel=piece.view.stored.numel)


def test_least_squares_name_the_experts_that_they_leave(tmp_path: Path):
    torch.manual_seed(0)
    base, tuned = write_pair(stacked(), tmp_path)
    report = shiradelta.convert(tuned, tmp_path / "a.shd", 0.05, base, fit=replace(SETTINGS, method="refit"))
    (warning,) = (text for text in report.warnings if "least squares" in text)
    assert "9 weights keep their largest changes" in warning
    assert "such as 'model.layers.0." in warning
    shiradelta.convert(tuned, tmp_path / "plain.shd", 0.05, base)
    name = KINDS[stacked]
    with shiradelta.open_delta(tmp_path / "a.shd") as one, shiradelta.open_delta(tmp_path / "plain.shd") as other:
        assert one[name].positions().tolist() == other[name].positions().tolist()
        assert one[name].values().tolist() == other[name].values().tolist()


def clip() -> nn.Module:
    text = {**LAYERS, **TOKENS, "vocab_size": 64}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    return transformers.CLIPModel(config)


def siglip() -> nn.Module:
    return transformers.SiglipModel(transformers.SiglipConfig(**{k: clip().config.to_dict()[k] for k in PARTS}))


PARTS = ("text_config", "vision_config")


@pytest.mark.parametrize("build", [clip, siglip], ids=lambda build: build.__name__)
@pytest.mark.parametrize("method", ["train", "refit"])
def test_texts_alone_are_refused_for_a_model_of_texts_and_images(build: Any, method: str, tmp_path: Path):
    torch.manual_seed(0)
    base, tuned = write_pair(build(), tmp_path)
    write_tokenizer(base)
    with pytest.raises(SourceError, match=r"texts alone do not run.*(give|takes) model and forward") as error:
        shiradelta.convert(tuned, tmp_path / "a.shd", 0.05, base, fit=replace(SETTINGS, method=method))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "a.shd").exists()


class Router(nn.Linear):
    """A layer that is derived from a linear one, and returns more."""

    def forward(self, x: Tensor) -> Any:
        logits = super().forward(x)
        return logits.softmax(-1), logits


class Net(nn.Module):
    """Layers that least squares cannot take: a router, one that sees zeros alone, and a batch norm's statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.router = nn.Linear(8, 40), nn.BatchNorm1d(40), Router(40, 12)
        self.zero, self.down = nn.Linear(40, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.up(x))
        return self.down(self.router(hidden)[0] + self.zero(torch.zeros_like(hidden)))


@pytest.mark.parametrize("method", ["train", "refit"])
@pytest.mark.parametrize("mask", ["prune", "gradient"])
def test_layers_that_no_closed_form_fits_keep_their_largest_changes(method: str, mask: str, tmp_path: Path):
    if (method, mask) == ("refit", "gradient"):
        pytest.skip("least squares finds its own mask")
    torch.manual_seed(0)
    model = Net().eval()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    moved = {n: w + 0.2 * torch.rand_like(w) if w.is_floating_point() else w for n, w in before.items()}
    for name, weights in (("base", before), ("tuned", moved)):
        (tmp_path / name).mkdir()
        save_file(weights, tmp_path / name / "model.safetensors")
    inputs = list(torch.randn(100, 8))

    def forward(module: Any, examples: Sequence[Tensor]) -> Tensor:
        found: Tensor = module(torch.stack(list(examples)))
        return found

    fit = replace(SETTINGS, texts=inputs, model=model, forward=forward, method=method, mask=mask)
    report = shiradelta.convert(tmp_path / "tuned", tmp_path / "a.shd", 0.1, tmp_path / "base", "f32", fit=fit)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert not [warning for warning in report.warnings if "not fitted" in warning]
    assert any("'router.weight'" in warning for warning in report.warnings) is (method == "refit")
    shiradelta.apply(tmp_path / "base", tmp_path / "a.shd", out=tmp_path / "patched")
    patched = load_file(tmp_path / "patched" / "model.safetensors")
    for name in ("zero.weight", "norm.running_mean", "norm.running_var"):
        change, wanted = patched[name] - before[name], moved[name] - before[name]
        at = change.nonzero(as_tuple=True)
        assert len(at[0]), name
        torch.testing.assert_close(change[at], wanted[at], msg=name)
    model.load_state_dict(patched)
    student = forward(model, inputs).detach()
    model.load_state_dict(moved)
    teacher = forward(model, inputs).detach()
    held_out = split(100, SETTINGS.held_out, SETTINGS.seed)[1]
    error = (student - teacher)[held_out].norm() / teacher[held_out].norm()
    assert float(error) == pytest.approx(report.fit.fitted, rel=0.2)
