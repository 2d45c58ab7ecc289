"""Fitting, on models small enough for a test: it comes closer, changes nothing but the mask, and goes on exactly."""

from __future__ import annotations

import itertools
import json
import math
import random
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import shiradelta
from shiradelta.cli import main
from shiradelta.errors import DeltaError, DivergedError, ShiraDeltaError, SourceError
from shiradelta.fit import Fit, by_training
from shiradelta.fit import training as train
from shiradelta.fit.quantise import Quantiser
from shiradelta.fit.refit.least_squares import solve
from shiradelta.format.codecs import VALUE_OPTIONS
from shiradelta.format.codecs.base import TorchRounder
from shiradelta.nonzeros.vector import Nonzeros
from shiradelta.text.batches import split
from shiradelta.util.version import made_by
from tests import BRIEF

WORDS = [f"w{i}" for i in range(60)]
BERT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,  # layers that do something, untrained as they are
}
LLAMA = {**BERT, "num_key_value_heads": 2, "tie_word_embeddings": False}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Models this small are only slowed down by more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "encoder":
        return BertModel(BertConfig(**BERT))
    if kind == "classifier":
        return BertForSequenceClassification(BertConfig(**BERT, num_labels=3))
    return LlamaForCausalLM(LlamaConfig(**LLAMA))


def write_tokenizer(folder: Path) -> None:
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)


