"""What a mistake on the command line was meant to be, for messages that say what to do."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence

import click

from shiradelta.errors import ArgumentError, printable

#: The largest strength that a command takes: what is larger is a slip, and destroys a model.
MOST = 1000


def meant_strength(strength: float) -> float:
    """The strength.

    Raises:
        ArgumentError: no one can have meant it: it changes nothing, or more than any model stands.
    """
    if strength == 0:
        raise ArgumentError("a strength of 0 changes nothing; give another number, such as 0.7")
    if abs(strength) > MOST:
        raise ArgumentError(f"a strength of {strength:g} is out of range; give a number such as 0.7, at most {MOST:,}")
    return strength


def misread_strength(argument: str, remedy: str) -> str | None:
    """A message for FILE:STRENGTH, or a part of it, where a file of this name is missing; None for other arguments.

    Args:
        argument: what was given for a file.
        remedy: how a strength is given; `{file}` stands for the file, `{strength}` for a strength.
    """
    if os.path.exists(argument):
        return None
    if is_number(argument):
        said = remedy.format(file="FILE", strength=argument)
        return f"{argument}: is a number, and no file of this name is there; {said}"
    found = re.fullmatch(r"(.+?)[:=@]([^/\\]*)", argument)
    if found is None or not os.path.exists(found[1]):
        return None
    strength = found[2].replace(",", ".")
    said = remedy.format(file=shlex.quote(found[1]), strength=strength if is_number(strength) else 0.7)
    return f"{argument}: no such file; {said}"


def is_number(text: str) -> bool:
    """Whether a text is a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def too_many(context: click.Context, given: Sequence[str], extra: Sequence[str], remedy: str) -> click.UsageError:
    """The error for arguments that a command does not take.

    Args:
        context: of the command.
        given: all that follows the command's name.
        extra: those that are too many.
        remedy: what to do about them, if nothing better is known.
    """
    names = " ".join(map(shlex.quote, extra))
    if (path := _path_with_blanks(given)) is not None:
        remedy = f"put a path with blanks in quotes: {shlex.quote(path)}"
    elif is_number(extra[0]) and any(option.name == "strength" for option in context.command.params):
        remedy = f"give the strength as --strength {extra[0]}"
    takes = " ".join(_arguments(context))
    after = f" after {takes}" if takes else ""
    message = f"Got unexpected extra argument{'s' if len(extra) > 1 else ''} {names}{after}; {remedy}."
    return click.UsageError(printable(message), context)


def with_order(error: click.BadParameter, context: click.Context) -> click.UsageError:
    """The error of click for an argument or option, with what to do."""
    parameter = error.param
    if isinstance(parameter, click.Argument):
        remedy = f"give {' '.join(_arguments(context))}, in this order"
    elif isinstance(parameter, click.Option) and isinstance(error, click.MissingParameter):
        remedy = f"add {parameter.opts[0]} {parameter.make_metavar(context)}"
    else:
        return error
    return click.UsageError(printable(f"{error.format_message().rstrip('. ')}; {remedy}."), context)


def as_typed(argument: str | None, command: click.Command) -> str | None:
    """The option of a command that stands for an argument of a function, or of its `fit=`; else the argument."""
    options = {each.name: each.opts for each in command.params if isinstance(each, click.Option)}
    found = options.get(argument or "") or options.get(f"fit_{argument}") or []
    return next((name for name in found if name.startswith("--")), argument)


def _arguments(context: click.Context) -> list[str]:
    return [each.make_metavar(context) for each in context.command.params if isinstance(each, click.Argument)]


def _path_with_blanks(words: Sequence[str]) -> str | None:
    """The first path with blanks that is there and was split into words."""
    for first in range(len(words)):
        for last in range(first + 2, len(words) + 1):
            path = " ".join(words[first:last])
            if os.path.exists(path):
                return path
    return None
