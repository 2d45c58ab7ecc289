"""Options that several commands share, and kinds of options that click lacks."""

from __future__ import annotations

import copy
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

import click

from shiradelta.cli.mistakes import as_typed, is_number, meant_strength, misread_strength, too_many, with_order
from shiradelta.cli.output import DASH, echo, echo_warnings, is_verbose, set_verbosity
from shiradelta.errors import ArgumentError
from shiradelta.util.text import parse_share, size

if TYPE_CHECKING:
    _Choice = click.Choice[str]
    _FloatType = click.ParamType[float]
else:
    _Choice, _FloatType = click.Choice, click.ParamType  # click 8.2 has no parameter for them

Function = TypeVar("Function", bound=Callable[..., Any])


class RegistryChoice(_Choice):
    """A choice among the names of a registry, which is imported when a value or the help is asked for.

    Args:
        path: module and attribute, such as "shiradelta.combine.methods:METHODS": a collection of names, or a
            function that returns one.
        renamed: likewise, a mapping from old names to new ones; old names are taken but not shown.
    """

    def __init__(self, path: str, renamed: str = "") -> None:
        super().__init__(())
        self.path = path
        self._renamed = renamed

    def rows(self) -> Any:
        """The registry, or another collection of names."""
        found = _load(self.path)
        return found() if callable(found) else found

    @property
    def renamed(self) -> Mapping[str, str]:
        """Old name -> new name."""
        found: Mapping[str, str] = _load(self._renamed) if self._renamed else {}
        return found

    @property
    def choices(self) -> tuple[str, ...]:
        """The names, in the registry's order."""
        return tuple(self.rows())

    @choices.setter
    def choices(self, value: object) -> None:
        """Ignores what click's constructor sets."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        renamed = self.renamed
        if value in renamed:
            warn_renamed(value, renamed[value])
            value = renamed[value]
        return super().convert(value, param, ctx)


def _load(path: str) -> Any:
    """Imports the object that a path such as "package.module:NAME" names."""
    module, _, attribute = path.partition(":")
    return getattr(import_module(module), attribute)


class _Share(_FloatType):
    """A share: 0.01 or 1%."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        try:
            return parse_share(str(value))
        except ArgumentError as error:
            self.fail(str(error), param, ctx)


SHARE = _Share()


class _Strength(_FloatType):
    """A strength that someone may have meant."""

    name = "float"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if not is_number(str(value)):
            self.fail(f"{value!r} is not a number; give a strength such as 0.7", param, ctx)
        return meant_strength(float(value))


STRENGTH = _Strength()


class RegistryOption(click.Option):
    """An option of type `RegistryChoice` whose help lists the help of each row."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """As click's, with the rows' help.  Rows may be added later, so the text is made at each call."""
        if not isinstance(self.type, RegistryChoice):
            return super().get_help_record(ctx)
        listed = ", ".join(f"{name} ({row.help})" for name, row in self.type.rows().items())
        option = copy.copy(self)
        option.help = f"{self.help}: {listed}."
        return click.Option.get_help_record(option, ctx)


class RenamedOption(click.Option):
    """An option under its old name: accepted for one more release, hidden from help."""

    def __init__(self, names: Sequence[str], new: str) -> None:
        super().__init__(names, hidden=True, expose_value=False, help=f"Renamed to {new}.")
        self.old = names[0]
        self.new = new


#: What the values of options that are paths are called in the help.
_PATHS = ("FILE", "FOLDER", "MODEL")


class WithExamples(click.Command):
    """A command whose help ends in examples.

    Args:
        examples: command lines, without the program's name.
    """

    def __init__(self, *args: Any, examples: Sequence[str] = (), **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.examples = examples

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the examples."""
        if self.examples:
            with formatter.section("Examples"):
                for example in self.examples:  # whole, to be pasted
                    formatter.write(f"{'':{formatter.current_indent}}shiradelta {example}\n")


