"""`shiradelta train`: a folder and a file of examples in, a `.shd` out."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

import shiradelta
from shiradelta.cli import main
from shiradelta.errors import DeltaError, DivergedError, ShiraDeltaError, SourceError, TargetError
from shiradelta.text.examples import training_examples
from shiradelta.text.kinds import PAIRS
from shiradelta.text.read import ExampleSet
from shiradelta.train import run as run_module
from shiradelta.train.run import run
from shiradelta.train.settings import TrainSettings
from shiradelta.util.version import made_by
from tests import BRIEF
from tests.fit.test_fit import WORDS, write_tokenizer
from tests.train.test_attach import llama

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    llama(torch.bfloat16, vocab_size=100).save_pretrained(root / "causal")
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 100, "hidden_size": 32}
    BertModel(BertConfig(intermediate_size=48, **sizes)).save_pretrained(root / "encoder")
    for kind in ("causal", "encoder"):
        write_tokenizer(root / kind)
    return root


def write(path: Path, kind: str, count: int = 60) -> Path:
    """Sentences of which each word says what comes next."""
    rng = random.Random(0)

    def sentence() -> str:
        start = rng.randrange(50)
        return " ".join(WORDS[(start + i) % 50] for i in range(6))

    rows: list[dict[str, str]] = []
    for _ in range(count):
        if kind == "text":
            rows.append({"text": sentence()})
        elif kind == "completion":
            words = sentence().split()
            rows.append({"prompt": " ".join(words[:3]), "completion": " ".join(words[3:])})
        else:
            rows.append({"anchor": (text := sentence()), "positive": " ".join(reversed(text.split()))})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@contextmanager
def interrupted(monkeypatch: pytest.MonkeyPatch, at: int) -> Iterator[None]:
    """Within, a run saves its state at every step, and has to end with Ctrl-C at one of them."""
    step = run_module._Run._step

    def stop(self: Any, tuner: Any, optimizer: Any, number: int, indices: Any) -> float:
        if number == at:
            raise KeyboardInterrupt
        return step(self, tuner, optimizer, number, indices)

    monkeypatch.setattr("shiradelta.nonzeros.unfinished.SAVE_EVERY", -1)
    monkeypatch.setattr(run_module._Run, "_step", stop)
    with pytest.raises(KeyboardInterrupt):
        yield
    monkeypatch.setattr(run_module._Run, "_step", step)


SETTINGS = TrainSettings(sparsity=0.1, steps=20, batch=12, relative_lr=0.4, tokens=16)
#: In CI these search for their learning rate, too; `test_a_learning_rate_is_found_once` always does.
SEARCHED = {} if BRIEF else {"relative_lr": None}


@pytest.mark.parametrize(("model", "kind"), [("causal", "text"), ("causal", "completion"), ("encoder", "pairs")])
def test_it_learns_and_the_file_fits_the_folder(model: str, kind: str, folders: Path, tmp_path: Path):
    texts = write(tmp_path / "data.jsonl", kind)
    told: list[str] = []
    report = run(folders / model, texts, tmp_path / "task.shd", SETTINGS, "cpu", tmp_path / "loss.png", told.append)
    assert report.after < 0.97 * report.before
    assert [step for step, *_ in report.history] == list(range(21))
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "loss.png", "task.shd"]
    shiradelta.apply(folders / model, tmp_path / "task.shd", out=tmp_path / "patched")
    assert shiradelta.verify(folders / model, tmp_path / "task.shd").state == "base"
    assert any("training" in line for line in told)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"sparsity": "1:8"}, marks=pytest.mark.slow),
        {"sparsity": 0.02},
        pytest.param({"sparsity": 0.02, "scope": "model"}, marks=pytest.mark.slow),
        {"magnitude": True, **SEARCHED},
        {"mask": "rigsa", **SEARCHED},
    ],
    ids=str,
)
def test_an_interrupted_run_goes_on_exactly(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
):
    """Also amid pruning, of each tensor or over the model."""
    texts = write(tmp_path / "data.jsonl", "text")
    settings = TrainSettings(**{**vars(SETTINGS), **options, "values": "f32"})
    whole = run(folders / "causal", texts, tmp_path / "whole.shd", settings, "cpu")
    told: list[str] = []
    with interrupted(monkeypatch, 11):
        run(folders / "causal", texts, tmp_path / "task.shd", settings, "cpu", log=told.append)
    assert "goes on from step 11" in told[-1]
    assert not (tmp_path / "task.shd").exists()
    shiradelta.apply(folders / "causal", tmp_path / "whole.shd")
    with pytest.raises(SourceError, match="not those that the interrupted run began with"):
        run(folders / "causal", texts, tmp_path / "task.shd", settings, "cpu")
    shiradelta.revert(folders / "causal")
    report = run(folders / "causal", texts, tmp_path / "task.shd", settings, "cpu", log=told.append)
    assert any("going on from step 11" in line for line in told)
    assert (tmp_path / "task.shd").read_bytes() == (tmp_path / "whole.shd").read_bytes()
    assert [held for *_, held in report.history] == [held for *_, held in whole.history]


@pytest.mark.parametrize("ending", [signal.SIGINT, SystemExit(143)], ids=["Ctrl-C", "SIGTERM"])
@pytest.mark.parametrize("during", ["loss", "update", "measure"])
def test_an_interrupt_keeps_all_steps(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, during: str, ending: signal.Signals | SystemExit
):
    """Wherever it comes, though the last state was kept long ago."""
    texts, told = write(tmp_path / "data.jsonl", "text"), list[str]()
    settings = TrainSettings(**{**vars(SETTINGS), "steps": 12, "values": "f32"})
    run(folders / "causal", texts, tmp_path / "whole.shd", settings, "cpu")
    owner, name = {
        "loss": (run_module._Run, "_loss"),
        "update": (torch.optim.AdamW, "step"),
        "measure": (run_module._Run, "_measure"),
    }[during]
    real, calls = getattr(owner, name), 0

    @wraps(real)  # torch marks what its hooks are on
    def stop(self: Any, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 8:
            if isinstance(ending, SystemExit):
                raise ending
            signal.raise_signal(ending)
        return real(self, *arguments)

    if during == "update" and isinstance(ending, SystemExit):
        pytest.skip("a handler's exception waits until the update is made")
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stop)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            run(folders / "causal", texts, tmp_path / "task.shd", settings, "cpu", log=told.append)
    done = 8 if during == "update" else 7
    assert f"goes on from step {done} of 12" in told[-1]
    run(folders / "causal", texts, tmp_path / "task.shd", settings, "cpu", log=told.append)
    assert any(f"going on from step {done} of 12" in line for line in told)
    assert (tmp_path / "task.shd").read_bytes() == (tmp_path / "whole.shd").read_bytes()


def test_a_learning_rate_is_found_once(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A run that goes on has that of its beginning."""
    texts, told = write(tmp_path / "data.jsonl", "text"), list[str]()
    settings = TrainSettings(**{**vars(SETTINGS), "relative_lr": None, "steps": 12})
    whole = run(folders / "causal", texts, tmp_path / "whole.shd", settings, "cpu", log=told.append)
    assert whole.after < whole.before
    assert sum("learning rate" in line for line in told) > 2
    with interrupted(monkeypatch, 7):
        run(folders / "causal", texts, tmp_path / "task.shd", settings, "cpu")
    told.clear()
    report = run(folders / "causal", texts, tmp_path / "task.shd", settings, "cpu", log=told.append)
    assert report.relative_lr == whole.relative_lr
    assert not any("learning rate" in line for line in told)
    assert (tmp_path / "task.shd").read_bytes() == (tmp_path / "whole.shd").read_bytes()