@pytest.fixture(
    scope="session",
    params=["causal", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("encoder", "classifier"))],
)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base model's folder and a fine-tune's."""
    return write_pair(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_pair("encoder", tmp_path_factory.mktemp("one"))


def write_pair(kind: str, root: Path) -> tuple[Path, Path]:
    model = build(kind)
    model.save_pretrained(root / "base")
    write_tokenizer(root / "base")
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name:
                factors = [torch.randn(size, 2) for size in parameter.shape]
                parameter += 0.04 * factors[0] @ factors[1].T
    model.save_pretrained(root / "tuned")
    return root / "base", root / "tuned"


def texts(count: int = 120) -> list[str]:
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, 9))) for _ in range(count)]


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts()))
    return path


SETTINGS = Fit(texts(), steps=40, batch=16, held_out=24, relative_lr=0.05, device="cpu")
#: For what is said and left on the way, not how close it comes.
FEW = {"texts": texts(32), "batch": 8, "held_out": 8}


def fit(pair: tuple[Path, Path], out: Path, **settings: Any) -> Any:
    options = {key: settings.pop(key) for key in ("values", "scope", "sparsity") if key in settings}
    return shiradelta.convert(
        pair[1], out, base=pair[0], fit=replace(SETTINGS, **settings), **{"sparsity": 0.05, **options}
    )


KINDS = ("causal", "encoder", "classifier")
MORE: tuple[dict[str, Any], ...] = ({"mask": "gradient"}, {"scope": "model"}, {"micro": 5})
WAYS = [
    *((kind, {}) for kind in KINDS),
    *(zip(KINDS, MORE, strict=True) if BRIEF else itertools.product(KINDS, MORE)),
]


@pytest.mark.parametrize(
    ("pair", "settings"),
    [pytest.param(*way, marks=[] if way == ("causal", {}) else pytest.mark.slow) for way in WAYS],
    indirect=["pair"],
    ids=str,
)
def test_it_comes_closer(pair: tuple[Path, Path], tmp_path: Path, settings: dict[str, Any]):
    report = fit(pair, tmp_path / "a.shd", **settings)
    assert report.fit.fitted < 0.85 * report.fit.topk
    assert report.fit.topk < report.fit.base
    if "scope" not in settings:
        assert [t.nnz for t in report.tensors] == [round(0.05 * t.numel) for t in report.tensors]


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["magnitude", "activation"])
def test_other_masks(encoder: tuple[Path, Path], tmp_path: Path, mask: str):
    report = fit(encoder, tmp_path / "a.shd", mask=mask)
    assert report.fit.fitted < 0.8 * report.fit.topk


def test_refit_comes_closer_without_gradients(pair: tuple[Path, Path], tmp_path: Path):
    report = fit(pair, tmp_path / "a.shd", method="refit")
    assert report.fit.fitted < report.fit.topk < report.fit.base


@pytest.mark.slow
def test_more_steps_bring_the_distance_down(encoder: tuple[Path, Path], tmp_path: Path):
    short, long = (fit(encoder, tmp_path / "a.shd", steps=steps, mask="magnitude").fit for steps in (5, 80))
    assert long.fitted < short.fitted
    assert long.history[-1][1] < long.history[0][1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scope", "steps"),
    [("tensor", 1), ("model", 2), ("tensor", 3), ("model", 7)]
    if BRIEF
    else list(itertools.product(("tensor", "model"), (1, 2, 3, 7))),
)
def test_few_steps_too_end_at_the_sparsity(encoder: tuple[Path, Path], tmp_path: Path, steps: int, scope: str):
    plain = shiradelta.convert(encoder[1], tmp_path / "b.shd", 0.05, encoder[0], scope=scope)
    assert fit(encoder, tmp_path / "a.shd", steps=steps, scope=scope, **FEW).nnz == plain.nnz


@pytest.mark.slow
@pytest.mark.parametrize("values", [name for name, codec in VALUE_OPTIONS.items() if isinstance(codec, TorchRounder)])
def test_the_file_gives_what_was_measured(encoder: tuple[Path, Path], tmp_path: Path, values: str):
    """Distance measured anew, from the applied file, by other code."""
    base, tuned = encoder
    report = fit(encoder, tmp_path / "a.shd", values=values, steps=10)
    shiradelta.apply(base, tmp_path / "a.shd", out=tmp_path / "patched")
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "patched" / "model.safetensors")
    with shiradelta.open_delta(tmp_path / "a.shd") as delta:
        for name, weights in before.items():
            changed = (weights != after[name]).reshape(-1).nonzero()[:, 0].numpy()
            assert np.isin(changed, delta[name].positions() if name in delta else []).all()
        assert float(delta.metadata["distance"]) == pytest.approx(report.fit.fitted, rel=1e-4)
        assert delta.metadata["method"] == "fit"
        assert delta.metadata["fit_seed"] == "0"
        assert delta.metadata["created_by"] == made_by("torch", "transformers")

    held_out = split(120, 24, 0)[1]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    student, teacher = (BertModel.from_pretrained(folder).eval() for folder in (tmp_path / "patched", tuned))
    batches = sorted(held_out, key=lambda index: len(texts()[index].split()))
    distances = []
    for part in (batches[:16], batches[16:]):
        batch = tokenizer([texts()[index] for index in part], padding=True, return_tensors="pt")
        mask = batch.attention_mask.bool()
        with torch.no_grad():
            s, t = (model(**batch).last_hidden_state[mask] for model in (student, teacher))
        distances.append(float((s - t).norm() / t.norm()) * len(part))
    assert sum(distances) / len(held_out) == pytest.approx(report.fit.fitted, rel=1e-4)


@pytest.mark.parametrize("codec", VALUE_OPTIONS)
def test_the_quantiser_is_the_codec(codec: str):
    rng = np.random.default_rng(0)
    counts = [1, 128, 300, 257, 0, 5]
    parts = [(rng.standard_normal(count) * 10.0 ** rng.integers(-4, 3)).astype(np.float32) for count in counts]
    parts[2][:128] = 0.5  # a group without spread
    implementation = VALUE_OPTIONS[codec]
    expected = [
        implementation.decode(np.frombuffer(implementation.encode(part), np.uint8), part.size, 4, 0, part.size)
        for part in parts
        if part.size
    ]
    found = Quantiser(codec, counts, torch.device("cpu"))(torch.from_numpy(np.concatenate(parts)))
    np.testing.assert_array_equal(found.numpy(), np.concatenate(expected))


def test_gradients_are_the_dense_ones_at_the_mask(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shiradelta.nonzeros.weight.CHUNK", 100)
    model = build("causal")
    model.requires_grad_(False)
    weights = [p for p in model.parameters() if p.dim() == 2]
    positions = [torch.randperm(p.numel())[:50].sort().values for p in weights]
    ids = torch.randint(0, 60, (3, 7))

    def loss() -> Tensor:
        return model(ids).logits.square().mean()

    for weight in weights:
        weight.requires_grad_(True)
    loss().backward()
    expected = torch.cat([weight.grad.view(-1)[p] for weight, p in zip(weights, positions, strict=True)])
    for weight in weights:
        weight.requires_grad_(False)
        weight.grad = None
    nonzeros = Nonzeros(weights, [torch.float32] * len(weights), positions)
    with nonzeros.attached(model):
        loss().backward()
    torch.testing.assert_close(nonzeros.grads, [expected])
    assert all(weight.grad is None and not weight.requires_grad for weight in weights)


def test_writing_and_taking_back_is_exact():
    weight = nn.Parameter(torch.randn(20, 30).bfloat16(), requires_grad=False)
    before = weight.data.clone()
    nonzeros = Nonzeros([weight], [torch.bfloat16], [torch.arange(0, 600, 7)])
    nonzeros.values = [torch.randn(sum(nonzeros.counts))]
    nonzeros.write(nonzeros.values)
    assert (weight != before).sum() > 50
    nonzeros.keep([torch.arange(sum(nonzeros.counts)) % 2 == 0])
    assert torch.equal(weight, before)
    assert nonzeros.counts == [43] == list(map(len, nonzeros.values)) == list(map(len, nonzeros.grads))


def test_refit_solves_the_whole_problem_where_all_may_change():
    generator = torch.Generator().manual_seed(0)
    x, wanted = torch.randn(500, 6, generator=generator), torch.randn(4, 6, generator=generator)
    positions, values = solve(x.T @ x, x.T @ (x @ wanted.T), 24)
    assert torch.equal(positions, torch.arange(24))
    assert (values.view(4, 6) - wanted).norm() < 0.15 * wanted.norm()  # the damping's


class Interrupted(Exception):  # noqa: N818
    pass


@pytest.mark.slow
def test_an_interrupted_run_goes_on_exactly(
    encoder: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("shiradelta.nonzeros.unfinished.SAVE_EVERY", 0)
    fit(encoder, tmp_path / "whole.shd")

    def interrupt(what: str, done: int, total: int) -> None:
        if total == 40 and done == 27:
            raise Interrupted

    said: list[str] = []
    with pytest.raises(Interrupted):
        shiradelta.convert(
            encoder[1], tmp_path / "a.shd", base=encoder[0], sparsity=0.05, fit=SETTINGS, progress=interrupt
        )
    assert (tmp_path / "a.shd.fit").exists()
    assert not (tmp_path / "a.shd").exists()
    fit(encoder, tmp_path / "a.shd", log=said.append)
    assert "going on from step 26" in said[0]
    assert (tmp_path / "a.shd").read_bytes() == (tmp_path / "whole.shd").read_bytes()
    assert not (tmp_path / "a.shd.fit").exists()


@pytest.mark.slow
def test_a_state_of_another_fine_tune_is_not_taken_up(
    encoder: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Which lies where the first one lay."""
    tuned = copy_of(encoder[1], tmp_path / "tuned")
    said: list[str] = []
    with monkeypatch.context() as patched:
        patched.setattr(train.FitTrainer, "_evaluate", stopping(train.FitTrainer._evaluate, 30))
        with pytest.raises(KeyboardInterrupt):
            fit((encoder[0], tuned), tmp_path / "a.shd", log=said.append)
    assert said[-1] == f"the same command goes on from step 30 of 40, which is kept in {tmp_path / 'a.shd.fit'}"
    weights = load_file(tuned / "model.safetensors")
    save_file({name: 2 * weight for name, weight in weights.items()}, tuned / "model.safetensors", {"format": "pt"})
    fit((encoder[0], tuned), tmp_path / "a.shd", log=said.append)
    assert not any("going on" in line for line in said)


