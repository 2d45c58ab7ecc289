"""What is on the Hub is read by its name, against a stand-in of the Hub on this machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import shiradelta
from shiradelta.errors import MissingDependencyError, ShiraDeltaError, SourceError
from shiradelta.io.download import local_delta, local_model
from tests.hub import TOKEN, Hub, files_of
from tests.scenes import contents


def push(hub: Hub, made: Path) -> str:
    """The base, with files that are not read, and a repository with the delta `a.shd`; returns the base's commit."""
    others = dict.fromkeys(("pytorch_model.bin", "model.gguf", "original/model.pth", "model.fp16.safetensors"), b"x")
    hub.add("user/delta", {"a.shd": (made / "a.shd").read_bytes(), "README.md": b""})
    return hub.add("org/base", {**files_of(made / "bf16"), **others})


@pytest.mark.slow
def test_every_command_takes_names(hub: Hub, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    commit = push(hub, made)
    hub.add("user/tuned", files_of(made / "tuned_a"))
    report = shiradelta.convert("user/tuned", base="org/base", sparsity=0.05, values="int8")
    assert report.out == "tuned.shd"
    with shiradelta.open_delta("user/delta") as one, shiradelta.open_delta("tuned.shd") as other:
        assert one.digest == other.digest
        pairs = {"source": "user/tuned", "base": "org/base", "base_revision": commit}
        assert {key: other.metadata[key] for key in pairs} == pairs
    assert shiradelta.verify("org/base", "user/delta/a.shd").state == "base"
    shiradelta.apply("org/base", "user/delta@main", out="patched")
    assert shiradelta.verify("patched", "user/delta").state == "patched"
    shiradelta.fuse({"user/delta": 0.5}, "half.shd", base="org/base")
    shiradelta.export("user/delta", "merged", "merged", model="org/base")
    weights = {name: np.zeros((2, 2), np.float32) for name in ("w",)}
    hub.add("user/tiny", {"style.shd": tiny(tmp_path)})
    assert shiradelta.load(weights, "user/tiny", 0.5).active == {"style": 0.5}
    cached = {path.name for path in (tmp_path / "hub").rglob("*") if path.is_symlink() or path.is_file()}
    assert not cached & {"pytorch_model.bin", "model.gguf", "model.pth", "model.fp16.safetensors"}


def tiny(folder: Path) -> bytes:
    shiradelta.save_delta(folder / "tiny.shd", {"w": shiradelta.TensorDelta((2, 2), [1], [1.0], "float32")})
    return (folder / "tiny.shd").read_bytes()


def test_a_download_is_kept_and_the_cache_is_never_written_to(hub: Hub, made: Path, tmp_path: Path):
    push(hub, made)
    folder = local_model("org/base")
    local_delta("user/delta")
    before = contents(tmp_path / "hub")
    downloads = sum(asked.startswith("GET") and "/resolve/" in asked for asked in hub.asked)
    assert local_model("org/base") == folder
    assert sum(asked.startswith("GET") and "/resolve/" in asked for asked in hub.asked) == downloads
    for model, why in (("org/base", "nothing on the Hub is patched in place"), (folder, "is in the Hub's cache")):
        with pytest.raises(ShiraDeltaError, match=f"{why}.*give --out FOLDER"):
            shiradelta.apply(model, "user/delta")
    assert contents(tmp_path / "hub") == before


def test_revisions(hub: Hub, tmp_path: Path):
    first = hub.add("user/delta", {"one.shd": tiny(tmp_path)})
    hub.repos["user/delta"].refs["v1"] = first
    hub.repos["user/delta"].commit({"two.shd": tiny(tmp_path)})
    for revision in ("v1", first):
        assert local_delta(f"user/delta@{revision}").name == "one.shd"
    assert local_delta("user/delta/two.shd").name == "two.shd"
    with pytest.raises(SourceError, match=r"^user/delta@v2: user/delta has no revision 'v2'; give a branch"):
        local_delta("user/delta@v2")


MISTAKES: list[tuple[str, str]] = [
    ("user/none", r"no such file or folder here, and the Hub has no repository user/none; check the name, or log in"),
    ("user/private", r"no repository user/private; check the name, or log in with `hf auth login` if it is private"),
    ("user/many", r"has several \.shd files \(a\.shd, b\.shd\); give one of them, such as user/many/a\.shd"),
    ("user/many@main", r"such as user/many@main/a\.shd"),
    ("user/many/c.shd", r"user/many has no file c\.shd; it has a\.shd, b\.shd"),
    ("user/many/folder", r"user/many has no such file or folder; it has a\.shd, b\.shd"),
    ("user/without", r"has no \.shd file \(it has model\.safetensors\); `shiradelta convert user/without` makes one"),
    ("user/gated/a.shd", r"user/gated is gated; accept its terms on its page, and log in"),
]


@pytest.mark.parametrize(("path", "message"), MISTAKES)
def test_mistakes_are_one_line(hub: Hub, path: str, message: str):
    hub.add("user/many", {"b.shd": b"", "a.shd": b""})
    hub.add("user/without", {"model.safetensors": b""})
    hub.add("user/private", {"a.shd": b""}, private=True)
    hub.add("user/gated", {"a.shd": b""}, gated=True)
    with pytest.raises(ShiraDeltaError, match=f"^{re.escape(path)}: .*{message}") as caught:
        shiradelta.open_delta(path)
    assert "\n" not in str(caught.value)


def test_a_token_opens_a_private_repository(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hub.add("user/private", {"a.shd": tiny(tmp_path)}, private=True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert local_delta("user/private").name == "a.shd"


def test_offline_the_cache_is_read(hub: Hub, made: Path, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    push(hub, made)
    online = [local_delta("user/delta"), local_model("org/base")]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.asked)
    assert [local_delta("user/delta"), local_model("org/base")] == online
    assert [local_delta("user/delta/a.shd"), local_model("org/base@main")] == online
    with pytest.raises(SourceError, match=r"^user/other: .* nor in the Hub's cache, and HF_HUB_OFFLINE is set"):
        local_delta("user/other")
    assert len(hub.asked) == asked


def test_a_hub_that_does_not_answer(hub: Hub, made: Path, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    push(hub, made)
    online = local_delta("user/delta")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert local_delta("user/delta") == online
    with pytest.raises(
        SourceError, match=r"^user/other: .* cannot be had from the Hub \(.*check the path and the conn"
    ):
        local_delta("user/other")


FILES: dict[str, tuple[str, set[str], set[str]]] = {
    "a pipeline": (
        "",
        {"model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "vae/model.safetensors"},
        {"all.safetensors", "unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.safetensors"},
    ),
    "a part": ("unet", {"unet/config.json", "unet/model.safetensors"}, {"vae/model.safetensors", "model_index.json"}),
    "an adapter": (
        "",
        {"adapter_config.json", "adapter_model.safetensors"},
        {"checkpoint-1/adapter_model.safetensors", "optimizer.pt", ".gitattributes"},
    ),
    "an adapter's file": ("a.safetensors", {"a.safetensors", "adapter_config.json"}, {"b.safetensors"}),
    "pickles": ("", {"config.json", "pytorch_model.bin"}, {"model.onnx", "tf_model.h5"}),
    "sentences": ("", {"modules.json", "model.safetensors", "2_Dense/model.safetensors"}, {"onnx/model.onnx"}),
    "two layouts": ("", {"model-1.safetensors", "model.safetensors.index.json"}, {"consolidated.safetensors"}),
}


@pytest.mark.parametrize(("file", "read", "left"), FILES.values(), ids=FILES)
def test_only_what_is_read_is_downloaded(hub: Hub, file: str, read: set[str], left: set[str]):
    hub.add("user/repo", dict.fromkeys(sorted(read | left), b"{}"))
    found = local_model(f"user/repo/{file}", pickles=True)
    folder = found.parents[file.count("/")] if file else found
    assert set(files_of(folder)) == read


def test_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for read in (local_delta, local_model):
        with pytest.raises(MissingDependencyError, match=r"^user/repo: no such file.*pip install 'shiradelta\[hub\]'"):
            read("user/repo")


@pytest.mark.slow
def test_the_command_line_in_a_process_of_its_own(hub: Hub, made: Path, tmp_path: Path):
    """The variables of huggingface_hub are all that says where the Hub is."""
    push(hub, made)
    command = [sys.executable, "-m", "shiradelta", "info", "user/delta", "--verify"]
    done = subprocess.run(command, cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, check=True)
    assert "model.embed_tokens.weight" in done.stdout
