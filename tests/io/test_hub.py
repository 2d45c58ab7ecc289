"""Which paths name something on the Hub, and where a path in its cache comes from."""

from __future__ import annotations

from pathlib import Path

import pytest

from shiradelta.io.hub import Origin, hub_path, origin_of


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("user/repo", ("user/repo", None, "")),
        ("user/repo/", ("user/repo", None, "")),
        (Path("user/repo"), ("user/repo", None, "")),
        ("hf://user/repo", ("user/repo", None, "")),
        (Path("hf://user/repo/a.shd"), ("user/repo", None, "a.shd")),
        ("user/repo@v1.0", ("user/repo", "v1.0", "")),
        ("user/repo/a.shd", ("user/repo", None, "a.shd")),
        ("user/repo.v2@main/unet/model.safetensors", ("user/repo.v2", "main", "unet/model.safetensors")),
        ("user/repo@refs/pr/1/a.shd", ("user/repo", "refs/pr/1", "a.shd")),
        ("user/repo@one%2Fbranch/a.shd", ("user/repo", "one/branch", "a.shd")),
        *((path, None) for path in ("model", "a.shd", "/user/repo", "./user/repo", "../user/repo", "~/user/repo")),
        *((path, None) for path in ("folder/a.shd", "folder/a.safetensors", "https://example.org/a", "user//repo")),
    ],
)
def test_what_a_path_names(
    path: str | Path,
    expected: tuple[str, str | None, str] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    found = hub_path(path)
    assert (found and (found.repo, found.revision, found.file)) == expected


@pytest.mark.parametrize("path", ["hf://user/repo/a.shd", "user/repo"])
def test_messages_have_the_path_as_it_was_given(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert str(hub_path(path)) == str(hub_path(Path(path))) == path


def test_what_is_here_is_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user" / "repo").mkdir(parents=True)
    assert hub_path("user/repo") is None
    assert hub_path("user/other") is None  # a slip in a local path is not asked for
    assert hub_path("hf://user/repo") is not None


def test_where_a_path_in_the_cache_comes_from(tmp_path: Path):
    snapshot = tmp_path / "models--org--my-model" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "link").symlink_to(snapshot)
    assert origin_of(snapshot) == origin_of(tmp_path / "link") == Origin("org/my-model", "0123", "")
    assert origin_of(snapshot / "unet" / "a.safetensors") == Origin("org/my-model", "0123", "unet/a.safetensors")
    assert origin_of(tmp_path / "link" / "a.shd") == Origin("org/my-model", "0123", "a.shd")
    assert origin_of(tmp_path / "models--org--my-model") is None