#: In the middle of a step: of the tenth, not after a number of them.
SIGINT_AT = -10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "step", "where"),
    [
        ({"mask": "prune"}, 0, "no step was done yet, so the same command begins anew"),
        ({"mask": "prune"}, 1, "goes on from step 1 of 40"),
        ({"mask": "prune", "scope": "model"}, 17, "goes on from step 17 of 40"),
        ({"mask": "prune"}, SIGINT_AT, "goes on from step 10 of 40"),
        ({"mask": "refit"}, 0, "goes on from what least squares gave"),
        ({"mask": "refit", "scope": "model"}, 39, "goes on from step 39 of 40"),
    ],
)
def test_no_step_is_lost_where_a_run_is_interrupted(
    encoder: tuple[Path, Path],
    tmp_path: Path,
    settings: dict[str, Any],
    step: int,
    where: str,
    monkeypatch: pytest.MonkeyPatch,
):
    """By Ctrl-C; or by SIGTERM, which raises SystemExit."""
    said: list[str] = []
    error = SystemExit if step == 1 else KeyboardInterrupt
    with monkeypatch.context() as patched:
        if step == SIGINT_AT:
            patched.setattr(train, "adam_", with_a_signal(train.adam_))
        else:
            patched.setattr(train.FitTrainer, "_passes", stopping(train.FitTrainer._passes, step, error))
        with pytest.raises(error):
            fit(encoder, tmp_path / "a.shd", log=said.append, **settings)
    assert where in said[-1]
    assert [path.name for path in tmp_path.iterdir()] == (["a.shd.fit"] if "goes on" in where else [])
    fit(encoder, tmp_path / "a.shd", log=said.append, **settings)
    assert any("going on from step" in line for line in said) == ("goes on" in where)
    fit(encoder, tmp_path / "whole.shd", **settings)
    assert (tmp_path / "a.shd").read_bytes() == (tmp_path / "whole.shd").read_bytes()


