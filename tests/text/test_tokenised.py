"""Which tokens count: those that the model is to say, in training as in fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from shiradelta.errors import SourceError
from shiradelta.fit.text_behaviour import TextBehaviour
from shiradelta.models.loading import load_tokenizer
from shiradelta.text.conversation import rendered
from shiradelta.text.examples import training_examples
from shiradelta.text.kinds import COMPLETION, MESSAGES, PAIRS, TEXT
from shiradelta.text.read import ExampleSet
from shiradelta.text.tokenised import TokenisedExamples
from tests.fit.test_fit import build, write_tokenizer

#: A template that leaves reasoning out of turns that others follow, as those of reasoning models do.
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} : {% if m.role == 'assistant' and loop.last %}w50 {% endif %}{{ m.content }}"
    " w59 \n{% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)
PROMPTED = ExampleSet(COMPLETION, [["w1 w2 w3", "w4 w5"], ["w6", "w7 w8 w9 w10"]])
TALK = [("user", "w1 w2"), ("assistant", "w3"), ("user", "w4"), ("assistant", "w5 w6")]
TALKS = ExampleSet(MESSAGES, [[[{"role": role, "content": text} for role, text in TALK]]] * 2)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    write_tokenizer(tmp_path)
    found = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    found.chat_template = TEMPLATE
    return found


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build("causal").eval()


def said(found: TokenisedExamples, tokenizer: Any) -> list[str]:
    assert found.weights is not None
    return tokenizer.convert_ids_to_tokens(found.table.ids[found.weights == 1])


def test_what_the_model_is_to_say(tokenizer: Any, model: nn.Module):
    found = TokenisedExamples(PROMPTED, tokenizer, model, 16)
    assert said(found, tokenizer) == ["w4", "w5", "w7", "w8", "w9", "w10"]
    found = TokenisedExamples(TALKS, tokenizer, model, 64, prompt_share=0.25)
    assert said(found, tokenizer) == ["w3", "w59", "w50", "w5", "w6", "w59"] * 2
    assert found.weights is not None
    assert set(found.weights.tolist()) == {0.25, 1}
    assert TokenisedExamples(TALKS, tokenizer, model, 64, prompt_share=1).weights is None


def test_completions_end_as_texts_do(tokenizer: Any, model: nn.Module):
    tokenizer.eos_token = "w0"
    found = TokenisedExamples(PROMPTED, tokenizer, model, 6)
    assert said(found, tokenizer) == ["w4", "w5", "w0", "w7", "w8", "w9", "w10", "w0"]
    assert found.lengths == [6, 6]


def test_a_completion_never_follows_a_prompt_that_is_cut(tokenizer: Any, model: nn.Module):
    """Where the tokenizer ends every text, as Llama's may."""
    tokenizer.eos_token = "w0"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A w0", special_tokens=[("w0", tokenizer.eos_token_id)]
    )
    assert tokenizer("w1")["input_ids"][1:] == [tokenizer.eos_token_id]
    found = TokenisedExamples(PROMPTED, tokenizer, model, 4)
    assert said(found, tokenizer) == ["w4", "w7", "w8", "w9"]
    with pytest.raises(SourceError, match="example 1 has nothing to predict within 3 tokens"):
        TokenisedExamples(PROMPTED, tokenizer, model, 3)


def test_what_cannot_be_predicted_is_refused(tokenizer: Any, model: nn.Module):
    with pytest.raises(SourceError, match=r"example 1 has nothing to predict within 3 tokens; .* a larger --tokens"):
        TokenisedExamples(PROMPTED, tokenizer, model, 3)
    tokenizer.model_max_length = 3  # more tokens would not help
    with pytest.raises(SourceError, match=r"nothing to predict within 3 tokens; .*shorten its prompt: the model or"):
        TokenisedExamples(PROMPTED, tokenizer, model, 64)
    tokenizer.chat_template = None
    with pytest.raises(SourceError, match="the tokenizer has no chat template"):
        TokenisedExamples(TALKS, tokenizer, model, 64)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "does not take it .roles must alternate"),
        ("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}", "begins this turn otherwise"),
        ("{% for m in messages %}{% if loop.last %}{{ m.content }}{% endif %}x{% endfor %}", "message 2"),
    ],
)
def test_templates_that_hide_where_a_turn_is_are_refused(template: str, message: str, tokenizer: Any):
    tokenizer.chat_template = template
    with pytest.raises(SourceError, match=message):
        rendered(TALKS.rows[0][0], tokenizer, "example 1")