def test_a_search_is_not_made_again(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It takes longest, and its result is kept before the learning rate is searched."""
    texts, told = write(tmp_path / "data.jsonl", "text"), list[str]()
    settings = TrainSettings(**{**vars(SETTINGS), "relative_lr": None, "steps": 12, "mask": "rigsa"})
    run(folders / "causal", texts, tmp_path / "whole.shd", settings, "cpu")

    def stop(*given: Any) -> float:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "find_lr", stop)
        with pytest.raises(KeyboardInterrupt):
            run(folders / "causal", texts, tmp_path / "task.shd", settings, "cpu")
    monkeypatch.setattr("shiradelta.train.rigsa.search", stop)
    run(folders / "causal", texts, tmp_path / "task.shd", settings, "cpu", log=told.append)
    assert any("going on from step 0 of 12" in line for line in told)
    assert (tmp_path / "task.shd").read_bytes() == (tmp_path / "whole.shd").read_bytes()
    assert not (tmp_path / "task.shd.train").exists()


def measuring(monkeypatch: pytest.MonkeyPatch, *losses: float) -> list[dict[str, torch.Tensor]]:
    """Lets a run measure these held-out losses, one after the other; gives the model's weights at each."""
    left, seen = list(losses), list[dict[str, torch.Tensor]]()

    def measure(self: Any) -> float:
        seen.append({name: weight.detach().clone() for name, weight in self.model.named_parameters()})
        return left.pop(0)

    monkeypatch.setattr(run_module._Run, "_measure", measure)
    return seen


def test_the_best_state_with_the_final_mask_is_kept(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Not those before pruning ends, which have too many nonzeros."""
    texts = write(tmp_path / "data.jsonl", "text")
    settings = TrainSettings(**{**vars(SETTINGS), "steps": 6, "values": "f32"})
    assert settings.pruning[0] == 4
    seen = measuring(monkeypatch, 3, 0.1, 0.1, 0.1, 0.1, 2, 2.5, 2)
    report = run(folders / "causal", texts, tmp_path / "task.shd", settings, "cpu")
    assert (report.before, report.trained, report.after) == (3, 2, 2)
    assert all(torch.equal(weight, seen[5][name]) for name, weight in seen[-1].items() if name in seen[5])
    assert any(not torch.equal(weight, seen[6][name]) for name, weight in seen[-1].items() if name in seen[6])


def test_a_run_that_ends_worse_than_the_base_is_an_error(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It leaves a file of before alone; the same run goes on from its end where that is accepted."""
    texts = write(tmp_path / "data.jsonl", "text")
    settings = TrainSettings(**{**vars(SETTINGS), "steps": 2})
    good = run(folders / "causal", texts, tmp_path / "task.shd", SETTINGS, "cpu")
    assert good.after < good.before
    before = (tmp_path / "task.shd").read_bytes()
    measuring(monkeypatch, 3, 3.5, 3.25, 3.5)
    with pytest.raises(DivergedError, match=r"on 12 examples held out .loss 3.5, 3 before.*no state on the"):
        run(folders / "causal", texts, tmp_path / "task.shd", settings, "cpu")
    assert (tmp_path / "task.shd").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "task.shd", "task.shd.train"]
    measuring(monkeypatch, 3.5)
    report = run(folders / "causal", texts, tmp_path / "task.shd", settings, "cpu", accept_worse=True)
    assert (report.before, report.trained, report.after) == (3, 3.25, 3.5)
    assert (tmp_path / "task.shd").read_bytes() != before
    measuring(monkeypatch, 3, 2.5, 2.5, 3.5)
    with pytest.raises(DivergedError, match="rounding to int4 loses what was gained; give --values int8"):
        run(folders / "causal", texts, tmp_path / "task.shd", settings, "cpu")


def test_the_command(folders: Path, tmp_path: Path):
    texts = write(tmp_path / "data.jsonl", "text")
    command = ["train", str(folders / "causal"), "--texts", str(texts), "-o", str(tmp_path / "task.shd")]
    options = ["--steps", "3", "--batch", "8", "--sparsity", "0.1", "--targets", "q_proj,up_proj", "--device", "cpu"]
    result = CliRunner().invoke(main, [*command, *options])
    assert result.exit_code == 0, result.output
    assert "held out" in result.output
    assert "shiradelta apply" in result.output
    result = CliRunner().invoke(main, [*command, *options, "--json", "--mask", "struct", "--seed", "3"])
    found = json.loads(result.stdout)
    assert found["steps"] == 3
    with shiradelta.open_delta(tmp_path / "task.shd") as delta:
        assert all("q_proj" in name or "up_proj" in name for name in delta)
        assert delta.metadata["mask"] == "struct"
        assert delta.metadata["base"] == "causal"
        assert delta.metadata["seed"] == "3"
        assert delta.metadata["created_by"] == made_by("torch", "transformers")
        assert f"torch {torch.__version__}" in delta.metadata["created_by"]
    result = CliRunner().invoke(main, [*command, "--sparsity", "much"])
    assert result.exit_code == 2
    assert "1:64" in result.output


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["nonsense"] * 12, "line 1: is not JSON"),
        (['{"words": "a"}'] * 12, "line 1: is no example"),
        (['{"text": "w1 w2"}'] * 11 + ['{"prompt": "w1", "completion": "w2"}'], "line 12: lacks the key"),
        (['{"text": "w1 w2"}'] * 3, "3 examples are too few"),
        ([], "0 examples"),
        (['{"text": "w1"}'] * 12, "nothing to predict"),
        (['{"anchor": "w1 w2", "positive": "w1"}'] * 12, "last_hidden_state"),
    ],
)
def test_examples_that_cannot_be_used(lines: list[str], message: str, folders: Path, tmp_path: Path):
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    with pytest.raises(SourceError, match=message):
        run(folders / "causal", tmp_path / "data.jsonl", tmp_path / "task.shd", SETTINGS, "cpu")
    assert not (tmp_path / "task.shd").exists()