def test_a_state_after_a_step_that_gave_nan_is_not_kept(
    encoder: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    said, update = list[str](), train.FitTrainer._update

    def spoilt(self: train.FitTrainer) -> None:
        update(self)
        if self.state.step == 2:
            self.state.values[0][3] = math.nan

    monkeypatch.setattr(train.FitTrainer, "_update", spoilt)
    monkeypatch.setattr(train.FitTrainer, "_passes", stopping(train.FitTrainer._passes, 3))
    with pytest.raises(KeyboardInterrupt):
        fit(encoder, tmp_path / "a.shd", log=said.append, mask="prune", **FEW)
    assert "goes on from step 2 of 40" in said[-1]


def with_a_signal(adam: Any) -> Any:
    """`adam_`, which Ctrl-C reaches in step `-SIGINT_AT`, before it has changed anything."""

    def interrupted(*given: Any) -> None:
        if given[4] == -SIGINT_AT:
            signal.raise_signal(signal.SIGINT)
        adam(*given)

    return interrupted


def stopping(method: Any, step: int, error: type[BaseException] = KeyboardInterrupt) -> Any:
    """A method of `FitTrainer`, interrupted from a step on."""

    def stopped(self: train.FitTrainer, *given: Any) -> Any:
        if self.state.step >= step and self.good is not self.state:  # which is so while steps are timed
            raise error
        return method(self, *given)

    return stopped


@pytest.mark.slow
def test_a_tensor_that_no_loss_reaches_keeps_its_largest_changes(encoder: tuple[Path, Path], tmp_path: Path):
    """The pooler, which embeddings do not need; least squares would fit its outputs."""
    plain = shiradelta.convert(encoder[1], tmp_path / "b.shd", 0.05, encoder[0])
    fit(encoder, tmp_path / "a.shd", mask="prune")
    name = "pooler.dense.weight"
    assert plain.nnz
    with shiradelta.open_delta(tmp_path / "a.shd") as one, shiradelta.open_delta(tmp_path / "b.shd") as other:
        assert one[name].positions().tolist() == other[name].positions().tolist()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["train", "refit"])