def entropies(model: nn.Module, ids: list[int]) -> Tensor:
    """Of each token but the first."""
    logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
    return nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_training_counts_prompts_by_their_share(share: float, tokenizer: Any, model: nn.Module):
    examples = training_examples(PROMPTED, tokenizer, model, 16, prompt_share=share)
    losses, weights = [], []
    for prompt, completion in PROMPTED.rows:
        losses.append(entropies(model, tokenizer(f"{prompt} {completion}")["input_ids"]))
        before = len(prompt.split()) - 1
        weights.append(torch.tensor([share] * before + [1.0] * len(completion.split())))
    expected = (torch.cat(losses) * torch.cat(weights)).sum() / torch.cat(weights).sum()
    torch.testing.assert_close(examples.loss(model, [0, 1]), expected)


@pytest.mark.parametrize("share", [0, 0.5])
def test_fits_count_prompts_by_their_share(share: float, tokenizer: Any, model: nn.Module):
    """In every term of the loss and in every measure."""
    found = TextBehaviour(tokenizer, PROMPTED, model, 16, prompt_share=share)
    other = build("causal").eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        student, teacher = found.outputs(model, [1, 0]), found.outputs(other, [1, 0])
        terms = found.differences([1, 0], student, teacher)
        measured = found.compare([1, 0], student, teacher)
        weights, kl, equal, lost, hidden = [], [], [], [], []
        for prompt, completion in reversed(PROMPTED.rows):
            ids = tokenizer(f"{prompt} {completion}")["input_ids"]
            own, theirs = (one(input_ids=torch.tensor([ids]), output_hidden_states=True) for one in (model, other))
            s, t = own.logits[0, :-1], theirs.logits[0, :-1]
            a, b = own.hidden_states[1][0, :-1], theirs.hidden_states[1][0, :-1]
            weights.append(torch.tensor([share] * (len(prompt.split()) - 1) + [1.0] * len(completion.split())))
            kl.append((t.softmax(-1) * (t.log_softmax(-1) - s.log_softmax(-1))).sum(-1))
            equal.append((s.argmax(-1) == t.argmax(-1)).float())
            lost.append(entropies(model, ids) - entropies(other, ids))
            hidden.append((a - b).square().sum(-1))
    weight = torch.cat(weights)

    def mean(parts: list[Tensor]) -> float:
        return float((torch.cat(parts) * weight).sum() / weight.sum())

    assert float(terms[-1]) == pytest.approx(mean(kl), rel=1e-4)
    assert float(terms[0]) == pytest.approx(mean(hidden), rel=1e-4)
    assert measured["distance"] == pytest.approx(mean(kl), rel=1e-4)
    assert measured["share of equal answers"] == pytest.approx(mean(equal), rel=1e-4)
    assert measured["likelihood lost on the texts, nats"] == pytest.approx(mean(lost), rel=1e-4)
    assert len(student[-1]) == int((weight > 0).sum())


def test_what_has_no_prompts_has_no_share_of_them(tokenizer: Any, model: nn.Module):
    with pytest.raises(SourceError, match="examples with text have no prompts; leave the prompt share out"):
        TextBehaviour(tokenizer, ExampleSet(TEXT, [["w1 w2"]]), model, 16, prompt_share=0.5)


def test_a_pair_is_two_texts(tokenizer: Any):
    encoder = build("encoder").eval()
    pairs = ExampleSet(PAIRS, [["w1 w2 w3", "w4"], ["w5", "w6 w7"], ["w8", "w9"]])
    found = TextBehaviour(tokenizer, pairs, encoder, 16, "mean")
    assert found.lengths == [3, 2, 1]
    with torch.no_grad():
        together = found.outputs(encoder, [0, 2])[-1]
        alone = [found.outputs(encoder, [index])[-1] for index in (0, 2)]
    torch.testing.assert_close(
        together, torch.stack([one[side] for side in (0, 1) for one in alone]), atol=1e-5, rtol=1e-4
    )


def test_examples_have_to_suit_the_model(tokenizer: Any, model: nn.Module):
    with pytest.raises(
        SourceError, match="LlamaForCausalLM predicts the next token, so examples with anchor and positive do not suit"
    ):
        TextBehaviour(tokenizer, ExampleSet(PAIRS, [["w1", "w2"]]), model, 16)
    with pytest.raises(
        SourceError, match="BertModel predicts no next token, so examples with prompt and completion do not"
    ):
        TextBehaviour(tokenizer, PROMPTED, build("encoder"), 16)


def test_a_tokenizer_loaded_from_a_folder_brings_its_template(tokenizer: Any, tmp_path: Path, model: nn.Module):
    tokenizer.save_pretrained(tmp_path)
    found = TokenisedExamples(TALKS, load_tokenizer(tmp_path), model, 64)
    assert said(found, tokenizer)[:2] == ["w3", "w59"]
