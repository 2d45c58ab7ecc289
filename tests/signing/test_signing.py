"""Signatures: what spec/SIGNATURES.md says, what is refused, and that what is used is what was verified."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

import shiradelta as sd
from shiradelta.cli import main
from shiradelta.signing.form import read_signature
from shiradelta.signing.keys import private_key, public_keys
from tests.conftest import read
from tests.hub import Hub
from tests.recoded import write_small
from tests.scenes import contents
from tests.signing.conftest import PASSPHRASE, write_delta

pytest.importorskip("cryptography")
ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "spec" / "vectors" / "valid" / "example.shd"
UP = "model.layers.0.mlp.up_proj.weight"


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


def refusal(*arguments: str | Path) -> str:
    """The one line of a command that fails."""
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("error: ")


# --- the form ---


def test_the_example_of_the_specification(tmp_path: Path):
    """Signed anew with the private key it is the same: Ed25519 has no chance in it."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    text = (ROOT / "spec" / "SIGNATURES.md").read_text()
    blocks = dict(re.findall(r"```(pem|text)\n(.*?)```", text, re.DOTALL))
    (tmp_path / "public.pem").write_text(blocks["pem"])
    (tmp_path / "example.sig").write_text(blocks["text"])
    report = sd.verify_signature(EXAMPLE, tmp_path / "public.pem", tmp_path / "example.sig")
    assert (report.file, report.key) == (str(EXAMPLE), "SHA256:bbXpuKG6zhzdmnxq256TlqzFBzRl2f6OOg722cYNbU8")
    found = re.search(r"private +([0-9a-f]{64})", text)
    assert found is not None
    private = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(found[1]))
    (tmp_path / "private.pem").write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    sd.sign(EXAMPLE, tmp_path / "private.pem", tmp_path / "again.sig")
    assert (tmp_path / "again.sig").read_text() == blocks["text"]


def test_every_byte_of_a_signature_matters(signed: Path):
    good = Path("a.shd.sig").read_bytes()
    assert len(good) == 321
    for at in range(len(good)):
        changed = good[at] ^ (1, 32, 128)[at % 3]
        Path("a.shd.sig").write_bytes(good[:at] + bytes([changed]) + good[at + 1 :])
        with pytest.raises(sd.SignatureError):
            sd.verify_signature("a.shd", "public.pem")
    Path("a.shd.sig").write_bytes(good)
    sd.verify_signature("a.shd", "public.pem")


@pytest.mark.parametrize("at", [8, 80, 100, 130, 200, -1])
def test_every_byte_of_the_file_matters(signed: Path, at: int):
    data = bytearray(Path("a.shd").read_bytes())
    data[at] ^= 1
    Path("a.shd").write_bytes(data)
    with pytest.raises(sd.SignatureError, match=r"is not the file that a\.shd\.sig signs"):
        sd.verify_signature("a.shd", "public.pem")


def test_metadata_are_signed_although_the_content_digest_leaves_them_out(signed: Path):
    write_delta(signed / "a.shd", 1.0, base="another")
    with sd.open_delta("a.shd") as delta:
        assert delta.digest == read_signature(Path("a.shd.sig")).digest
    with pytest.raises(sd.SignatureError, match="is not the file"):
        sd.verify_signature("a.shd", "public.pem")


def test_the_content_digest_is_recomputed_before_a_file_is_signed(signed: Path):
    from shiradelta.format.header import crc32

    data = bytearray(Path("b.shd").read_bytes())
    data[80] ^= 1  # the digest in the header, with a right checksum
    data[124:128] = crc32(bytes(data[:124])).to_bytes(4, "little")
    Path("b.shd").write_bytes(data)
    with pytest.raises(sd.FormatError, match="digest_mismatch"):
        sd.sign("b.shd", "private.pem")
    assert not Path("b.shd.sig").exists()


