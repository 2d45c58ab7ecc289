"""Tensor names: finding those of a delta or a fine-tune in a model, and what a name says about its tensor.

The exact name comes first.  Names that are missing are found a group at a time, by one prefix in place of another: the
vision half of a model may get another prefix than its language half.  A module of sentence-transformers' is called by
its folder on disk (`2_Dense/`) and by its number in memory (`2.`).  `shiradelta.models.library` goes on where a
library renames, stacks or ties tensors on loading.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import nsmallest
from itertools import islice
from typing import TypeVar

from shiradelta.util.text import count

Shape = tuple[int, ...]
#: Names with their shapes; None where a shape is unknown.
Named = Mapping[str, Shape | None]
ResultT = TypeVar("ResultT")

_NUMBER = re.compile(r"\d+")
#: Parts of names that only wrap a model.
_WRAPPERS = frozenset({"model", "base_model", "auto_model", "module"})
#: The folder of a module of sentence-transformers'.
_FOLDER = re.compile(r"(\d+)_\w+/")
#: Ends of names in old checkpoints, which transformers renames on loading -> those of today.
_TODAY = {
    "LayerNorm.gamma": "LayerNorm.weight",
    "LayerNorm.beta": "LayerNorm.bias",
    ".weight_g": ".parametrizations.weight.original0",
    ".weight_v": ".parametrizations.weight.original1",
}
#: Parts of a name that may be its prefix; models have a dozen.
_MOST_PARTS = 32
#: Comparisons of names in one search, some seconds.
_MOST_COMPARED = 1 << 20
#: Names that a message lists.
_NAMED = 4


@dataclass
class Found:
    """The result of a search for names.

    Attributes:
        names: wanted name -> existing name.
        unclear: wanted name -> why it cannot be told which tensor it is.
    """

    names: dict[str, str] = field(default_factory=dict)
    unclear: dict[str, str] = field(default_factory=dict)


def find_names(wanted: Named, have: Named, same: Mapping[str, Hashable] | None = None) -> Found:
    """Finds names among others: as they are, or with another prefix (`bert.encoder` for `encoder`).

    A prefix is replaced for a group of names, all that begin with it, if exactly one other prefix finds most of them.
    Prefixes with different numbers never replace each other.  One that is not only lengthened or shortened has to lead
    to numbered layers, and to have all words of the other, or the other all of its: an encoder is no decoder.  Names of
    other shapes than wanted do not count, but are found along with their group.

    Args:
        wanted: the names to find; the dimensions of their shapes may be in any order.
        have: the names that exist.
        same: existing name -> a mark that all names of one tensor share; names without one are of different tensors.
    """
    found = Found({name: name for name in wanted if name in have})
    ours = _todays(name for name in wanted if name not in found.names)
    if ours:
        theirs = _todays(name for name in have if name not in found.names)
        marks = {now: (same or {}).get(name, name) for now, name in theirs.items()}
        rest = _find_today(
            {now: wanted[name] for now, name in ours.items()}, {now: have[name] for now, name in theirs.items()}, marks
        )
        found.names |= {ours[now]: theirs[other] for now, other in rest.names.items()}
        found.unclear = {ours[now]: why for now, why in rest.unclear.items()}
    return found


def _todays(names: Iterable[str]) -> dict[str, str]:
    """Today's spelling of names -> the names; one that is there in both keeps its own."""
    found = {name: name for name in names}
    for old in [name for name in found if name.endswith(tuple(_TODAY))]:
        end = next(end for end in _TODAY if old.endswith(end))
        now = old.removesuffix(end) + _TODAY[end]
        if now not in found:
            found[now] = found.pop(old)
    return found


def _find_today(wanted: Named, have: Named, same: Mapping[str, Hashable]) -> Found:
    """As `find_names`, for names as they are spelt today."""
    found = Found({name: name for name in wanted if name in have})
    missing = [name for name in wanted if name not in found.names]
    if missing:
        _Search(wanted, have, found, same).group("", missing)
        _refuse_repeated(found, missing)
    return found


