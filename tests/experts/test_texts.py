"""Families for language models: losses of prompts, and the examples of their page."""

from __future__ import annotations

import json
import random
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoTokenizer

from shiradelta import experts
from shiradelta.cli import main
from shiradelta.errors import SourceError
from tests.fit.test_fit import WORDS, write_tokenizer
from tests.train.test_attach import llama

PAGE = Path(__file__).parents[2] / "docs" / "experts.md"


def rows(count: int) -> list[dict[str, str]]:
    """Two tasks, one after the other: the next words of the first half, or the words before of the second."""
    rng = random.Random(0)
    found = []
    for number in range(count):
        first, step = (rng.randrange(10), 1) if number % 2 == 0 else (rng.randrange(35, 45), -1)
        words = [WORDS[first + step * index] for index in range(6)]
        found.append({"prompt": " ".join(words[:4]), "completion": " ".join(words[4:])})
    return found


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_losses_are_those_of_the_completion_and_of_the_prompt_alone(tokenizer: Any):
    model = llama(vocab_size=100).eval()
    example = rows(1)[0]
    prompt, whole = (tokenizer(text)["input_ids"] for text in (example["prompt"], " ".join(example.values())))
    with torch.no_grad():
        logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    entropy = [-float(logits[at, token]) for at, token in enumerate(whole[1:])]
    found = experts.prompt_loss(tokenizer)(model, [example]).detach()
    assert float(found) == pytest.approx(sum(entropy[: len(prompt) - 1]) / (len(prompt) - 1), rel=1e-4)
    assert torch.equal(experts.prompt_loss(tokenizer)(model, [example["prompt"]]), found)
    said = entropy[len(prompt) - 1 :]
    found = experts.text_loss(tokenizer)(model, [example]).detach()
    assert float(found) == pytest.approx(sum(said) / len(said), rel=1e-4)


def test_examples_without_a_prompt_are_refused(tokenizer: Any):
    model = llama(vocab_size=100)
    with pytest.raises(SourceError, match="has no prompt to route by"):
        experts.prompt_loss(tokenizer)(model, [{"text": "a"}])
    with pytest.raises(SourceError, match="neither texts nor objects"):
        experts.text_loss(tokenizer)(model, [5])
    with pytest.raises(SourceError, match=f"prompt '{WORDS[0]}' has nothing to predict, .* give a longer prompt"):
        experts.prompt_loss(tokenizer)(model, [" ".join(WORDS[:3]), WORDS[0]])
    with pytest.raises(SourceError, match="give 2 tokens or more"):
        experts.prompt_loss(tokenizer, 1)(model, [" ".join(WORDS[:3])])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_examples_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    llama(vocab_size=100).save_pretrained("model")
    write_tokenizer(Path("model"))
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(60)))
    (shell,) = re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
    prompt = rows(1)[0]["prompt"]
    for line in shell.splitlines():
        given = [prompt if word == "a prompt" else word for word in shlex.split(line)[1:]]
        result = CliRunner().invoke(main, given)
        assert result.exit_code == 0, f"{line}\n{result.output}"
    scope: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for block in blocks:
        exec(compile(block, "experts.md", "exec"), scope)
    assert sorted(scope["strengths"]) == ["expert-0", "expert-1"]
    assert scope["logits"].shape[-1] == 100
    assert scope["router"].swap.active == {}


@pytest.mark.slow
def test_prompts_that_were_not_seen_go_to_the_expert_of_their_task(tokenizer: Any, tmp_path: Path):
    model, every, route = llama(vocab_size=100), rows(44), experts.prompt_loss(tokenizer)
    family = experts.train_family(
        model,
        every[:24],
        experts.text_loss(tokenizer),
        tmp_path / "family",
        prompt_loss=route,
        experts=2,
        groups=[number % 2 for number in range(24)],
        settings=experts.TrainSettings(sparsity=0.05, steps=16, batch=8, relative_lr=0.1, mask="rand"),
        dims=1024,
    )
    router = experts.ExpertRouter(model, family, route)
    cosines = router.cosines([row["prompt"] for row in every[24:]])
    assert cosines.argmax(1).tolist() == [0, 1] * 10