@pytest.mark.parametrize(
    "renamed", ["encoder.layer.0.intermediate.dense.weight", "encoder.layer.0.attention.self.key.bias"]
)
def test_tensors_that_the_loaded_model_lacks(
    encoder: tuple[Path, Path], tmp_path: Path, method: str, renamed: str, monkeypatch: pytest.MonkeyPatch
):
    """As transformers renames and stacks some: a few may be left out, with a warning, but not what counts."""
    weights, changed = (load_file(folder / "model.safetensors") for folder in encoder)
    changed = {name: changed[name] + (0.01 if name == renamed else 0) for name in changed}
    folders = []
    for which, tensors in (("base", weights), ("tuned", changed)):
        folder = copy_of(encoder[0], tmp_path / which, "model.safetensors")
        old = {("other.weight" if name == renamed else name): tensor for name, tensor in tensors.items()}
        save_file(old, folder / "model.safetensors", {"format": "pt"})
        folders.append(folder)
    if renamed.endswith("bias"):
        report = fit((folders[0], folders[1]), tmp_path / "a.shd", method=method)
        warned = "1 tensor is not fitted, because the loaded model has none of that name, such as 'other.weight'"
        assert warned in " ".join(report.warnings)
    else:
        with pytest.raises(
            SourceError,
            match=r"'other.weight' cannot be fitted, because .* none of that name.* carry \d+% of the change",
        ):
            fit((folders[0], folders[1]), tmp_path / "a.shd", method=method)
        assert not (tmp_path / "a.shd").exists()


@pytest.mark.slow
def test_a_users_own_model_comes_back_as_it_was(
    encoder: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """After an interruption, too."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(encoder[0]).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fit(encoder, tmp_path / "a.shd", model=model, steps=3, **FEW)
    with monkeypatch.context() as patched:
        patched.setattr(train.FitTrainer, "_evaluate", stopping(train.FitTrainer._evaluate, 4))
        with pytest.raises(KeyboardInterrupt):
            fit(encoder, tmp_path / "a.shd", model=model, **FEW)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.slow
def test_a_state_of_another_run_is_not_taken_up(
    encoder: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    said: list[str] = []
    (tmp_path / "a.shd.fit").write_bytes(b"something else")
    with pytest.raises(SourceError, match="not the state of an unfinished run"):
        fit(encoder, tmp_path / "a.shd")
    save_file({}, tmp_path / "a.shd.fit", {"run": "other", "state": "{}"})
    fit(encoder, tmp_path / "a.shd", log=said.append)
    assert not any("going on" in line for line in said)


@pytest.mark.slow
def test_training_that_diverges_backs_off_and_stops(encoder: tuple[Path, Path], tmp_path: Path):
    with pytest.raises(DivergedError, match=r"NaN at step \d+ .*--fit-relative-lr.*last good state is in"):
        fit(encoder, tmp_path / "a.shd", relative_lr=1e30, **FEW)
    assert (tmp_path / "a.shd.fit").exists()
    assert not (tmp_path / "a.shd").exists()


class Small(nn.Module):
    """Nothing of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 40), nn.Linear(40, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(None, id="error", marks=pytest.mark.slow),
        pytest.param(lambda s, t: (s - t).abs().mean(), id="own loss"),
    ],
)
def test_any_module_by_its_own_forward(tmp_path: Path, loss: Any):
    torch.manual_seed(0)
    model = Small()
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    tuned = {name: weights + 0.2 * torch.randn_like(weights) for name, weights in model.state_dict().items()}
    save_file(tuned, tmp_path / "tuned.safetensors")

    def forward(module: Any, examples: Sequence[Tensor]) -> Tensor:
        return module(torch.stack(list(examples)))

    settings = replace(SETTINGS, texts=list(torch.randn(100, 8)), model=model, forward=forward, loss=loss)
    report = shiradelta.convert(
        tmp_path / "tuned.safetensors", base=tmp_path / "base.safetensors", sparsity=0.1, fit=settings
    )
    assert report.fit.fitted < 0.8 * report.fit.topk
    assert all(torch.equal(load_file(tmp_path / "base.safetensors")[n], w) for n, w in model.state_dict().items())