class Group(WithExamples, click.Group):
    """Several commands under one name, such as `shiradelta chain`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


class Command(WithExamples):
    """A command that reads renamed options as the new ones and warns of it, and says what to do about wrong usage.

    Args:
        extra: what to do about an argument too many.
        to_stdout: whether it writes to stdout where `-` is given for `out`.
    """

    def __init__(self, *args: Any, extra: str = "leave it out", to_stdout: bool = False, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.extra, self.to_stdout = extra, to_stdout
        for parameter in self.params:
            named = isinstance(parameter, click.Argument) or parameter.metavar in _PATHS
            if named and parameter.type is click.STRING:
                parameter.type = click.Path(readable=False)  # which shells complete
        self.params += _verbosity_options()

    def invoke(self, ctx: click.Context) -> Any:
        """As click's; with --verbose the cost is printed."""
        begun = time.monotonic()
        try:
            return super().invoke(ctx)
        except ArgumentError as error:
            error.argument = as_typed(error.argument, self)  # messages of functions are about their arguments
            raise
        finally:
            if is_verbose():
                echo(f"{ctx.info_name}: {time.monotonic() - begun:.1f} s, {_peak_memory()}", err=True)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Puts the new names in place of the old ones, then parses."""
        given = list(args)
        renamed = {option.old: option.new for option in self.params if isinstance(option, RenamedOption)}
        options = args[: args.index("--")] if "--" in args else args
        current = []
        for argument in options:
            name, equals, value = argument.partition("=")
            if name in renamed:
                warn_renamed(name, renamed[name])
                argument = renamed[name] + equals + value
            current.append(argument)
        ctx.allow_extra_args = True  # they get a message of this package
        try:
            rest = super().parse_args(ctx, current + args[len(options) :])
        except click.BadParameter as error:
            raise with_order(error, ctx) from None
        if rest and not ctx.resilient_parsing:
            raise too_many(ctx, given, rest, self.extra)
        if ctx.params.get("out") == DASH and not (self.to_stdout or ctx.resilient_parsing):
            raise click.UsageError("- is stdout, to which this command writes no result; give a path.", ctx)
        return rest


def _verbosity_options() -> list[click.Parameter]:
    def option(names: list[str], verbosity: int, text: str) -> click.Option:
        def record(context: click.Context, parameter: click.Parameter, given: bool) -> None:
            if given:
                set_verbosity(context, verbosity)

        return click.Option(names, is_flag=True, expose_value=False, callback=record, help=text)

    return [
        option(["-q", "--quiet"], -1, "Print only warnings, errors and JSON."),
        option(["-v", "--verbose"], 1, "Print also the traceback of an error, and time and memory taken."),
    ]


def _peak_memory() -> str:
    try:
        import resource
    except ImportError:  # Windows
        return "peak memory unknown"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{size(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)} of memory at most"


#: Decorates the function of a command, as `click.command` does.
command = partial(click.command, cls=Command)


def renamed_option(old: str, new: str) -> Callable[[Function], Function]:
    """Lets a command take an option by its old name: `@renamed_option("--fall-from", "--prune-from")`."""
    return click.option(old, cls=RenamedOption, new=new)


def warn_renamed(old: str, new: str) -> None:
    """Warns on stderr that an option or a choice has a new name."""
    echo_warnings([f"{old} is deprecated; use {new}"])


as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


no_lock = click.option(
    "--no-lock",
    is_flag=True,
    help="Do without the lock, on a file system that has none.  No other process may use MODEL meanwhile.",
)


def trusted(function: Function) -> Function:
    """The options that name the keys that are trusted, and the signature."""
    key = click.option(
        "--key",
        "keys",
        metavar="FILE",
        multiple=True,
        help="Refuse DELTA unless it is signed by a public key in this file.  May be repeated; any key is enough.",
    )
    signature = click.option("--signature", metavar="FILE", help="Signature of DELTA.  [default: DELTA.sig]")
    return key(signature(function))


max_memory = click.option(
    "--max-memory",
    "limit",
    metavar="SIZE",
    help="Refuse a file of which one tensor takes more memory when it is decoded, such as 500MB.  Without it: 1 GiB, or"
    " 64 times the file's size if that is more.",
)


#: What files of examples may be, in the help.
EXAMPLES = (
    "JSON Lines, a Parquet file, or the folder of a data set, with text, prompt and completion, messages, anchor and"
    " positive, audio and text, or image and texts; FILE:COLUMN takes one column"
)

prompt_share = click.option(
    "--prompt-share",
    type=SHARE,
    default=0.0,
    show_default=True,
    help="How much a prompt's token counts, from 0 to 1, where one that the model is to say has 1.",
)

train_texts = click.option("--texts", required=True, metavar="FILE[:COLUMN]", help=f"Examples to train on: {EXAMPLES}.")
train_sparsity = click.option(
    "--sparsity", default="0.01", show_default=True, help="Share of weights that change, such as 1%, or N:M."
)
train_mask = click.option(
    "--mask",
    cls=RegistryOption,
    type=RegistryChoice("shiradelta.train.masks:MASKS"),
    default="rand",
    show_default=True,
    help="Which weights change",
)
train_targets = click.option(
    "--targets",
    callback=lambda context, option, names: tuple(name.strip() for name in (names or "").split(",") if name.strip()),
    help="Layers to train, such as q_proj,v_proj.  [default: all linear layers but the output]",
)
train_batch = click.option("--batch", default=32, show_default=True, help="Examples per step.")
train_relative_lr = click.option(
    "--relative-lr",
    type=float,
    help="Learning rate, relative to the RMS of each weight tensor. By default short runs find it.",
)


def scope(text: str) -> Callable[[Function], Function]:
    """The option that says whether the sparsity is that of each tensor or of the whole model."""
    choice = RegistryChoice("shiradelta.select.shares:SCOPES")
    return click.option("--scope", type=choice, default="tensor", show_default=True, help=text)


def skip(text: str) -> Callable[[Function], Function]:
    """The option with patterns of tensors that a command may leave out."""
    text += ": a glob pattern of their names in the source or in the base.  May be repeated."
    return click.option("--skip", metavar="PATTERN", multiple=True, help=text)


def values(default: str) -> Callable[[Function], Function]:
    """The option that names a value codec."""
    choice = RegistryChoice("shiradelta.format.codecs:VALUE_OPTIONS")
    return click.option("--values", type=choice, default=default, show_default=True, help="How the changes are stored.")


def given(*starts: str) -> str:
    """The first option on the command line whose name starts with one of `starts`, or nothing."""
    context = click.get_current_context()
    found = (
        option.opts[0]
        for option in context.command.params
        if str(option.name).startswith(starts)
        and context.get_parameter_source(str(option.name)) is click.core.ParameterSource.COMMANDLINE
    )
    return next(found, "")


def with_strengths(arguments: Sequence[str]) -> dict[str | os.PathLike[str], float]:
    """File -> strength, from arguments such as style.shd:0.7."""
    found: dict[str | os.PathLike[str], float] = dict(map(_with_strength, arguments))
    if len(found) < len(arguments):
        twice = next(name for name in found if sum(_with_strength(each)[0] == name for each in arguments) > 1)
        raise ArgumentError(f"{os.fspath(twice)} is given twice; give it once, with one strength")
    return found


def _with_strength(argument: str) -> tuple[str, float]:
    """Parses FILE or FILE:STRENGTH; a colon without a number after it belongs to the name."""
    name, colon, strength = argument.rpartition(":")
    if colon and is_number(strength):
        return name, meant_strength(float(strength))
    if (message := misread_strength(argument, "write a file and its strength as {file}:{strength}")) is not None:
        raise ArgumentError(message)
    return argument, 1.0