def search_the_rest(
    wanted: Named,
    search: Callable[[Named], tuple[ResultT, Collection[str]]],
    may_lack: Callable[[str], bool],
) -> ResultT:
    """Searches for names; then again without those that were not found and may be lacking.

    A name that the user leaves out may have been what made others unclear.

    Args:
        wanted: the names to find, with shapes.
        search: names -> (the result, the names that it lacks).
        may_lack: whether the user allows that a name is lacking.
    """
    while True:
        result, lacking = search(wanted)
        left_out = set(filter(may_lack, lacking))
        if not left_out or len(left_out) == len(lacking):
            return result
        wanted = {name: shape for name, shape in wanted.items() if name not in left_out}


def _refuse_repeated(found: Found, renamed: Iterable[str]) -> None:
    """Makes names unclear of which several were found under one new name."""
    first: dict[str, str] = {}
    for name in [name for name in renamed if name in found.names]:
        other = first.setdefault(found.names[name], name)
        if other != name:
            why = f"{other!r} and {name!r} may both be {found.names[name]!r}"
            found.unclear |= {other: why, name: why}
    for name in found.unclear:
        found.names.pop(name, None)


class _Search:
    """A search for missing names, group by group."""

    def __init__(self, wanted: Named, have: Named, found: Found, same: Mapping[str, Hashable]) -> None:
        self._wanted, self._found, self._same = wanted, found, same
        self._free = {name: shape for name, shape in have.items() if name not in found.names}
        self._left = _MOST_COMPARED
        self._prefixes: dict[str, list[str]] = {}  # tail of an existing name -> what stands before it
        #: The same where numbered layers follow: (tail, numbers before it) -> what stands before it
        self._numbered: dict[tuple[str, tuple[str, ...]], list[str]] = {}
        for name in self._free:
            numbers = _numbers(name)
            for head, tail in _tails(name):
                self._prefixes.setdefault(tail, []).append(head)
                before = _numbers(head)
                if len(before) < len(numbers):
                    self._numbered.setdefault((tail, before), []).append(head)
        self._folders = {cut.group() for cut in map(_FOLDER.match, self._free) if cut}

    @property
    def given_up(self) -> bool:
        """Whether the names cannot be compared in some seconds."""
        return self._left < 0

    def group(self, prefix: str, names: Sequence[str]) -> None:
        """Finds names that begin with a prefix: all by one other prefix if that is possible, else in smaller groups."""
        hits = self._hits(prefix, names)
        if self.given_up:
            self._found.unclear |= {name: f"{name!r} may be any of too many tensors" for name in names}
            return
        most = max(hits.values(), key=len, default=set())
        if most and all(some <= most for some in hits.values()):
            cut = len(prefix)
            tensors: dict[tuple[Hashable, ...], str] = {}  # prefixes of the same tensors count once
            for other, found in hits.items():
                if found == most:
                    ends = [other + name[cut:] for name in sorted(most)]
                    tensors.setdefault(tuple(self._same.get(end, end) for end in ends), other)
            best = list(tensors.values())
            for name in names:
                fits = [other + name[cut:] for other in best if other + name[cut:] in self._free]
                if len(best) == 1 and fits:
                    self._found.names[name] = fits[0]
                elif name in most:
                    self._found.unclear[name] = f"{name!r} may be {_either(fits)}"
            names = [name for name in names if name not in self._found.names and name not in self._found.unclear]
        if len(re.findall("[./]", prefix)) < _MOST_PARTS:
            for longer, some in _by_next_part(prefix, names).items():
                self.group(longer, some)

    def _hits(self, prefix: str, names: Sequence[str]) -> dict[str, set[str]]:
        """Other prefix -> the names whose tensors it finds."""
        others: dict[str, None] = {folder: None for folder in self._folders if _child(folder) == prefix}
        if (child := _child(prefix)) is not None:
            others[child] = None
        numbers = _numbers(prefix)
        for name in names:
            tail = name[len(prefix) :]
            longer = self._prefixes.get(name, ())
            # The tail of every layer's `weight` says nothing.
            beside = self._numbered.get((tail, numbers), ())
            self._left -= len(longer) + len(beside)
            if self._left < 0:
                return {}
            others |= dict.fromkeys(head + prefix for head in longer)
            others |= {rest: None for _, rest in _tails(prefix) if rest + tail in self._free}
            others |= {"": None} if tail in self._free else {}
            others |= dict.fromkeys(beside)
        others.pop(prefix, None)
        self._left -= len(others) * len(names)
        if self._left < 0:
            return {}
        hits = {}
        for other in others:
            some = {name for name in names if self._fits(name, other + name[len(prefix) :])}
            if some and _may_replace(prefix, other, any(_NUMBER.search(name, len(prefix)) for name in some)):
                hits[other] = some
        return hits

    def _fits(self, name: str, other: str) -> bool:
        if other not in self._free:
            return False
        wanted, have = self._wanted[name], self._free[other]
        return wanted is None or have is None or sorted(wanted) == sorted(have)