def test_what_needs_its_base_is_signed_by_who_has_it_and_verified_by_anyone(signed: Path):
    """A signer has to compute the content digest (spec/SIGNATURES.md); a verifier compares two digests."""
    path = write_small(signed)
    with pytest.raises(sd.FormatError, match="shiradelta recode"):
        sd.sign(path, "private.pem")
    with sd.open_delta(path) as delta:
        digest = delta.digest
    with pytest.raises(sd.FormatError, match="wrong_base"):
        sd.sign(path, "private.pem", base="after")
    assert not Path(f"{path}.sig").exists()
    assert sd.sign(path, "private.pem", base="base").digest == digest
    assert run("sign", path, "--key", "private.pem", "--base", "base", "--force").exit_code == 0
    assert sd.verify_signature(path, "public.pem").digest == digest
    assert run("verify", path, "--key", "public.pem").exit_code == 0
    assert "base: exactly the base" in run("verify", "base", path, "--key", "public.pem").stdout
    assert run("apply", "base", path, "--key", "public.pem").exit_code == 0
    assert "patched: exactly" in run("verify", "base", path, "--key", "public.pem").stdout


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no signature of shiradelta"),
        (b"\0" * 321, "is no signature of shiradelta"),
        (b"untrusted comment: minisign\n" * 4, "is no signature of shiradelta"),
        (b"shiradelta signature 2\n" + b"x" * 100, "is a signature of version 2; upgrade"),
        (b"shiradelta signature 1\n" * 100_000, "is no signature of shiradelta"),
    ],
    ids=["empty", "zeros", "other", "newer", "large"],
)
def test_what_is_no_signature_is_refused(signed: Path, content: bytes, message: str):
    Path("a.shd.sig").write_bytes(content)
    with pytest.raises(sd.SignatureError, match=message):
        sd.verify_signature("a.shd", "public.pem")


@pytest.mark.parametrize("change", ["crlf", "cut", "longer", "other base64"])
def test_the_form_is_exact(signed: Path, change: str):
    good = Path("a.shd.sig").read_bytes()
    changed = {
        "crlf": good.replace(b"\n", b"\r\n"),
        "cut": good[:-1],
        "longer": good + b"\n",
        # Two bits of the last character before == encode nothing.
        "other base64": good[:-4] + {b"A": b"B", b"Q": b"R", b"g": b"h", b"w": b"x"}[good[-4:-3]] + b"==\n",
    }
    Path("a.shd.sig").write_bytes(changed[change])
    with pytest.raises(sd.SignatureError, match="is no signature of shiradelta, or is damaged"):
        sd.verify_signature("a.shd", "public.pem")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")
def test_pipes_folders_and_gigabytes_are_refused_at_once(signed: Path):
    with open("large", "wb") as stream:
        stream.truncate(1 << 30)
    os.mkfifo("pipe")
    for name in ("large", "pipe", ".", "nothing"):
        with pytest.raises(sd.SignatureError):
            sd.verify_signature("a.shd", "public.pem", signature=name)
        with pytest.raises(sd.SignatureError):
            sd.verify_signature("a.shd", name)
        with pytest.raises(sd.SignatureError):
            sd.sign("b.shd", name)


def test_another_files_signature_and_a_missing_one_are_refused(signed: Path):
    with pytest.raises(sd.SignatureError, match=r"b.shd.sig: the signature cannot be read"):
        sd.verify_signature("b.shd", "public.pem")
    shutil.copy("a.shd.sig", "b.shd.sig")
    with pytest.raises(sd.SignatureError, match=r"b.shd: is not the file that b.shd.sig signs"):
        sd.verify_signature("b.shd", "public.pem")


def test_a_signature_that_names_a_trusted_key_and_was_made_by_another(signed: Path):
    """The fingerprint is a claim: who has another key can write it, too."""
    sd.sign("a.shd", "other_private.pem", "other.sig")
    mine, other = (read_signature(Path(name)) for name in ("a.shd.sig", "other.sig"))
    Path("a.shd.sig").write_bytes(other.to_bytes().replace(other.key.encode(), mine.key.encode()))
    with pytest.raises(sd.SignatureError, match="has not made this signature"):
        sd.verify_signature("a.shd", "public.pem")


# --- keys ---


@pytest.mark.parametrize("private", ["private.pem", "private_ssh"])
@pytest.mark.parametrize("public", ["public.pem", "public_ssh"])
def test_keys_of_openssl_and_of_openssh(signed: Path, private: str, public: str):
    made = sd.sign("b.shd", private)
    assert sd.verify_signature("b.shd", public).key == made.key
    assert made.warnings == ()


