"""Paths that name something on the Hugging Face Hub, `user/repo[@revision][/file]`, and its cache on this machine.

Nothing is downloaded here: `download.py` does that.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from shiradelta.format import registry

Path_ = str | os.PathLike[str]

_REPO = r"\w[\w.-]*/\w[\w.-]*"
#: Compiled where a path may be such a name, which few are.
_NAMED = (
    rf"(?P<scheme>hf:/{{1,2}})?(?P<repo>{_REPO})"
    r"(?:@(?P<revision>refs/(?:pr|convert)/[^/@]+|[^/@]+))?(?:/(?P<file>[^/].*?))?/?"
)
#: A name of two parts that ends so is that of a local file, which is not there.
_FILES = (registry.SUFFIX, ".safetensors")


class HubPath(NamedTuple):
    """What a path names on the Hub.

    Attributes:
        given: the path, as it was given.
        repo: `user/repo`.
        revision: a branch, tag or commit; None for the main branch.
        file: a file or folder in the repository; empty for the repository itself.
    """

    given: str
    repo: str
    revision: str | None
    file: str

    def __str__(self) -> str:
        return self.given


def is_repo(name: str) -> bool:
    """Whether a name is one of a repository, `user/repo`."""
    return re.fullmatch(_REPO, name, re.ASCII) is not None


def hub_path(path: Path_) -> HubPath | None:
    """What a path names on the Hub; None for a local path.

    A path is local where something of this name is there, or of the first part of it.  `hf://` before it says that it
    is not.  A slash in a revision is written as %2F, but for `refs/pr/1` and the like.
    """
    # A Path has one slash where an address has two.
    given = path if isinstance(path, str) else re.sub(r"^hf:/(?=[^/])", "hf://", Path(path).as_posix())
    if "/" not in given or given.startswith(("/", ".", "~")) or os.path.lexists(given):
        return None
    found = re.fullmatch(_NAMED, given, re.ASCII)
    if found is None:
        return None
    repo, revision, file = found["repo"], found["revision"], found["file"] or ""
    if not found["scheme"]:
        is_file = not (revision or file) and repo.endswith(_FILES)
        if is_file or os.path.lexists(repo.partition("/")[0]):
            return None
    return HubPath(given, repo, revision and revision.replace("%2F", "/"), file)


class Origin(NamedTuple):
    """Where a file or folder in the Hub's cache comes from.

    Attributes:
        repo: `user/repo`.
        revision: the commit.
        file: the path within the repository; empty for the repository itself.
    """

    repo: str
    revision: str
    file: str

    @property
    def name(self) -> str:
        """The last part of its name."""
        return (self.file or self.repo).rpartition("/")[2]


def origin_of(path: Path_) -> Origin | None:
    """Where a path in the Hub's cache comes from; None for any other path."""
    here = Path(os.path.abspath(path))
    for each in (here, here.parent.resolve() / here.name, here.resolve()):
        parts = each.parts
        for number, part in enumerate(parts[:-2]):
            if part.startswith("models--") and parts[number + 1] == "snapshots":
                repo = part.removeprefix("models--").replace("--", "/")
                return Origin(repo, parts[number + 2], "/".join(parts[number + 3 :]))
    return None