@pytest.mark.slow
def test_from_the_command_line(encoder: tuple[Path, Path], jsonl: Path, tmp_path: Path):
    out = tmp_path / "a.shd"
    arguments = ["convert", encoder[1], "--base", encoder[0], "--sparsity", "0.05", "--fit", jsonl, "-o", out]
    options = ["--fit-steps", "10", "--fit-batch", "16", "--accept-worse", "--plot", tmp_path / "fit.png"]
    result = CliRunner().invoke(main, [str(a) for a in arguments + options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "10 steps of 16 on" in result.stderr
    assert "against the fine-tune, 24 examples held out" in result.stdout
    assert "relative error of hidden states" in result.stdout
    assert "cosine of embeddings" in result.stdout
    assert (tmp_path / "fit.png").read_bytes().startswith(b"\x89PNG")
    assert "distance_topk" in CliRunner().invoke(main, ["info", str(out)]).stdout
    plain = CliRunner().invoke(main, [str(a) for a in [*arguments[:6], "-o", out, "--json"]])
    assert any("--fit" in line for line in json.loads(plain.stdout)["warnings"])


@pytest.mark.slow
def test_importing_needs_neither_torch_nor_transformers():
    check = "import sys, shiradelta.fit, shiradelta.converters; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)


def copy_of(folder: Path, target: Path, without: str = "", config: dict[str, Any] | None = None) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        if not (without and file.name.startswith(without)):
            (target / file.name).write_bytes(file.read_bytes())
    if config:
        stored = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps({**stored, **config}))
    return target


def test_bad_models(encoder: tuple[Path, Path], tmp_path: Path):
    base, tuned = encoder
    out = tmp_path / "a.shd"
    diff = tmp_path / "diff.safetensors"
    save_file({"pooler.dense.weight.diff": torch.ones(32, 32)}, diff)
    with pytest.raises(SourceError, match="give --base MODEL"):
        shiradelta.convert(diff, out, kind="diff", fit=SETTINGS)
    with pytest.raises(SourceError, match="has no tokenizer"):
        fit((copy_of(base, tmp_path / "mute", "tokenizer"), tuned), out)
    with pytest.raises(SourceError, match=r"no config\.json that names its architecture"):
        fit((copy_of(base, tmp_path / "bare", "config"), tuned), out)
    with pytest.raises(
        SourceError, match=r"transformers has no class Nothing.*; upgrade transformers.*from Python, Fit"
    ):
        fit((base, copy_of(tuned, tmp_path / "odd", config={"architectures": ["Nothing"]})), out)
    same = copy_of(base, tmp_path / "same")
    weights = load_file(same / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][63] += 1  # of a token in no text
    save_file(weights, same / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match="behaves like its base"):
        fit((base, same), out)
    weights = load_file(tuned / "model.safetensors")
    name = "encoder.layer.0.output.dense.weight"
    weights[name][0, 0] = math.nan
    copy_of(tuned, tmp_path / "nan", "model")
    save_file(weights, tmp_path / "nan" / "model.safetensors", {"format": "pt"})
    for method in ("train", "refit"):
        with pytest.raises(SourceError, match=f"tensor '{name}' has NaN or infinity in it"):
            fit((base, tmp_path / "nan"), out, method=method)
    resized = load_file(tuned / "model.safetensors")
    name = "embeddings.word_embeddings.weight"
    resized[name] = torch.cat([resized[name], resized[name][:2]])
    copy_of(tuned, tmp_path / "resized", "model")
    save_file(resized, tmp_path / "resized" / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=r"such a tensor cannot be fitted.*resize_token_embeddings"):
        fit((base, tmp_path / "resized"), out)
    assert not out.exists()


def test_bad_settings():
    for wrong in ({"steps": 0}, {"mask": "x"}, {"method": "x"}, {"relative_lr": 0.0}, {"batch": -1}):
        with pytest.raises(DeltaError):
            replace(SETTINGS, **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("old", "new"),
    [({"mask": "falling"}, {"mask": "prune"}), ({"rate": 0.1}, {"relative_lr": 0.1}), ({"say": print}, {"log": print})],
)
def test_old_names_of_settings_are_still_taken(old: dict[str, Any], new: dict[str, Any]):
    with pytest.warns(DeprecationWarning, match=r"is deprecated; use '?(prune|relative_lr|log)") as warned:
        found = Fit(["text"], **old)
    assert found == Fit(["text"], **new)
    assert [warning.filename for warning in warned] == [__file__]
    assert replace(found, seed=1) == Fit(["text"], seed=1, **new)
    with pytest.warns(DeprecationWarning, match="use relative_lr"):
        assert found.rate == found.relative_lr
    with pytest.warns(DeprecationWarning, match="use log"):
        assert found.say is found.log


@pytest.mark.slow
def test_old_names_on_the_command_line_are_still_taken(encoder: tuple[Path, Path], jsonl: Path, tmp_path: Path):
    arguments = ["convert", encoder[1], "--base", encoder[0], "--fit", jsonl, "--fit-steps", "2", "--fit-batch", "16"]
    files = []
    for name, options in (
        ("old", ["--fit-rate", "0.1", "--fit-mask", "falling"]),
        ("new", ["--fit-relative-lr=0.1", "--fit-mask=prune"]),
    ):
        files.append(tmp_path / f"{name}.shd")
        words = [str(word) for word in [*arguments, *options, "-o", files[-1]]]
        result = CliRunner().invoke(main, words, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        assert ("--fit-rate is deprecated; use --fit-relative-lr" in result.stderr) is (name == "old")
        assert ("falling is deprecated; use prune" in result.stderr) is (name == "old")
    assert files[0].read_bytes() == files[1].read_bytes()
    shown = CliRunner().invoke(main, ["convert", "--help"]).output
    assert "--fit-rate" not in shown
    assert "falling" not in shown


def test_out_of_memory_says_what_to_halve(encoder: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*arguments: object) -> float:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("shiradelta.fit.training.FitTrainer._gradient", full)
    with pytest.raises(ShiraDeltaError, match=r"--fit-micro 8 halves.* cuts texts$"):
        fit(encoder, tmp_path / "a.shd")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ShiraDeltaError, match=r"--device cuda:0,cuda:1 shares out the layers$"):
        fit(encoder, tmp_path / "a.shd")
    with pytest.raises(ShiraDeltaError, match=r" cuts texts$"):
        fit(encoder, tmp_path / "a.shd", device="cpu,cpu")


def test_a_step_has_no_more_texts_than_there_are(encoder: tuple[Path, Path], tmp_path: Path):
    said: list[str] = []
    fit(encoder, tmp_path / "a.shd", steps=2, batch=1000, log=said.append)
    assert any(line.startswith("fitting on 96 examples: 2 steps of 96 on cpu") for line in said)


@pytest.mark.slow
def test_a_cpu_takes_fewer_steps_by_itself(encoder: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    monkeypatch.setattr(by_training, "CPU_SECONDS", 0)
    report = fit(encoder, tmp_path / "a.shd", steps=None, log=said.append)
    assert report.fit.steps <= by_training.CPU_LEAST
    assert f"{by_training.CPU_LEAST} steps of 16 on cpu, about" in said[0]
    assert math.isfinite(report.fit.fitted)