def test_any_of_several_keys_is_enough(signed: Path):
    with pytest.raises(sd.SignatureError, match=r"is by the key SHA256:.* none of the given ones \(SHA256:"):
        sd.verify_signature("a.shd", "other_public.pem")
    sd.verify_signature("a.shd", ["other_public.pem", "public.pem"])
    ours = ["# our keys\n", "\n", *(Path(name).read_text() for name in ("other_public.pem", "public_ssh"))]
    Path("all").write_text("".join(ours))
    sd.verify_signature("a.shd", "all")
    with pytest.raises(sd.SignatureError, match="no key is given"):
        sd.verify_signature("a.shd", [])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rsa_public.pem", "only Ed25519 keys can be used"),
        ("rsa_public_ssh", "holds a key of SSH of the kind ssh-rsa; only Ed25519"),
        ("ec_public_ssh", "holds a key of SSH of the kind ecdsa-sha2-nistp256; only Ed25519"),
        ("ed448_public.pem", "only Ed25519 keys can be used"),
        ("private.pem", "holds a private key; give the public one, which `openssl pkey"),
        ("private_ssh", "holds a private key; give the public one, which `ssh-keygen"),
        ("encrypted_private.pem", "holds a private key"),
        ("a.shd", "is no text"),
        ("a.shd.sig", "holds no key; only Ed25519 keys can be used"),
    ],
)
def test_what_is_no_public_key_of_ed25519_is_refused(signed: Path, name: str, message: str):
    with pytest.raises(sd.SignatureError, match=message) as caught:
        sd.verify_signature("a.shd", name)
    assert str(caught.value).startswith(name)
    with pytest.raises(sd.SignatureError, match=message):  # beside a good key, too: nothing is left out
        sd.verify_signature("a.shd", ["public.pem", name])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rsa_private.pem", "holds a private key of another kind; only Ed25519"),
        ("rsa_old.pem", "holds a private key of another kind; only Ed25519"),
        ("rsa_private_ssh", "holds a private key of another kind; only Ed25519"),
        ("ec_private.pem", "holds a private key of another kind; only Ed25519"),
        ("ed448_private.pem", "holds a private key of another kind; only Ed25519"),
        ("public.pem", "holds a block of PEM with the label 'PUBLIC KEY' and no private key"),
        ("public_ssh", "holds a key of SSH of the kind ssh-ed25519 and no private key"),
        ("a.shd", "is no text"),
    ],
)
def test_what_is_no_private_key_of_ed25519_is_refused(signed: Path, name: str, message: str):
    with pytest.raises(sd.SignatureError, match=message):
        sd.sign("b.shd", name)
    assert not Path("b.shd.sig").exists()


