"""Stands in for the package `shiradelta.converters` in a checkout, where that folder lies beside this package.

A wheel has the folder `converters/` in this module's place and leaves this file out.
"""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a type checker that runs in the checkout finds the folder by its own name
    from converters import *  # noqa: F403
    from converters import __all__ as __all__
else:
    _folder = Path(__file__).parent.parent / "converters"
    _spec = spec_from_file_location(__name__, _folder / "__init__.py", submodule_search_locations=[str(_folder)])
    # The import system returns what stands in `sys.modules`, and not this module.
    sys.modules[__name__] = module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[__name__])
