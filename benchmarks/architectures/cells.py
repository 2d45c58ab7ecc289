"""How a cell of the matrix ended, and which refusals have their reason in the architecture."""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import shiradelta
from benchmarks.architectures.columns import NotApplicableError
from benchmarks.architectures.judge import WrongError


class Outcome(StrEnum):
    """How a cell ended.  The last two are what must not be."""

    RIGHT = "right"
    REFUSED = "refused"
    NOT_APPLICABLE = "n/a"
    NOT_RUN = "not run"
    WRONG = "WRONG"
    TRACEBACK = "traceback"


#: Outcomes that make the command fail.
FORBIDDEN = {Outcome.WRONG, Outcome.TRACEBACK}

#: What a refusal says (a regular expression) -> why no other answer is possible for the architecture.  Empty: whatever
#: is refused so far could be done.
REASONS: dict[str, str] = {}


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        row: the architecture's name.
        column: the column's.
        outcome: how it ended.
        text: in a line, why; empty if the result is right.
        reason: why a refusal lies in the architecture, where it does.
        seconds: how long it took.
    """

    row: str
    column: str
    outcome: Outcome
    text: str = ""
    reason: str = ""
    seconds: float = 0.0

    @property
    def label(self) -> str:
        """The outcome, with a star where a refusal lies in the architecture."""
        return f"{self.outcome}{'*' if self.reason else ''}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "outcome": str(self.outcome)}


def run(row: str, column: str, work: Callable[[], None], folder: Path) -> Cell:
    """Runs one cell.

    Args:
        row: the architecture's name.
        column: the column's.
        work: returns if the result is right, and raises if it is not.
        folder: where the case lies; messages do without it.
    """
    start = time.perf_counter()
    outcome, text = _outcome(work)
    text = " ".join(text.replace(f"{folder}/", "").split())
    reason = next((why for pattern, why in REASONS.items() if re.search(pattern, text)), "")
    seconds = time.perf_counter() - start
    return Cell(row, column, outcome, text, reason if outcome is Outcome.REFUSED else "", seconds)


def _outcome(work: Callable[[], None]) -> tuple[Outcome, str]:
    try:
        work()
    except NotApplicableError as error:
        return Outcome.NOT_APPLICABLE, str(error)
    except WrongError as error:
        return Outcome.WRONG, str(error)
    except shiradelta.ShiraDeltaError as error:
        return Outcome.REFUSED, str(error)
    except Exception as error:
        return Outcome.TRACEBACK, f"{type(error).__name__}: {error} ({_where(error)})"
    return Outcome.RIGHT, ""


def _where(error: Exception) -> str:
    """The last line of the package that an error went through, or the last of all."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if re.search(r"/(shiradelta|converters)/", frame.filename)]
    frame = (own or frames)[-1]
    return f"{'/'.join(Path(frame.filename).parts[-3:])}:{frame.lineno} in {frame.name}"
