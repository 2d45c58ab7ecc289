"""The source layouts that `convert` reads, one row each; finds the layout of a source.

A layout is a decorated function.  One outside the package works the same way (docs/extend/source.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from shiradelta.errors import ArgumentError, SourceError
from shiradelta.io.recognise import Wanted
from shiradelta.models.candidates import refuse_several, unread_files
from shiradelta.models.checkpoint import Checkpoint, open_checkpoint
from shiradelta.util.arguments import matches
from shiradelta.util.registry import Registry

from . import nemo_archive
from .item import Source
from .peft_folder import adapter_weights

#: The kind that takes the first layout that recognises the source.
AUTO = "auto"


class SourceFiles:
    """The files to convert: a path, the base's checkpoint if there is one, and what may be left out.

    Attributes:
        path: the source's file or folder.
        base: the base's checkpoint, or None.
        skip: glob patterns of tensors that may be lacking.
    """

    def __init__(self, path: Path, base: Checkpoint | None = None, skip: Sequence[str] = ()) -> None:
        self.path, self.base, self.skip = path, base, tuple(skip)

    def may_lack(self, *names: str) -> bool:
        """Whether the user allows that a tensor of these names is left out."""
        return matches(self.skip, *names)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The source's tensors, from a file, a model's folder, PEFT's adapter folder or an archive of NeMo.

        Raises:
            SourceError: there are none, or they cannot be read.
        """
        if nemo_archive.is_archive(self.path):
            return nemo_archive.weights_in(self.path)
        refuse_several(self.path, lora=True)
        return open_checkpoint(adapter_weights(self.path) or self.path, Wanted.SOURCE)


Recognise = Callable[[SourceFiles], bool]
Open = Callable[..., Source]
OpenT = TypeVar("OpenT", bound=Open)


@dataclass(frozen=True)
class SourceLayout:
    """The row of a source layout.

    Attributes:
        name: what `--kind` calls it.
        help: what it reads, in a line.
        recognises: whether a source has this layout.  It may raise SourceError for what is recognised, but cannot be
            converted.
        open: opens a source of this layout; called with a `SourceFiles` and the options that the user gave.
        options: the options of `convert` that `open` takes, such as "alpha".
        order: layouts are asked from small to large, so a layout that recognises much needs a large one.
        hint: how to convert such a source where nothing recognises it.
    """

    name: str
    help: str
    recognises: Recognise
    open: Open
    options: tuple[str, ...] = ()
    order: int = 0
    hint: str = ""


SOURCES: Registry[SourceLayout] = Registry("kind")


def source(
    name: str, help: str, recognises: Recognise, *, options: Iterable[str] = (), order: int = 0, hint: str = ""
) -> Callable[[OpenT], OpenT]:
    """Registers the decorated function as a source layout; see `SourceLayout` for the arguments.

    Layouts of the package have an order of 10 and more, so that others are asked before them.

    Raises:
        ArgumentError: the name is taken.
    """

    def register(function: OpenT) -> OpenT:
        if name == AUTO:
            raise ArgumentError(f"kind {AUTO!r} stands for all layouts; give another name")
        SOURCES.add(SourceLayout(name, help, recognises, function, tuple(options), order, hint))
        return function

    return register


def kinds() -> tuple[str, ...]:
    """The values of `kind` in `convert`: "auto", and the layouts in the order in which they are asked."""
    return AUTO, *(layout.name for layout in _ordered())


def open_source(
    path: Path, kind: str, base: Checkpoint | None, alpha: float | None, skip: Sequence[str] = ()
) -> Source:
    """Finds the layout of a source, and opens it.

    Args:
        path: the source's file or folder.
        kind: a layout's name, or "auto" for the first that recognises the source.
        base: the base's checkpoint, if there is one.
        alpha: overrides the alpha in the LoRA's files.
        skip: glob patterns of tensors that may be lacking.

    Raises:
        ArgumentError: the kind is unknown, or an option is given that the layout does not take.
        SourceError: no layout recognises the source, or it cannot be converted.
    """
    files = SourceFiles(path, base, skip)
    layout = _recognise(files) if kind == AUTO else _find(kind)
    options: Mapping[str, object] = {} if alpha is None else {"alpha": alpha}
    for option in options:
        if option not in layout.options:
            takers = ", ".join(other.name for other in _ordered() if option in other.options)
            raise ArgumentError(f"{option} is an option of {takers}, and {path} is of kind {layout.name}; leave it out")
    opened = layout.open(files, **options)
    if "checkpoint" in vars(files):  # a layout may read files of its own
        opened.warnings += unread_files(files.path, files.checkpoint)
    return opened


def _ordered() -> list[SourceLayout]:
    return sorted(SOURCES.values(), key=lambda layout: layout.order)


def _find(kind: str) -> SourceLayout:
    if kind not in SOURCES:
        raise ArgumentError(f"kind {kind!r} is unknown; take {', '.join(kinds())}")
    return SOURCES.find(kind)


def _recognise(files: SourceFiles) -> SourceLayout:
    for layout in _ordered():
        if layout.recognises(files):
            return layout
    hints = "".join(f"; {layout.hint}" for layout in _ordered() if layout.hint)
    raise SourceError(f"{files.path}: its layout is none of {', '.join(kinds()[1:])}{hints}")
