"""Modules under their names of 0.1, which are accepted for one more release.

`import shiradelta.fusion` gives `shiradelta.combine.fuse` itself, with a DeprecationWarning that names it.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType

#: Old name -> new name, both under `shiradelta`: modules that users had reason to import.
MOVED = {
    "arithmetic": "format.arithmetic",
    "delta": "format.delta",
    "describe": "io.describe",
    "digest": "format.digest",
    "engine.hotswap": "hotswap.session",
    "engine.verification": "folder.verification",
    "fusion": "combine.fuse",
    "interference": "combine.interference",
    "reader": "io.reader",
    "report": "combine.report",
    "writer": "io.writer",
}
#: A package that is gone, with modules in it that have moved.
_GONE = "engine"
_PREFIX = "shiradelta."


def new_name(old: str) -> str | None:
    """The new name of a module that has moved, or of one inside it; both without `shiradelta.`."""
    for moved, new in MOVED.items():
        if old == moved or old.startswith(moved + "."):
            return new + old[len(moved) :]
    return None


class _Finder:
    """Finds a moved module, and loads it as the module that has its new name.

    It has no base class: `importlib.abc` takes a tenth of the time in which the command line starts.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(_PREFIX):
            return None
        old = fullname.removeprefix(_PREFIX)
        if new_name(old) is None and old != _GONE:
            return None
        return ModuleSpec(fullname, self, is_package=old == _GONE)  # type: ignore[arg-type]  # it loads, too

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        new = new_name(spec.name.removeprefix(_PREFIX))
        if new is None:
            return None
        warnings.warn(f"{spec.name} is {_PREFIX}{new} now", DeprecationWarning, stacklevel=2)
        module = import_module(_PREFIX + new)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        if spec is not None and spec.loader_state is not None:  # the import system has put its own there
            module.__spec__ = spec.loader_state


def install() -> None:
    """Makes the old names importable."""
    # First, so that `shiradelta.report.page` is not found a second time on the path of `shiradelta.combine.report`.
    sys.meta_path.insert(0, _Finder())