@pytest.mark.parametrize("name", ["public.pem", "public_ssh", "private.pem", "private_ssh"])
def test_damaged_keys_end_in_one_error(signed: Path, name: str):
    good = Path(name).read_bytes()
    random = np.random.default_rng(0)
    for _ in range(150):
        data = bytearray(good)
        for at in random.integers(len(data), size=random.integers(1, 4)):
            data[at] = random.integers(256)
        Path("key").write_bytes(data[: random.integers(len(data) // 2, len(data) + 1)])
        with contextlib.suppress(sd.SignatureError):
            public_keys("key") if "public" in name else private_key("key")


def test_encrypted_keys(signed: Path):
    key = "encrypted_private.pem"
    asked = []
    sd.sign("b.shd", key, passphrase=PASSPHRASE)
    sd.sign("b.shd", key, passphrase=lambda: asked.append(1) or PASSPHRASE.decode(), force=True)
    sd.sign("b.shd", "private.pem", passphrase=lambda: asked.append(2) or "", force=True)
    assert asked == [1]
    sd.verify_signature("b.shd", "public.pem")
    for wrong in ("", "wrong", b"\xff"):
        with pytest.raises(sd.SignatureError, match="cannot be decrypted with this passphrase"):
            sd.sign("b.shd", key, passphrase=wrong, force=True)
    assert "is encrypted; give its passphrase with --passphrase-file" in refusal(
        "sign", "b.shd", "--key", key, "-o", "n.sig"
    )
    Path("passphrase").write_bytes(PASSPHRASE + b"\n")
    assert run("sign", "b.shd", "--key", key, "--passphrase-file", "passphrase", "--force").exit_code == 0


@pytest.mark.skipif(find_spec("bcrypt") is not None, reason="bcrypt is installed")
@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not there")
def test_an_encrypted_key_of_openssh_needs_bcrypt(signed: Path):
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "a song", "-f", "encrypted_ssh"], check=True)
    with pytest.raises(sd.MissingDependencyError, match="an encrypted key of OpenSSH needs bcrypt"):
        sd.sign("b.shd", "encrypted_ssh", passphrase="a song")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_a_private_key_that_others_can_read_is_warned_of(signed: Path):
    Path("private.pem").chmod(0o640)
    result = run("sign", "b.shd", "--key", "private.pem")
    assert result.exit_code == 0
    assert result.stderr.startswith("warning: private.pem: other users can read this private key; `chmod 600`")


def test_keys_and_signatures_agree_with_openssl_and_ssh_keygen(signed: Path):
    """OpenSSL verifies our signature; the keys that the commands of docs/signing.md make can be used."""
    if not shutil.which("openssl") or not shutil.which("ssh-keygen"):
        pytest.skip("openssl and ssh-keygen are not there")

    def other(command: str, *more: str) -> str:
        return subprocess.run([*command.split(), *more], capture_output=True, text=True, check=True).stdout

    lines = Path("a.shd.sig").read_bytes().splitlines(keepends=True)
    Path("message").write_bytes(b"".join(lines[:4]))
    Path("value").write_bytes(read_signature(Path("a.shd.sig")).value)
    try:
        other("openssl pkeyutl -verify -pubin -inkey public.pem -rawin -in message -sigfile value")
    except subprocess.CalledProcessError:
        pytest.skip("this openssl knows no Ed25519")
    assert other("ssh-keygen -lf public_ssh").split()[1] == read_signature(Path("a.shd.sig")).key
    other("openssl genpkey -algorithm ed25519 -out new.pem")
    other("openssl pkey -in new.pem -pubout -out new_public.pem")
    other("ssh-keygen -q -t ed25519 -f new_ssh", "-N", "")
    for private, public in (("new.pem", "new_public.pem"), ("new_ssh", "new_ssh.pub")):
        sd.sign("b.shd", private, force=True)
        sd.verify_signature("b.shd", public)


# --- the commands ---


def test_sign_replaces_a_signature_only_if_asked_and_nothing_else_ever(signed: Path):
    before = contents(signed)
    assert "a.shd.sig: is there already; add --force" in refusal("sign", "a.shd", "--key", "other_private.pem")
    for force in ((), ("--force",)):
        message = refusal("sign", "a.shd", "--key", "private.pem", "-o", "b.shd", *force)
        assert "b.shd: is there" in message
    assert contents(signed) == before
    assert run("sign", "a.shd", "--key", "other_private.pem", "--force").exit_code == 0
    assert sorted(set(contents(signed)) - set(before)) == []
    sd.verify_signature("a.shd", "other_public.pem")


def test_verify_checks_a_signature(signed: Path):
    result = run("verify", "a.shd", "--key", "public.pem")
    key = read_signature(Path("a.shd.sig")).key
    assert (result.exit_code, result.stdout.startswith(f"a.shd: signed by the key {key}, digest ")) == (0, True)
    found = json.loads(run("verify", "a.shd", "--key", "public_ssh", "--json").stdout)
    assert found["signature"]["holds"] is True
    assert found["signature"]["key"] == key
    assert "none of the given ones" in refusal("verify", "a.shd", "--key", "other_public.pem")
    result = run("verify", "a.shd", "--key", "other_public.pem", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["signature"]["holds"] is False
    for key in ("nothere", "private.pem"):  # an error, as of other commands, and no verdict
        assert refusal("verify", "a.shd", "--key", key, "--json").startswith(f"{key}: ")
    shutil.move("a.shd.sig", "elsewhere.sig")
    assert run("verify", "a.shd", "--key", "public.pem", "--signature", "elsewhere.sig").exit_code == 0
    for wrong in (("--signature", "elsewhere.sig"), ("--key", "public.pem", "--full")):
        assert run("verify", "a.shd", *wrong).exit_code == 2
    assert run("verify", signed, "--key", "public.pem").exit_code == 2


def test_info_shows_a_signature_and_says_that_it_is_not_verified(signed: Path):
    key = read_signature(Path("a.shd.sig")).key
    assert f"a.shd.sig: a signature by the key {key}, not verified" in run("info", "a.shd").stdout
    about = json.loads(run("info", "a.shd", "--json").stdout)["signature"]
    assert (about["key"], about["verified"]) == (key, False)
    assert json.loads(run("info", "b.shd", "--json").stdout)["signature"] is None
    Path("b.shd.sig").write_text("\x1b[31mjunk")
    shown = run("info", "b.shd")
    assert shown.exit_code == 0
    assert "b.shd.sig: is no signature of shiradelta" in shown.stdout


# --- folders and live models ---


@pytest.fixture
def folder(made: Path, signed: Path) -> Path:
    """A working folder with model/, style.shd, signed, and task.shd, not signed."""
    shutil.copytree(made / "bf16", "model")
    shutil.copy(made / "a.shd", "style.shd")
    shutil.copy(made / "b.shd", "task.shd")
    sd.sign("style.shd", "private.pem")
    return signed


def test_apply_refuses_what_is_not_signed_before_anything_is_written(folder: Path):
    before = contents(folder)
    assert "task.shd.sig: the signature cannot be read" in refusal("apply", "model", "task.shd", "--key", "public.pem")
    for out in ((), ("--out", "copy")):
        command = ("apply", "model", "style.shd", "--key", "other_public.pem", *out)
        assert "none of the given ones" in refusal(*command)
    with sd.open_delta("style.shd") as delta, pytest.raises(sd.ArgumentError, match="give the path of the file"):
        sd.apply("model", delta, key="public.pem")
    with pytest.raises(sd.ArgumentError, match="proves nothing without a key"):
        sd.apply("model", "style.shd", signature="style.shd.sig")
    assert contents(folder) == before
    result = run("apply", "model", "style.shd", "--key", "other_public.pem", "--key", "public.pem")
    assert result.exit_code == 0
    result = run("verify", "model", "style.shd", "--key", "public.pem", "--json")
    found = json.loads(result.stdout)
    assert (found["state"], found["signature"]["holds"]) == ("patched", True)
    assert run("revert", "model").exit_code == 0
    assert "base: exactly" in run("verify", "model", "style.shd", "--key", "public.pem").stdout


def test_apply_uses_the_bytes_that_it_has_verified(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Somebody writes another delta into the file in place, right after the signature was verified."""
    from shiradelta.folder import apply as module

    shutil.copytree("model", "expected")
    sd.apply("expected", "style.shd")
    plan = module.make_plan

    def then(*arguments: object) -> object:
        Path("style.shd").write_bytes(Path("task.shd").read_bytes())
        return plan(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "make_plan", then)
    sd.apply("model", "style.shd", key="public.pem")
    assert np.array_equal(read(folder / "model", UP), read(folder / "expected", UP))


def test_a_live_model_loads_only_what_is_signed(signed: Path):
    weight = np.zeros((64, 64), np.float32)
    swap = sd.HotSwap({"w": weight})
    for key, source in (("other_public.pem", "a.shd"), ("public.pem", "b.shd")):
        with pytest.raises(sd.SignatureError):
            swap.load("a", source, key=key)
    with pytest.raises(sd.ArgumentError, match="bytes have no signature beside them; `verify_signature` takes its"):
        swap.load("a", Path("a.shd").read_bytes(), key="public.pem")
    assert not swap.loaded
    swap.load("a", "a.shd", key="public.pem")
    swap.switch("a")
    assert weight.sum() == 200
    data = Path("a.shd").read_bytes()
    sd.verify_signature(data, "public.pem", "a.shd.sig")


def test_the_examples_of_the_documentation(signed: Path, monkeypatch: pytest.MonkeyPatch):
    """All of docs/signing.md, in its order; its keys are made here where openssl is not there."""
    shutil.copytree(signed, "page")
    monkeypatch.chdir(signed / "page")
    for name in (*Path().glob("*.pem"), Path("a.shd.sig")):
        if shutil.which("openssl") or name.suffix == ".sig":
            name.unlink()
    Path("a.shd").rename("style.shd")
    save_file({"w": torch.zeros(64, 64)}, Path("model.safetensors"))
    Path("model").mkdir()
    Path("model.safetensors").rename("model/model.safetensors")
    text = (ROOT / "docs" / "signing.md").read_text()
    for language, block in re.findall(r"```(sh|python)\n(.*?)```", text, re.DOTALL):
        if language == "python":
            exec(compile(block, "signing.md", "exec"), {})
            continue
        for line in block.splitlines():
            if line.startswith("shiradelta "):
                assert run(*line.split()[1:]).exit_code == 0, line
            elif shutil.which("openssl"):
                subprocess.run(line.split(), check=True, capture_output=True)
    assert Path("style.shd.sig").exists()


def test_a_signature_on_the_hub_comes_with_its_file(signed: Path, hub: Hub):
    files = {name: (signed / name).read_bytes() for name in ("a.shd", "a.shd.sig")}
    hub.add("user/signed", files)
    hub.add("user/unsigned", {"a.shd": files["a.shd"]})
    weights = {"w": np.zeros((64, 64), np.float32)}
    assert sd.verify_signature("user/signed", "public.pem").file.endswith("a.shd")
    assert list(sd.load(weights, "user/signed", key="public.pem")) == ["a"]
    with pytest.raises(sd.SignatureError, match=r"a\.shd\.sig"):
        sd.verify_signature("user/unsigned", "public.pem")
