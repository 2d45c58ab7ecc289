"""PEFT's patterns of module names (rank_pattern, alpha_pattern), matched in linear time.

The patterns are regular expressions from a stranger's file, and `re` may take years for one.  Plain names, the usual
case, are looked up.  Others become an automaton (Thompson's construction, its states' sets remembered), which decides
the same as `re` does but never goes back.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from shiradelta.errors import SourceError
from shiradelta.util.text import brief

#: A longer pattern, or one that expands to more states, is refused.
_MOST_CHARACTERS = _MOST_STATES = 2000
#: Steps that all patterns of a file may take together: a few seconds.
_MOST_STEPS = 1 << 23
#: Characters that stand for themselves, and a dot, which stands for any.
_PLAIN = re.compile(r"(?:[\w/ -]|\\?\.)+")
_COUNTS = re.compile(r"\{(?P<least>\d*)(?P<comma>,?)(?P<most>\d*)\}")
_GROUP = re.compile(r"\((?:\?:|\?P<\w+>|(?!\?))")

#: Whether one character matches, or whether a position between characters does.
_Test = Callable[[str], object]
_Place = Callable[[str, int], bool]


class PatternTable:
    """Values by pattern.  A module has the value of the first pattern that matches the end of its name: PEFT's rule.

    Args:
        patterns: pattern -> value.
        where: what the patterns are, for messages: a file and a key in it.

    Raises:
        SourceError: one is not a regular expression, or of a kind that takes more than linear time.
    """

    def __init__(self, patterns: Mapping[str, Any], where: str) -> None:
        self._where, self._steps = where, 0
        self._values = list(patterns.values())
        self._known: dict[str, int | None] = {}
        #: (length, where dots are) -> name with "." there -> number of the pattern
        self._plain: dict[tuple[int, tuple[int, ...]], dict[str, int]] = {}
        self._others: list[tuple[int, _Automaton]] = []
        for number, pattern in enumerate(patterns):
            if _PLAIN.fullmatch(pattern):
                name, wild = _plain(pattern)
                self._plain.setdefault((len(name), wild), {}).setdefault(name, number)
            else:
                self._others.append((number, _compiled(pattern, where)))

    def value(self, module: str, default: Any) -> Any:
        """The value for a module, or `default` where no pattern matches.

        Raises:
            SourceError: the patterns take too many steps, or the name has a line break.
        """
        if module not in self._known:
            self._known[module] = self._find(module)
        number = self._known[module]
        return default if number is None else self._values[number]

    def _find(self, module: str) -> int | None:
        if "\n" in module and self._values:  # a dot does not match it, and no .shd file can name it
            raise SourceError(f"{self._where}: the module {brief(repr(module), 80)} has a line break; rename it")
        found = len(self._values)
        for (length, wild), names in self._plain.items():
            start = len(module) - length
            if start == 0 or (start > 0 and module[start - 1] == "."):
                end = list(module[start:])
                for at in wild:
                    end[at] = "."
                found = min(found, names.get("".join(end), found))
        self._count(len(self._plain))
        for number, automaton in self._others:
            if number > found:
                break
            matches, steps = automaton.run(module)
            self._count(steps)
            if matches:
                return number
        return found if found < len(self._values) else None

    def _count(self, steps: int) -> None:
        self._steps += steps
        if self._steps > _MOST_STEPS:
            raise SourceError(f"{self._where}: its patterns take too long to match; write plain names of modules")


def _plain(pattern: str) -> tuple[str, tuple[int, ...]]:
    """(the name, where it has a dot that stands for any character)."""
    name, wild = "", []
    for part in re.findall(r"\\?.", pattern):
        if part == ".":
            wild.append(len(name))
        name += part[-1]
    return name, tuple(wild)


def _compiled(pattern: str, where: str) -> _Automaton:
    """The automaton of a pattern in PEFT's frame."""
    if len(pattern) > _MOST_CHARACTERS:
        raise SourceError(
            f"{where}: {brief(repr(pattern), 80)} is too long for a pattern; write plain names of modules"
        )
    framed = rf"(.*\.)?({pattern})$"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on sets that a later Python may read otherwise
            re.compile(framed)
        return _Automaton(framed)
    except _UnsupportedError as error:
        what = f"{error}, which may take unbounded time; write plain names of modules"
    except (re.error, RecursionError, OverflowError) as error:
        what = f"is not a regular expression ({error}); repair it"
    raise SourceError(f"{where}: {brief(repr(pattern), 80)} {what}")


class _UnsupportedError(Exception):
    """What an automaton cannot do."""