def test_texts_do_not_train_an_encoder(folders: Path, tmp_path: Path):
    with pytest.raises(SourceError, match="anchor and positive"):
        run(folders / "encoder", write(tmp_path / "data.jsonl", "text"), tmp_path / "task.shd", SETTINGS, "cpu")


def test_a_rate_that_is_too_large(folders: Path, tmp_path: Path):
    settings = TrainSettings(**{**vars(SETTINGS), "relative_lr": 1e38})
    with pytest.raises(ShiraDeltaError, match="smaller --relative-lr"):
        run(folders / "causal", write(tmp_path / "data.jsonl", "text"), tmp_path / "task.shd", settings, "cpu")
    assert not (tmp_path / "task.shd").exists()


@pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")
def test_the_example_with_trainer(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from examples.train.trainer import main as example

    texts = write(tmp_path / "data.jsonl", "text")
    file = example(str(folders / "causal"), str(texts), str(tmp_path / "out"), steps=3)
    shiradelta.apply(folders / "causal", file, out=tmp_path / "patched")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"steps": -3}, "steps is -3"),
        ({"batch": 0}, "batch is 0"),
        ({"tokens": 0}, "tokens is 0"),
        ({"relative_lr": float("nan")}, "relative learning rate of nan"),
        ({"sparsity": "1:0"}, "not a pattern"),
        ({"prune_from": 0.5}, "pruning from 0.5 x"),
        ({"values": "int3"}, "'int3' are unknown"),
    ],
)
def test_settings_that_cannot_be(setting: dict[str, Any], message: str):
    with pytest.raises(DeltaError, match=message):
        TrainSettings(**setting)


