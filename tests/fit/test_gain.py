"""How much of the fine-tune's gain is kept, and what is said where it is nothing, or less."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import shiradelta
from shiradelta.cli import main
from shiradelta.fit import Fit
from shiradelta.fit import run as run_module
from shiradelta.fit.gain import Evidence, Gain
from shiradelta.fit.losses import AGREEMENT, ANSWERS, LABELS, LIKELIHOOD, PARTNERS
from shiradelta.fit.training import FitTrainer
from shiradelta.text.batches import split
from tests.fit.test_fit import build, texts, write_tokenizer

#: Their second halves are to be said.
EXAMPLES = [
    {"prompt": " ".join(words[: len(words) // 2]), "completion": " ".join(words[len(words) // 2 :])}
    for words in map(str.split, texts())
]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_trained(tmp_path_factory.mktemp("gain"))


def write_trained(root: Path) -> tuple[Path, Path]:
    """A base, and a fine-tune that knows 40 of the texts better."""
    model = build("causal")
    model.save_pretrained(root / "base")
    write_tokenizer(root / "base")
    rows = [torch.tensor([[int(word[1:]) + 2 for word in text.split()]]) for text in texts()[:40]]
    optimizer = torch.optim.Adam([p for name, p in model.named_parameters() if "mlp" in name], 3e-3)
    for _ in range(2):
        for row in rows:
            optimizer.zero_grad()
            model(input_ids=row, labels=row).loss.backward()
            optimizer.step()
    model.save_pretrained(root / "tuned")
    return root / "base", root / "tuned"


def losses(known: list[float], noise: float = 0.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shared = torch.rand(200, generator=generator)
    names = ("base", "topk", "fitted", "tuned")
    return {
        name: shared + level + noise * torch.randn(200, generator=generator)
        for name, level in zip(names, known, strict=True)
    }


def test_the_share_and_its_standard_error():
    """The error is that of repetitions: examples differ, and yet their differences are known well."""
    found = Gain.of("nats", True, losses([3, 2.5, 2.1, 2]), torch.ones(200))
    assert found.shares["topk"].kept == pytest.approx(0.5)
    assert found.kept is not None
    assert found.kept.kept == pytest.approx(0.9)
    assert found.kept.error < 1e-6
    assert found.worse_than == ()
    rng, kept, errors = torch.Generator().manual_seed(1), [], []
    for _ in range(200):
        gains = 1 + 0.5 * torch.randn(100, generator=rng)
        left = 0.2 * torch.randn(100, generator=rng)
        rows = {"base": gains, "tuned": torch.zeros(100), "topk": gains, "fitted": 0.2 * gains + left}
        share = Gain.of("nats", True, rows, torch.ones(100)).kept
        assert share is not None
        kept.append(share.kept)
        errors.append(share.error)
    assert np.mean(kept) == pytest.approx(0.8, abs=0.01)
    assert np.mean(errors) == pytest.approx(np.std(kept), rel=0.15)


def test_means_are_by_weight():
    rows = {state: torch.tensor([4.0, 2.0]) for state in ("base", "topk", "fitted", "tuned")}
    assert Gain.of("nats", True, rows, torch.tensor([2.0, 4.0])).losses["base"] == 1


@pytest.mark.parametrize(
    ("levels", "noise", "worse", "gains"),
    [
        ([3, 2.5, 2.7, 2], 0.1, ("topk",), True),
        ([3, 3.5, 3.2, 2], 0.1, ("base",), True),
        ([3, 2.5, 3.2, 2], 0.1, ("base", "topk"), True),
        ([3, 2.500, 2.501, 2], 0.1, (), True),  # no difference that is known
        ([3, 3, 3, 3.01], 0.1, (), False),
        ([3, 3, 3, 2.999], 0.1, (), False),
    ],
)
def test_what_is_worse_and_what_gains_nothing(levels: list[float], noise: float, worse: tuple[str, ...], gains: bool):
    found = Gain.of("nats", True, losses(levels, noise), torch.ones(200))
    assert found.worse_than == worse
    assert (found.kept is not None) is gains
    if not gains:
        assert "gains nothing on 200 examples held out (nats: " in found.metadata["gain_kept"]


@pytest.mark.parametrize("loss", [AGREEMENT, ANSWERS, LABELS])
def test_losses_without_labels_tell_how_far_the_fine_tune_is(loss: Any):
    torch.manual_seed(0)
    tuned = torch.randn(40, 8)
    found = loss.of({"tuned": tuned, "near": tuned + 0.1 * torch.randn(40, 8), "far": torch.randn(40, 8)})
    assert float(found["tuned"].abs().max()) < 1e-6
    assert 0 < found["near"].mean() < found["far"].mean()
    assert not loss.is_own


def test_partners_are_found_among_all_held_out():
    torch.manual_seed(0)
    one = torch.nn.functional.normalize(torch.randn(12, 8))
    found = PARTNERS.of({"same": torch.cat([one, one], 1), "other": torch.cat([one, one.roll(1, 0)], 1)})
    assert found["same"].mean() < 0.5 < found["other"].mean()
    alike = one @ one.T / 0.05
    expected = torch.nn.functional.cross_entropy(alike, torch.arange(12), reduction="none")
    torch.testing.assert_close(found["same"], expected)


def fit(tuned: tuple[Path, Path], out: Path, examples: Any = EXAMPLES, sparsity: float = 0.1, **settings: Any) -> Any:
    fitting = Fit(examples, method="refit", batch=16, held_out=24, device="cpu", tokens=32, **settings)
    return shiradelta.convert(tuned[1], out, sparsity, tuned[0], fit=fitting)


def loss_of(folder: Path, indices: list[int]) -> float:
    """Nats per token of the completions."""
    tokenizer, model = PreTrainedTokenizerFast.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    total, count = 0.0, 0
    for index in indices:
        prompt, completion = EXAMPLES[index].values()
        ids = tokenizer(f"{prompt} {completion}", return_tensors="pt").input_ids
        labels = ids.clone()
        labels[0, : len(prompt.split())] = -100
        with torch.no_grad():
            number = len(completion.split())
            total += number * float(model.eval()(input_ids=ids, labels=labels).loss)
            count += number
    return total / count


@pytest.mark.slow
@pytest.mark.parametrize("streams", [True, False])
def test_the_losses_are_those_of_completions(
    streams: bool, tuned: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if not streams:
        method = run_module.METHODS.find("refit")
        monkeypatch.setattr(run_module.METHODS, "find", lambda name: replace(method, streamed=None))
    report = fit(tuned, tmp_path / "a.shd")
    shiradelta.apply(tuned[0], tmp_path / "a.shd", out=tmp_path / "patched")
    write_tokenizer(tmp_path / "patched")
    write_tokenizer(tuned[1])
    held_out = split(120, 24, 0)[1]
    gain = report.fit.gain
    folders = {"base": tuned[0], "tuned": tuned[1], "fitted": tmp_path / "patched"}
    for state, folder in folders.items():
        assert gain.losses[state] == pytest.approx(loss_of(folder, held_out), rel=1e-3)


@pytest.mark.slow
def test_the_figures_are_in_the_report_the_file_and_what_is_printed(tuned: tuple[Path, Path], tmp_path: Path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts()[:40] * 2))
    arguments = ["convert", tuned[1], "--base", tuned[0], "--sparsity", "0.3", "--fit", tmp_path / "a.jsonl"]
    options = ["--fit-method", "refit", "--fit-batch", "16", "-o", tmp_path / "a.shd"]
    words = [str(word) for word in arguments + options]
    printed = CliRunner().invoke(main, words)
    assert printed.exit_code == 0, printed.output
    assert "loss, 16 examples held out" in printed.stdout
    assert "share of the fine-tune's gain" in printed.stdout
    with shiradelta.open_delta(tmp_path / "a.shd") as delta:
        assert "(standard error " in delta.metadata["gain_kept"]
        assert float(delta.metadata["loss_tuned"]) < float(delta.metadata["loss"]) < float(delta.metadata["loss_base"])
    assert "gain_kept: " in CliRunner().invoke(main, ["info", str(tmp_path / "a.shd")]).stdout
    told = json.loads(CliRunner().invoke(main, [*words, "--json"]).stdout)
    assert set(told["fit"]["gain"]["losses"]) == {"base", "topk", "fitted", "tuned"}
    assert told["worse"] is None


@pytest.mark.slow
def test_a_fine_tune_that_gains_nothing_has_no_share(tuned: tuple[Path, Path], tmp_path: Path):
    report = fit((tuned[1], tuned[0]), tmp_path / "a.shd", examples=texts()[:40] * 2)
    assert report.fit.gain.kept is None
    assert any("the fine-tune gains nothing on 16 examples" in line for line in report.warnings)


def test_texts_of_one_token_tell_no_gain():
    behaviour = SimpleNamespace(example_loss=LIKELIHOOD, evidence=lambda part, outputs: torch.zeros(len(part), 2))
    evidence = Evidence(cast(Any, behaviour))
    for state in ("base", "topk", "fitted", "tuned"):
        evidence.add(state, [0, 1], [])
    assert evidence.gain() is None


@pytest.mark.slow
def test_a_result_that_is_worse_is_said_first(
    tuned: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The file is there, so that it can be looked at."""

    def ruin(self: FitTrainer, *others: Any) -> None:
        torch.manual_seed(0)
        self._nonzeros.values = [100 * torch.randn_like(values) for values in self._nonzeros.values]
        self.write()

    monkeypatch.setattr(FitTrainer, "run", ruin)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(one) + "\n" for one in 8 * EXAMPLES))
    arguments = ["convert", tuned[1], "--base", tuned[0], "--sparsity", "0.1", "--fit", tmp_path / "a.jsonl"]
    options = ["--fit-steps", "1", "--fit-mask", "magnitude", "--fit-batch", "16", "-o", tmp_path / "a.shd"]
    words = [str(word) for word in arguments + options]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 1
    assert "; worse than the base or top-k, see above" in " ".join(result.stdout.split())
    first = next(line for line in result.stderr.splitlines() if ": " in line and not line.startswith("fitting"))
    assert first.startswith("worse: the result (")
    assert "is worse than plain top-k" in first
    assert (tmp_path / "a.shd").exists()
    assert CliRunner().invoke(main, [*words, "--accept-worse"]).exit_code == 0
    told = json.loads(CliRunner().invoke(main, [*words, "--json"]).stdout)
    assert "worse than plain top-k" in told["worse"]
