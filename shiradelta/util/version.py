"""The version of this package, as pyproject.toml has it too.

It stands in the code, not in the installed metadata: a system that cannot read a folder would give another version, and
files would say that another release has made them.
"""

VERSION = "0.1.0"
