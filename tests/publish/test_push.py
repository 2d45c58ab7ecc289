"""A delta is pushed with a card that says what it is, and loaded from there again, on a stand-in of the Hub."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

import shiradelta as sd
from shiradelta.cli import main
from shiradelta.errors import ArgumentError, FormatError, MissingDependencyError, TargetError
from tests.hub import TOKEN, Hub, files_of
from tests.recoded import write_small

METADATA = {"base": "org/base", "base_revision": "0123", "license": "Apache-2.0", "energy_kept": "0.8127"}


def write(path: Path, **metadata: str) -> Path:
    delta = sd.TensorDelta((8, 8), [1, 9], [1.0, -2.0], "float32")
    sd.save_delta(path, {"w": delta}, metadata=metadata, values="f32")
    return path


@pytest.fixture
def owner(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The stand-in, where this process is logged in."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


def head_and_body(card: bytes) -> tuple[dict[str, Any], str]:
    _, head, body = card.decode().split("---\n", 2)
    return yaml.safe_load(head), body


def files(hub: Hub, repo: str, branch: str = "main") -> dict[str, bytes]:
    found = hub.repos[repo]
    return found.commits[found.refs[branch]]


def test_what_is_pushed_can_be_loaded(owner: Hub, tmp_path: Path):
    path = write(tmp_path / "style.shd", **METADATA)
    report = sd.push_to_hub(path, "user/style")
    assert report.path == "user/style/style.shd"
    assert report.files == ("style.shd", "README.md")
    assert report.url == f"{owner.url}/user/style/commit/{report.commit}"
    assert report.warnings == ()
    assert files(owner, "user/style")["style.shd"] == path.read_bytes()
    weights = {"w": np.zeros((8, 8), np.float32)}
    swap = sd.load(weights, report.path, 0.5)
    assert swap.active == {"style": 0.5}
    assert weights["w"].ravel()[[1, 9]].tolist() == [0.5, -1.0]


def test_the_card(owner: Hub, tmp_path: Path):
    sd.push_to_hub(write(tmp_path / "style.shd", **METADATA), "user/my-style", tags=["art"])
    head, body = head_and_body(files(owner, "user/my-style")["README.md"])
    assert head == {
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "base_model_revision": "0123",
        "library_name": "shiradelta",
        "license": "apache-2.0",
        "tags": ["shiradelta", "sparse-delta", "art"],
    }
    assert body.lstrip().startswith("# my-style\n")
    for row in (
        "| nonzeros | 2, ",
        "| share of the update's energy kept | 0.8127 |",
        "| revision of the base | 0123 |",
    ):
        assert row in body
    assert "changes\n3.12% of the weights" in body
    assert 'sd.load(model, "user/my-style/style.shd", strength=1.0)' in body
    assert "shiradelta apply org/base user/my-style/style.shd -o patched" in body


def test_what_a_card_takes_from_its_file_is_no_markup(owner: Hub, tmp_path: Path):
    strange = "x | <script>\n# [a](b) `c`"
    sd.push_to_hub(write(tmp_path / "a.shd", base=strange, source=strange), "user/a")
    head, body = head_and_body(files(owner, "user/a")["README.md"])
    assert "base_model" not in head
    rows = [line for line in body.splitlines() if line.startswith("| made from")]
    assert rows == [r"| made from | x \| \<script\>\\n\# \[a\]\(b\) \`c\` |"]
    assert "<script>" not in re.sub(r"```.*?```", "", body, flags=re.DOTALL)


def test_arguments_come_before_the_file(owner: Hub, tmp_path: Path):
    path = write(tmp_path / "a.shd", **METADATA)
    settings = {
        "base_model": "org/other",
        "license": "mit",
        "name": "b.shd",
        "revision": "new/one",
        "message": "Try it",
    }
    report = sd.push_to_hub(path, "user/a", **settings)
    head, _ = head_and_body(files(owner, "user/a", "new/one")["README.md"])
    assert (head["base_model"], head["license"]) == ("org/other", "mit")
    assert "base_model_revision" not in head  # that in the file is of another base
    assert owner.repos["user/a"].messages[report.commit] == "Try it"
    assert set(files(owner, "user/a")) == {".gitattributes"}
    assert report.path == "user/a@new%2Fone/b.shd"
    assert len(sd.open_delta(report.path)) == 1


def test_a_card_that_is_there_is_kept(owner: Hub, tmp_path: Path):
    owner.add("user/a", {"README.md": b"mine"})
    report = sd.push_to_hub(write(tmp_path / "a.shd"), "user/a")
    assert report.files == ("a.shd",)
    assert "kept; --replace-card" in report.warnings[0]
    assert files(owner, "user/a")["README.md"] == b"mine"
    warnings = sd.push_to_hub(write(tmp_path / "a.shd"), "user/a", replace_card=True).warnings
    assert b"sparse weight delta" in files(owner, "user/a")["README.md"]
    assert [re.search("give --[a-z-]+", line)[0] for line in warnings] == ["give --base-model", "give --license"]  # type: ignore[index]


def test_a_signature_goes_with_its_file(owner: Hub, tmp_path: Path):
    path = write(tmp_path / "a.shd")
    (tmp_path / "a.shd.sig").write_bytes(b"signature")
    assert sd.push_to_hub(path, "user/a").files == ("a.shd", "a.shd.sig", "README.md")
    assert files(owner, "user/a")["a.shd.sig"] == b"signature"


def test_a_file_that_needs_its_base_is_pushed_if_its_sections_are_whole(owner: Hub, tmp_path: Path):
    path = write_small(tmp_path)
    assert sd.push_to_hub(path, "user/small").files == ("small.shd", "README.md")
    assert files(owner, "user/small")["small.shd"] == path.read_bytes()
    data = bytearray(path.read_bytes())
    data[-70] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError, match="checksum"):
        sd.push_to_hub(path, "user/damaged")
    assert "user/damaged" not in owner.repos


def test_private_is_private(owner: Hub, tmp_path: Path):
    path = write(tmp_path / "a.shd")
    sd.push_to_hub(path, "user/private", private=True)
    assert owner.repos["user/private"].private
    sd.push_to_hub(path, "user/private", private=True)
    owner.add("user/public", {})
    with pytest.raises(TargetError, match=r"^user/public: is there already and is public"):
        sd.push_to_hub(path, "user/public", private=True)
    assert files(owner, "user/public") == {}


def test_what_is_refused_pushes_nothing(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    path = write(tmp_path / "a.shd")
    (tmp_path / "damaged.shd").write_bytes(path.read_bytes()[:-1])
    for delta, repo, more, kind, message in (
        (path, "style", {}, ArgumentError, "style: is not the name of a repository on the Hub; give it as user/repo"),
        (path, "user/a", {"base_model": "base"}, ArgumentError, "base: is not the name of a base on the Hub"),
        (path, "user/a", {"name": "a.bin"}, ArgumentError, r"a\.bin: is no name of a delta"),
        (tmp_path / "damaged.shd", "user/a", {}, FormatError, "truncated"),
        (path, "user/a", {}, TargetError, r"user/a: the Hub refuses the push \(401, .*\); log in with `hf auth login`"),
    ):
        with pytest.raises(kind, match=message) as caught:
            sd.push_to_hub(delta, repo, **more)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    assert hub.repos == {}
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(
        TargetError, match=r"^user/a: the Hub refuses the push \(Invalid metadata.*license.*; correct it"
    ):
        sd.push_to_hub(path, "user/a", license="mine")
    assert set(files(hub, "user/a")) == {".gitattributes"}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(TargetError, match=r"^user/a: HF_HUB_OFFLINE is set, so nothing is pushed"):
        sd.push_to_hub(path, "user/a")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(TargetError, match=r"^user/a: cannot be pushed \(.*\); check the connection"):
        sd.push_to_hub(path, "user/a")


@pytest.mark.parametrize("package", ["huggingface_hub", "jinja2"])
def test_without_its_packages(package: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=rf"needs {package}, .*; pip install "):
        sd.push_to_hub(write(tmp_path / "a.shd"), "user/a")
    assert hub.repos == {}


def test_the_command(owner: Hub, made: Path, tmp_path: Path):
    owner.add("org/base", files_of(made / "bf16"))
    words = ["convert", made / "tuned_a", "--base", "org/base", "-o", tmp_path / "style.shd"]
    assert CliRunner().invoke(main, list(map(str, words))).exit_code == 0
    result = CliRunner().invoke(main, ["push", str(tmp_path / "style.shd"), "user/style", "--license", "mit"])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("user/style/style.shd: pushed style.shd, README.md; http")
    assert result.stderr == ""
    head, body = head_and_body(files(owner, "user/style")["README.md"])
    assert head["base_model"] == "org/base"
    assert head["base_model_revision"] == owner.repos["org/base"].refs["main"]
    assert re.search(r"energy kept \| 0\.\d+ \|", body)
