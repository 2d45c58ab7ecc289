"""Folders that are held open: nothing is followed, whatever is put in the way, with descriptors and without."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

import pytest

from shiradelta.errors import TargetError
from shiradelta.util import directory
from shiradelta.util.directory import Directory

pytestmark = pytest.mark.skipif(os.name == "nt", reason="links need rights there")


@pytest.fixture(params=[True, False], ids=["descriptors", "paths"])
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a file, and one outside it."""
    monkeypatch.setattr(directory, "BY_DESCRIPTOR", request.param)
    (tmp_path / "root" / "inner").mkdir(parents=True)
    (tmp_path / "root" / "file").write_bytes(b"own")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_bytes(b"precious")
    return tmp_path / "root"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../outside", "a\0b"])
def test_names_are_of_its_own_entries_only(root: Path, name: str):
    with Directory(root) as folder, pytest.raises(TargetError, match="is no name of a file"):
        folder.open_file(name, os.O_RDWR | os.O_CREAT)


def test_links_are_not_followed(root: Path):
    (root / "link").symlink_to(root.parent / "outside" / "file")
    (root / "new").symlink_to(root.parent / "outside" / "made")
    (root / "folder").symlink_to(root.parent / "outside")
    with Directory(root) as folder:
        for name in ("link", "new", "folder"):
            with pytest.raises(TargetError, match="is a link"):
                folder.open_file(name, os.O_RDWR | os.O_CREAT)
            with pytest.raises(TargetError, match="is a link"):
                folder.folder(name)
        with folder.replacing("link") as stream:
            stream.write(b"mine")
        folder.remove("folder")
    assert (root / "link").read_bytes() == b"mine"
    assert not (root / "link").is_symlink()
    assert sorted(path.name for path in (root.parent / "outside").iterdir()) == ["file"]
    assert (root.parent / "outside" / "file").read_bytes() == b"precious"


def test_a_folder_that_is_replaced_by_a_link_is_not_left(root: Path):
    with Directory(root) as folder:
        inner = folder.folder("inner")
        (root / "inner").rename(root / "moved")
        (root / "inner").symlink_to(root.parent / "outside")
        if directory.BY_DESCRIPTOR:
            with inner.replacing("file") as stream:
                stream.write(b"mine")
            assert (root / "moved" / "file").read_bytes() == b"mine"
        else:
            with pytest.raises(TargetError, match="is a link"), inner.replacing("file"):
                pass
    assert (root.parent / "outside" / "file").read_bytes() == b"precious"


def test_a_file_is_replaced_whole_or_not_at_all(root: Path):
    (root / "file").chmod(0o640)
    with Directory(root) as folder:
        with suppress(KeyError), folder.replacing("file") as stream:
            stream.write(b"half")
            raise KeyError
        assert folder.names() == ["file", "inner"]
        assert (root / "file").read_bytes() == b"own"
        with folder.replacing("file") as stream:
            stream.write(b"whole")
    assert (root / "file").read_bytes() == b"whole"
    assert (root / "file").stat().st_mode & 0o777 == 0o640


def test_a_file_system_without_hard_links_gets_a_copy(root: Path, monkeypatch: pytest.MonkeyPatch):
    def none(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "no links")

    (root / "file").chmod(0o640)
    with Directory(root) as folder:
        folder.keep("file", folder.folder("inner"), "second")
        assert os.path.samefile(root / "file", root / "inner" / "second")
        monkeypatch.setattr(os, "link", none)
        folder.keep("file", folder.folder("inner"), "third")
    assert (root / "inner" / "third").read_bytes() == b"own"
    assert not os.path.samefile(root / "file", root / "inner" / "third")
    assert (root / "inner" / "third").stat().st_mode & 0o777 == 0o640


def test_errors_have_the_whole_path(root: Path):
    with Directory(root) as folder, pytest.raises(FileNotFoundError) as caught:
        folder.folder("inner").reading("nothing")
    assert caught.value.filename == str(root / "inner" / "nothing")


def test_a_folder_is_removed_with_all_that_is_in_it(root: Path):
    deep = root / "inner" / "a" / "b"
    deep.mkdir(parents=True)
    (deep / "out").symlink_to(root.parent / "outside")
    with Directory(root) as folder:
        folder.remove("inner")
        folder.remove("inner")
        assert folder.names() == ["file"]
        Path(root, *"abcdefghijkl").mkdir(parents=True)
        with pytest.raises(TargetError, match="deeper"):
            folder.remove("a")
    assert (root.parent / "outside" / "file").read_bytes() == b"precious"
