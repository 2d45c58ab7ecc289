"""Keys of all kinds, and a signed delta."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shiradelta as sd

PASSPHRASE = b"correct horse"


def write_keys(folder: Path) -> Path:
    """private.pem, public.pem, the same of another key, of OpenSSH, encrypted, and of other kinds."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed448, rsa
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import (
        BestAvailableEncryption,
        Encoding,
        KeySerializationEncryption,
        NoEncryption,
        PrivateFormat,
        PublicFormat,
    )

    def write(name: str, key: Any, encryption: KeySerializationEncryption | None = None) -> None:
        forms = [(".pem", Encoding.PEM, PrivateFormat.PKCS8)]
        if name in ("", "rsa_"):
            forms += [("_ssh", Encoding.PEM, PrivateFormat.OpenSSH)]
        for ending, encoding, form in forms:
            path = folder / f"{name}private{ending}"
            path.write_bytes(key.private_bytes(encoding, form, encryption or NoEncryption()))
            path.chmod(0o600)
        public = key.public_key()
        form = PublicFormat.SubjectPublicKeyInfo
        (folder / f"{name}public.pem").write_bytes(public.public_bytes(Encoding.PEM, form))
        if name in ("", "rsa_", "ec_"):
            line = public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
            (folder / f"{name}public_ssh").write_bytes(line + b" me@example.org\n")

    key = Ed25519PrivateKey.generate()
    write("", key)
    write("other_", Ed25519PrivateKey.generate())
    write("encrypted_", key, BestAvailableEncryption(PASSPHRASE))
    write("rsa_", rsa.generate_private_key(65537, 1024))
    write("ec_", ec.generate_private_key(ec.SECP256R1()))
    write("ed448_", ed448.Ed448PrivateKey.generate())
    traditional = PrivateFormat.TraditionalOpenSSL
    (folder / "rsa_old.pem").write_bytes(
        rsa.generate_private_key(65537, 1024).private_bytes(Encoding.PEM, traditional, NoEncryption())
    )
    return folder


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of keys; see `write_keys`."""
    pytest.importorskip("cryptography")
    return write_keys(tmp_path_factory.mktemp("keys"))


def write_delta(path: Path, value: float, **metadata: str) -> Path:
    """A delta of one tensor."""
    tensor = sd.TensorDelta((64, 64), np.arange(0, 400, 2), np.full(200, value), "float32")
    sd.save_delta(path, {"w": tensor}, metadata=metadata)
    return path


@pytest.fixture
def signed(keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a.shd, signed, b.shd, not signed, and the keys; entered."""
    monkeypatch.chdir(tmp_path)
    for key in keys.iterdir():
        (tmp_path / key.name).write_bytes(key.read_bytes())
        (tmp_path / key.name).chmod(0o600)
    write_delta(tmp_path / "a.shd", 1.0)
    write_delta(tmp_path / "b.shd", 2.0)
    sd.sign("a.shd", "private.pem")
    return tmp_path