class _Automaton:
    """A regular expression that `re` accepts, as a nondeterministic automaton.

    A state is a test of one character, of a place, or None, and the states after it.  State 0 is the end.
    """

    def __init__(self, pattern: str) -> None:
        self._pattern, self._at, self._copies = pattern, 0, 0
        self._tests: list[_Test | None] = [None]
        self._places: list[_Place | None] = [None]
        self._after: list[tuple[int, ...]] = [()]
        self._start = self._either()(0)
        #: set of states -> character -> the next set
        self._moves: dict[frozenset[int], dict[str, frozenset[int]]] = {}

    def run(self, text: str) -> tuple[bool, int]:
        """(whether the beginning of a text matches, steps that were new)."""
        states, steps = frozenset([self._start]), 0
        for at in range(len(text) + 1):
            states, seen = self._closed(states, text, at)
            steps += 1 + seen
            if 0 in states:
                return True, steps
            if at == len(text) or not states:
                return False, steps
            moves = self._moves.setdefault(states, {})
            if text[at] not in moves:
                steps += len(states)
                tested = ((self._tests[state], self._after[state]) for state in states)
                moves[text[at]] = frozenset(n for test, after in tested if test and test(text[at]) for n in after)
            states = moves[text[at]]
        raise AssertionError

    def _closed(self, states: frozenset[int], text: str, at: int) -> tuple[frozenset[int], int]:
        """(the states with all that are reached without a character, how many were looked at)."""
        found: set[int] = set()
        to_do = list(states)
        while to_do:
            state = to_do.pop()
            if state in found:
                continue
            found.add(state)
            place = self._places[state]
            if self._tests[state] is None and (place is None or place(text, at)):
                to_do += self._after[state]
        return frozenset(s for s in found if s == 0 or self._tests[s] is not None), len(found)

    # ---- the parser: each returns a function (state that follows) -> first state, so that a part can be repeated

    def _state(self, *after: int, test: _Test | None = None, place: _Place | None = None) -> int:
        self._tests.append(test)
        self._places.append(place)
        self._after.append(after)
        if len(self._after) > _MOST_STATES:
            raise _UnsupportedError("repeats too much")
        return len(self._after) - 1

    def _either(self) -> _Part:
        parts = [self._sequence()]
        while self._take("|"):
            parts.append(self._sequence())
        return parts[0] if len(parts) == 1 else lambda end: self._state(*(part(end) for part in parts))

    def _sequence(self) -> _Part:
        parts: list[_Part] = []
        while self._at < len(self._pattern) and self._pattern[self._at] not in "|)":
            parts.append(self._repeated(self._one()))

        def build(end: int) -> int:
            for part in reversed(parts):
                end = part(end)
            return end

        return build

    def _repeated(self, part: _Part) -> _Part:
        counts = _COUNTS.match(self._pattern, self._at)
        if counts is not None and counts.group() != "{}":
            self._at = counts.end()
            least = int(counts["least"] or 0)
            most = int(counts["most"]) if counts["most"] else None if counts["comma"] else least
        elif self._take("*"):
            least, most = 0, None
        elif self._take("+"):
            least, most = 1, None
        elif self._take("?"):
            least, most = 0, 1
        else:
            return part
        if self._take("+"):
            raise _UnsupportedError("has a possessive repetition")
        self._take("?")  # a lazy one matches the same

        def build(end: int) -> int:
            self._copies += max(least, most or 1)
            if self._copies > _MOST_STATES:
                raise _UnsupportedError("repeats too much")
            if most is None:
                loop = self._state()
                first = part(loop)
                self._after[loop] = (first, end)
                end = first if least else loop
            for _ in range(0 if most is None else most - least):
                end = self._state(part(end), end)
            for _ in range(max(0, least - 1) if most is None else least):
                end = part(end)
            return end

        return build

    def _one(self) -> _Part:
        """One character, place or group."""
        start, character = self._at, self._pattern[self._at]
        if character == "(":
            group = _GROUP.match(self._pattern, start)
            if group is None:
                raise _UnsupportedError(f"has {self._pattern[start : start + 4]!r}")
            self._at = group.end()
            inner = self._either()
            self._at += 1
            return inner
        self._at += 1
        if character == "[":
            self._take("^")
            self._take("]")
            while self._pattern[self._at] != "]":
                self._at += 2 if self._pattern[self._at] == "\\" else 1
            self._at += 1
        elif character == "\\":
            self._at += 1
        token = self._pattern[start : self._at]
        if token in _PLACES:
            place = _PLACES[token]
            return lambda end: self._state(end, place=place)
        if token[0] == "\\" and token[1].isalnum() and token[1] not in "dDwWsSnrtfva":
            raise _UnsupportedError(f"has {token!r}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            test = re.compile(re.escape(token) if len(token) == 1 and token != "." else token).match
        return lambda end: self._state(end, test=test)

    def _take(self, character: str) -> bool:
        found = self._pattern[self._at : self._at + 1] == character
        self._at += found
        return found


#: (the state that follows) -> the first state.
_Part = Callable[[int], int]


_PLACES: dict[str, _Place] = {
    "^": lambda text, at: at == 0,
    r"\A": lambda text, at: at == 0,
    "$": lambda text, at: at == len(text),
    r"\Z": lambda text, at: at == len(text),
}
