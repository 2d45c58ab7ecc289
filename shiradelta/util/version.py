"""The version of this package, as pyproject.toml has it too.

It stands in the code, not in the installed metadata: a system that cannot read a folder would give another version, and
files would say that another release has made them.
"""

import sys

VERSION = "0.1.0"


def made_by(*libraries: str) -> str:
    """What made a file, for its metadata: this package and the libraries that had a part in it, with their versions.

    Args:
        libraries: names of modules; those that are not imported had no part.
    """
    imported = ((name, sys.modules.get(name)) for name in libraries)
    versions = [f"{name} {module.__version__}" for name, module in imported if module is not None]
    return ", ".join([f"shiradelta {VERSION}", *versions])
