"""Git LFS pointers: small texts that a repository has in the place of large files."""

from __future__ import annotations

#: How a pointer starts, what it is, and what to do about it.
LFS_POINTER = b"version https://git-lfs"
LFS_WHAT = "is a Git LFS pointer, which stands for the file"
LFS_REMEDY = "run `git lfs pull` in its repository, or download the file itself"
