"""Modules under their names of 0.1, which are taken for one release more.

`import shiradelta.fusion` gives `shiradelta.combine.fuse` itself, with a DeprecationWarning that names it.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType

#: Old name -> new name, both under `shiradelta`.
MOVED = {
    "arithmetic": "format.arithmetic",
    "backend": "backends.choose",
    "checkpoint": "models.checkpoint",
    "codecs": "format.codecs",
    "delta": "format.delta",
    "describe": "io.describe",
    "digest": "format.digest",
    "engine.directory": "folder.apply",
    "engine.hotswap": "hotswap.session",
    "engine.verification": "folder.verification",
    "files": "util.files",
    "fit.loading": "models.loading",
    "fit.scores": "fit.importance",
    "fit.texts": "text.texts",
    "fit.train": "fit.training",
    "fusion": "combine.fuse",
    "header": "format.container",
    "interference": "combine.interference",
    "native": "backends.libshd.backend",
    "patched": "nonzeros.patched",
    "pruning": "nonzeros.pruning",
    "reader": "io.reader",
    "reference": "backends.numpy",
    "report": "combine.report",
    "saved_state": "nonzeros.saved_state",
    "show": "util.text",
    "spectrum": "select.spectrum",
    "train.data": "text.examples",
    "train.layout": "models.views",
    "wire": "format.registry",
    "writer": "io.writer",
}
#: Packages that are gone, with modules in them that have moved.
_GONE = {old.rpartition(".")[0] for old in MOVED} - {"", "fit", "train"}
_PREFIX = "shiradelta."


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
        if old not in MOVED and old not in _GONE:
            return None
        return ModuleSpec(fullname, self, is_package=old in _GONE)  # type: ignore[arg-type]  # it loads, too

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        new = MOVED.get(spec.name.removeprefix(_PREFIX))
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
    # First, so that `shiradelta.codecs.rice` is not found a second time on the path of `shiradelta.format.codecs`.
    sys.meta_path.insert(0, _Finder())
