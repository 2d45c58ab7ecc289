"""Parts of fitting by themselves: what is compared, what the teacher remembers, what is pruned, what a step gathers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import shiradelta
from shiradelta.errors import ArgumentError, SourceError
from shiradelta.fit import Fit, divergence, teacher
from shiradelta.fit.custom_behaviour import CustomBehaviour
from shiradelta.fit.fit_texts import FitTexts
from shiradelta.fit.teacher import Teacher
from shiradelta.fit.text_behaviour import TextBehaviour
from shiradelta.models import loading
from shiradelta.nonzeros.vector import Nonzeros
from shiradelta.text.read import of_texts
from tests.fit.test_fit import SETTINGS, build, texts, write_pair, write_tokenizer

pytestmark = pytest.mark.slow


def behaviour(model: nn.Module, folder: Path, pooling: str = "mean") -> TextBehaviour:
    write_tokenizer(folder)
    return TextBehaviour(loading.load_tokenizer(folder), of_texts(texts()), model, 16, pooling)


def alone(found: TextBehaviour, model: nn.Module, index: int) -> list[Tensor]:
    with torch.no_grad():
        return found.outputs(model, [index])


@pytest.mark.parametrize("kind", ["encoder", "classifier", "causal"])
def test_padding_changes_nothing(kind: str, tmp_path: Path):
    """Rows of a batch are those of each text by itself, text after text."""
    model = build(kind).eval()
    found = behaviour(model, tmp_path)
    with torch.no_grad():
        together = found.outputs(model, [5, 0, 9])
    parts = [alone(found, model, index) for index in (5, 0, 9)]
    for rows, *separate in zip(together, *parts, strict=True):
        torch.testing.assert_close(rows, torch.cat(separate), atol=1e-5, rtol=1e-4)
    tokens = sum(found.lengths[index] for index in (5, 0, 9))
    assert [len(rows) for rows in together] == [tokens, tokens, tokens if kind == "causal" else 3]


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "lasttoken"])
def test_embeddings_are_pooled_as_the_model_is_used(pooling: str, tmp_path: Path):
    model = build("encoder").eval()
    found = behaviour(model, tmp_path, pooling)
    with torch.no_grad():
        together = found.outputs(model, [3, 7])
    first = together[-2][: found.lengths[3]]
    expected = {"mean": first.mean(0), "cls": first[0], "max": first.amax(0), "lasttoken": first[-1]}[pooling]
    torch.testing.assert_close(together[-1][0], nn.functional.normalize(expected, dim=0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["encoder", "classifier", "causal"])
@pytest.mark.parametrize("remembers", [True, False])
def test_the_teacher_says_the_same_again(kind: str, remembers: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(teacher, "CACHE_BYTES", 1 << 30 if remembers else 0)
    model = build(kind).eval().requires_grad_(False)
    weight = next(p for p in model.parameters() if p.dim() == 2)
    found = behaviour(model, tmp_path)
    wise = Teacher(model, {weight: weight.data + 0.1}, found)
    before = weight.data.clone()
    first = [rows.clone() for rows in wise.outputs([4, 1, 2])]
    wise.outputs([8, 9])
    assert torch.equal(weight.data, before)
    weight.data.add_(1)  # the student has moved on
    again = wise.outputs([1, 8, 4])
    expected = [wise.outputs([index]) for index in (1, 8, 4)]
    for rows, *separate in zip(again, *expected, strict=True):
        torch.testing.assert_close(rows, torch.cat(separate), atol=1e-5, rtol=1e-4)
    assert len(first) == len(again)


@pytest.mark.parametrize("method", ["train", "refit"])
def test_a_model_in_bfloat16(method: str, tmp_path: Path):
    """As a GPU holds it; afterwards it is the base again, bit for bit."""
    base, tuned = write_pair("causal", tmp_path)
    for folder in (base, tuned):
        LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    settings = replace(SETTINGS, method=method, model=model)
    report = shiradelta.convert(tuned, tmp_path / "a.shd", base=base, sparsity=0.05, fit=settings)
    assert report.fit.fitted < 0.8 * report.fit.topk < report.fit.topk < report.fit.base
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_the_base_has_a_loss_of_one_in_the_mean(tmp_path: Path):
    model = build("encoder").eval()
    found = behaviour(model, tmp_path)
    other = build("encoder").eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        parts = [(part, found.outputs(model, part), found.outputs(other, part)) for part in ([0, 1, 2], [3, 4, 5])]
        with pytest.raises(SourceError, match="behaves like its base"):
            found.calibrate([(*parts[0][:2], parts[0][1])])
        found.calibrate(parts)
        losses = [float(found.loss(*part)) for part in parts]
        assert sum(losses) / 2 == pytest.approx(1, rel=1e-5)
        assert float(found.loss([0, 1, 2], parts[0][2], parts[0][2])) == 0


@pytest.mark.parametrize("kind", ["encoder", "causal"])
def test_gradients_of_matrices_and_vectors(kind: str):
    """Biases and norms, which are gathered together, and matrices, over two backward passes."""
    model = build(kind).eval().requires_grad_(False)
    names = [name for name, _ in model.named_parameters() if "layer" in name or "norm" in name]
    weights = [model.get_parameter(name) for name in names]
    assert {weight.dim() for weight in weights} == {1, 2}
    positions = [torch.randperm(w.numel())[: max(1, w.numel() // 3)].sort().values for w in weights]
    ids = torch.randint(2, 60, (3, 7))

    def backward() -> None:
        output = model(ids)
        rows = output.logits if kind == "causal" else output.last_hidden_state
        rows.sin().sum().backward()

    model.requires_grad_(True)
    backward()
    backward()
    pairs = zip(weights, positions, strict=True)
    expected = [torch.zeros(len(p)) if w.grad is None else w.grad.view(-1)[p] for w, p in pairs]
    model.zero_grad()
    model.requires_grad_(False)
    nonzeros = Nonzeros(weights, [torch.float32] * len(weights), positions)
    with nonzeros.attached(model):
        for _ in range(2):
            backward()
            nonzeros.collect()
    torch.testing.assert_close(nonzeros.grads, [torch.cat(expected)], atol=1e-5, rtol=1e-4)
    assert all(weight.grad is None and not weight.requires_grad for weight in weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk", [1, 40, 1 << 22])
def test_the_divergence_is_torchs_and_so_is_its_gradient(dtype: torch.dtype, chunk: int, monkeypatch):
    monkeypatch.setattr(divergence, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(11, 13, generator=generator) for _ in range(2))
    student, teacher = student.to(dtype).requires_grad_(), teacher.to(dtype)
    found = divergence.divergence(student, teacher)
    (mine,) = torch.autograd.grad(found * 3, student)
    shares = [logits.float().log_softmax(-1) for logits in (student, teacher)]
    expected = torch.nn.functional.kl_div(*shares, reduction="batchmean", log_target=True)
    (its,) = torch.autograd.grad(expected * 3, student)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(mine, its, atol=1e-6 if dtype == torch.float32 else 4e-3, rtol=1e-2)
    assert mine.dtype == dtype
    with torch.no_grad():
        assert float(divergence.divergence(teacher, teacher)) == 0


def test_padding_is_what_the_model_takes_for_it(tmp_path: Path):
    """A decoder's classifier looks for the last token before its padding, whatever the tokenizer pads with."""
    model = build("classifier").eval()
    model.config.pad_token_id = 63
    assert behaviour(model, tmp_path)._inputs.pad == 63