def _either(names: Sequence[str]) -> str:
    """The first few of some names, for a message."""
    more = f" or {count(len(names) - _NAMED, 'other')}" if len(names) > _NAMED else ""
    return " or ".join(map(repr, nsmallest(_NAMED, names))) + more


def _may_replace(prefix: str, other: str, numbered: bool) -> bool:
    """Whether one prefix may stand for another; `numbered` says that they lead to numbered layers."""
    longer, shorter = (prefix, other) if len(prefix) > len(other) else (other, prefix)
    if _child(longer) == shorter:
        return True
    more = longer.removesuffix(shorter)
    if longer.endswith(shorter) and more[-1:] in ("", ".", "/"):
        return numbered or not _NUMBER.search(more)
    return numbered and _numbers(prefix) == _numbers(other) and _same_part(prefix, other)


def _same_part(prefix: str, other: str) -> bool:
    """Whether two prefixes may mean the same part of a model: one has all words of the other, in any order.

    `language_model.model` may be `model.language_model`; an encoder is no decoder, and text is not vision.
    """
    one, two = (Counter(word for word in re.split("[./]", name) if word not in _WRAPPERS) for name in (prefix, other))
    one, two = (Counter({word: n for word, n in words.items() if not word.isdecimal()}) for words in (one, two))
    return one <= two or two <= one


def _numbers(prefix: str) -> tuple[str, ...]:
    return tuple(_NUMBER.findall(prefix))


def _child(prefix: str) -> str | None:
    """What a sentence-transformers module is called in memory, given its folder; None for another prefix."""
    folder = _FOLDER.fullmatch(prefix)
    return f"{folder[1]}." if folder else None


def _by_next_part(prefix: str, names: Iterable[str]) -> dict[str, list[str]]:
    """Names by their prefix with one more part; without those that have no more."""
    groups: dict[str, list[str]] = {}
    for name in names:
        cut = re.compile("[./]").search(name, len(prefix))
        if cut is not None:
            groups.setdefault(name[: cut.end()], []).append(name)
    return groups


def _tails(name: str) -> Iterator[tuple[str, str]]:
    """The name split in two, after each of its first separators."""
    cuts = islice(re.finditer("[./]", name), _MOST_PARTS)
    return ((name[: cut.end()], name[cut.end() :]) for cut in cuts)


def layer_of(name: str) -> str:
    """A tensor's name up to its first number, which counts layers ("model.layers.3"); all of it if there is none."""
    found = re.match(r".*?[._]\d+(?=[._])", name)
    return found.group() if found else name


def in_model_order(names: Iterable[str]) -> list[str]:
    """Sorted, with numbers by value: layer 2 comes before layer 10."""

    def key(name: str) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"[./]", name)]

    return sorted(names, key=key)