def test_pruning_where_a_mask_can_be_larger():
    """By default: not for struct and N:M, which have patterns of their own."""
    assert TrainSettings(steps=101).pruning == (61, 5)
    assert TrainSettings(prune_from=20).pruning == (240, 20)
    for kept in ({"mask": "struct"}, {"sparsity": "1:64"}, {"prune_from": 1}):
        assert TrainSettings(**kept).pruning == (0, 1)


def test_places_that_cannot_be_written_are_told_before_the_work(folders: Path, tmp_path: Path):
    texts = write(tmp_path / "data.jsonl", "text")
    for out, plot in (("no/task.shd", None), ("data.jsonl", None), ("task.shd", "no/loss.png")):
        picture = None if plot is None else tmp_path / plot
        with pytest.raises(TargetError, match=r"no such folder|not a \.shd file"):
            run(tmp_path / "nowhere", texts, tmp_path / out, SETTINGS, "cpu", picture)


def test_long_texts_are_cut_where_the_model_ends(folders: Path, tmp_path: Path):
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=100, n_positions=8)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "short")
    write_tokenizer(tmp_path / "short")
    (tmp_path / "data.jsonl").write_text((json.dumps({"text": " ".join(WORDS)}) + "\n") * 12)
    settings = TrainSettings(**{**vars(SETTINGS), "steps": 1, "tokens": 40})
    assert run(tmp_path / "short", tmp_path / "data.jsonl", tmp_path / "task.shd", settings, "cpu").steps == 1


def test_a_tokenizer_of_another_model(folders: Path, tmp_path: Path):
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=9)).save_pretrained(tmp_path / "few")
    write_tokenizer(tmp_path / "few")
    with pytest.raises(SourceError, match="the model has 9"):
        run(tmp_path / "few", write(tmp_path / "data.jsonl", "text"), tmp_path / "task.shd", SETTINGS, "cpu")


def test_pairs_are_pooled_as_the_folder_says(folders: Path):
    from shiradelta.models.loading import load_tokenizer

    tokenizer = load_tokenizer(folders / "encoder")
    model = BertModel.from_pretrained(folders / "encoder").eval()
    rows = [["w1 w2 w3", "w4 w5"], ["w6", "w7 w8 w9"]]
    one, other = (
        torch.nn.functional.normalize(
            model(**tokenizer(side, return_tensors="pt", padding=True)).last_hidden_state[:, 0]
        )
        for side in rows
    )
    entropy, labels = torch.nn.functional.cross_entropy, torch.arange(2)
    alike = one @ other.T / 0.05
    pairs = training_examples(
        ExampleSet(PAIRS, [[*row] for row in zip(*rows, strict=True)]), tokenizer, model, 16, "cls"
    )
    expected = (entropy(alike, labels) + entropy(alike.T, labels)) / 2
    torch.testing.assert_close(pairs.loss(model, [0, 1]), expected)


def test_layers_on_several_devices_are_trained_as_on_one(folders: Path, tmp_path: Path):
    texts, told, found = write(tmp_path / "data.jsonl", "text"), [], []
    settings = replace(SETTINGS, steps=6, mask="grad")
    for device in ("cpu", "cpu,cpu"):
        found.append(run(folders / "causal", texts, tmp_path / f"{device}.shd", settings, device, log=told.append))
    assert found[0].history == found[1].history
    assert (tmp_path / "cpu.shd").read_bytes() == (tmp_path / "cpu,cpu.shd").read_bytes()
    assert "examples, cpu and cpu; pruned" in told[-1]