def test_labels_that_can_all_hold_have_their_own_divergence():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(5, 3, generator=generator), torch.randn(5, 3, generator=generator)
    of = [torch.distributions.Bernoulli(logits=logits.double()) for logits in (teacher, student)]
    expected = torch.distributions.kl_divergence(*of).sum(1)
    torch.testing.assert_close(divergence.divergence_of_labels(student, teacher), expected.float())
    shifted = divergence.divergence_of_labels(teacher + 1, teacher).mean()
    assert shifted > 0.1
    assert divergence.divergence(teacher + 1, teacher).abs() < 1e-6


def test_a_token_gets_its_share_of_the_probability(monkeypatch: pytest.MonkeyPatch):
    """Against the same said in probabilities, in whole and a few rows at a time; a share of none changes no bit."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(7, 11, generator=generator)
    tokens, shares = torch.randint(11, (7,), generator=generator), torch.tensor([0.1, 0, 0.3, 0.1, 0, 0.9, 0.1])
    own = nn.functional.one_hot(tokens, 11)
    expected = logits.softmax(1) * (1 - shares[:, None]) + own * shares[:, None]
    for chunk in (1 << 22, 22):
        monkeypatch.setattr(divergence, "CHUNK", chunk)
        blended = logits.clone()
        divergence.blend(blended, tokens, shares)
        torch.testing.assert_close(blended.softmax(1), expected)
        changed = (blended != logits).any(1)
        assert torch.equal(changed, shares > 0)
        others = own == 0
        assert torch.equal(blended[others], logits[others])
    impossible = logits.scatter(1, tokens[:, None], -torch.inf)
    blended = impossible.clone()
    divergence.blend(blended, tokens, shares)
    assert torch.equal(blended, impossible)


def test_a_row_is_followed_by_the_next_token_of_its_own_text(tmp_path: Path):
    found = behaviour(build("causal").eval(), tmp_path)
    ids = loading.load_tokenizer(tmp_path)(texts(), truncation=True, max_length=16)["input_ids"]
    tokens, there = found._following([5, 0, 9], torch.device("cpu"))
    rows = iter(zip(tokens.tolist(), there.tolist(), strict=True))
    for index in (5, 0, 9):
        for following in ids[index][1:]:
            assert next(rows) == (following, 1)
        assert next(rows)[1] == 0
    assert next(rows, None) is None


def test_texts_count_as_far_as_the_fine_tune_knows_them(tmp_path: Path):
    """A fine-tune to these texts has them in its target; one away from them has not, nor has anything but an LM."""
    model = build("causal").eval()
    found = behaviour(model, tmp_path)
    other = build("causal").eval()
    optimizer = torch.optim.Adam(other.parameters(), 1e-2)
    indices = list(range(12))
    tokens, there = found._following(indices, torch.device("cpu"))
    before = found.outputs(other, indices)[-1].detach()
    for _ in range(5):
        logits = found.outputs(other, indices)[-1]
        (nn.functional.cross_entropy(logits, tokens, reduction="none") * there).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        base, tuned = found.outputs(model, indices), found.outputs(other, indices)
    assert not torch.equal(before, tuned[-1])
    assert found.lost(indices, base, tuned) > 0 == found.lost(indices, tuned, tuned)
    for share, (student, wise), blended in [
        (0.1, (base, tuned), True),
        (0.1, (tuned, base), False),
        (0, (base, tuned), False),
    ]:
        fresh = TextBehaviour(loading.load_tokenizer(tmp_path), of_texts(texts()), model, 16, text_share=share)
        fresh.outputs(model, indices)
        fresh.calibrate([(indices, student, wise)])
        target = fresh.target([rows.clone() for rows in wise], indices)
        likelihoods = [divergence.log_likelihoods(rows[-1], tokens) * there for rows in (wise, target)]
        assert bool((likelihoods[1] > likelihoods[0])[there > 0].all()) is blended
        assert torch.equal(target[-1], wise[-1]) is not blended


@pytest.mark.parametrize(
    ("kind", "pooling", "last"),
    [("causal", None, 1), ("classifier", None, 1), ("encoder", "mean", 1), ("encoder", None, 0.5)],
)
def test_hidden_states_guide_and_the_output_counts_in_the_end(
    kind: str, pooling: str | None, last: float, tmp_path: Path
):
    """But for an encoder of which nobody says what it is used for."""
    model = build(kind).eval()
    write_tokenizer(tmp_path)
    found = TextBehaviour(loading.load_tokenizer(tmp_path), of_texts(texts()), model, 16, pooling)
    other = build(kind).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        base, tuned = found.outputs(model, [0, 1]), found.outputs(other, [0, 1])
        found.calibrate([([0, 1], base, tuned)])
        assert (found.weight(0), found.weight(1)) == (0.5, last)
        astray = [*(rows + 1 for rows in tuned[:-1]), tuned[-1]]
        assert float(found.loss([0, 1], astray, tuned)) > 0
        assert (float(found.loss([0, 1], astray, tuned, found.weight(1))) == 0) is (last == 1)


@pytest.mark.parametrize("given", [None, [], 3.0, ["logits"], {"logits": torch.ones(2)}])
def test_a_forward_that_gives_no_tensors_is_refused(given: Any):
    found = CustomBehaviour([1, 2], lambda model, examples: given, None)
    with pytest.raises(ArgumentError, match=f"^forward gave {type(given).__name__}; let it return a tensor"):
        found.outputs(nn.Identity(), [0])


@pytest.mark.parametrize(("given", "what"), [(0.5, "float"), (None, "NoneType"), (torch.ones(3), r"shape \[3\]")])
def test_a_loss_that_gives_no_single_number_is_refused(given: Any, what: str):
    found = CustomBehaviour([1, 2], lambda model, examples: torch.ones(1), lambda student, teacher: given)
    with pytest.raises(ArgumentError, match=f"^loss gave {what}; let it return a tensor with one number"):
        found.differences([0], [torch.ones(1)], [torch.ones(1)])


def test_a_loss_may_have_dimensions():
    found = CustomBehaviour([1], lambda model, examples: torch.ones(1), lambda student, teacher: torch.ones(1, 1))
    assert found.differences([0], [torch.ones(1)], [torch.ones(1)])[0].shape == ()


@pytest.mark.parametrize(
    ("count", "batch", "micro"), [(300, 128, None), (100, 128, None), (90, 16, None), (2_000, 32, 8)]
)
def test_least_squares_take_as_many_examples_as_eight_batches_have(count: int, batch: int, micro: int | None):
    settings = Fit([f"w{number % 60}" for number in range(count)], batch=batch, micro=micro)
    found = FitTexts(settings)
    sizes = [len(part) for part in found.calibration([1] * count)]
    assert sum(sizes) == min(8 * batch, len(found.train))
    assert max(sizes) <= settings.per_pass
