"""Key files: Ed25519 keys as PEM, which openssl makes, or in OpenSSH's form, which ssh-keygen makes."""

from __future__ import annotations

import base64
import codecs
import hashlib
import os
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from shiradelta.errors import SignatureError
from shiradelta.util.interrupts import uninterrupted
from shiradelta.util.optional import importing, require
from shiradelta.util.regular_file import read_small

Keys = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
Passphrase = str | bytes | Callable[[], str | bytes] | None

#: A key has some hundred bytes; a file may hold several.
_MOST_BYTES = 64 << 10
_BEGIN = re.compile(r"-----BEGIN ([A-Z0-9 ]{1,40})-----")
_SSH = "ssh-ed25519"
#: What is used of cryptography.
_PARTS = ("asymmetric.ed25519", "serialization")
_MAKE = "make one with `openssl genpkey -algorithm ed25519`"


@dataclass(frozen=True)
class PublicKey:
    """A public key; `raw` is its 32 bytes."""

    raw: bytes

    @property
    def fingerprint(self) -> str:
        """As `ssh-keygen -l` shows it: SHA-256 of the key in SSH's wire form, in base64."""
        name = _SSH.encode()
        blob = struct.pack(">I", len(name)) + name + struct.pack(">I", len(self.raw)) + self.raw
        return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")

    def verify(self, signature: bytes, message: bytes) -> bool:
        """Whether this key has made the signature of the message."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        try:
            Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, message)
        except InvalidSignature:
            return False
        return True


@dataclass(frozen=True)
class PrivateKey:
    """A private key; `exposed` says whether other users of the machine can read its file."""

    key: Any
    public: PublicKey
    exposed: bool

    def sign(self, message: bytes) -> bytes:
        """The signature of a message, 64 bytes."""
        return bytes(self.key.sign(message))


def public_keys(files: Keys) -> tuple[PublicKey, ...]:
    """The public keys in one or several files; a file may hold several.

    Raises:
        SignatureError: a file cannot be read, or holds anything but public Ed25519 keys.
        MissingDependencyError: cryptography is not installed.
    """
    _load_cryptography()
    paths = [Path(files)] if isinstance(files, str | os.PathLike) else [Path(file) for file in files]
    if not paths:
        raise SignatureError("no key is given; give the public key of whoever signs the files that you trust")
    return tuple(_public(path, *part) for path in paths for part in _parts(path))


def private_key(file: str | os.PathLike[str], passphrase: Passphrase = None) -> PrivateKey:
    """The private key in a file.

    Args:
        file: PEM (PKCS 8) or OpenSSH's form.
        passphrase: of an encrypted key, or a function that is called if the key is encrypted.

    Raises:
        SignatureError: the file cannot be read, holds anything but one private Ed25519 key, or the passphrase is wrong.
        MissingDependencyError: cryptography is not installed, or bcrypt, which encrypted keys of OpenSSH need.
    """
    _load_cryptography()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    path = Path(file)
    parts = _parts(path)
    label, text = next((part for part in parts if part[0].endswith("PRIVATE KEY")), parts[0])
    if not label.endswith("PRIVATE KEY"):
        raise SignatureError(f"{path}: holds {_what(label, text)} and no private key; give the private key")
    if len(parts) != 1:
        raise SignatureError(f"{path}: holds {len(parts)} keys; give a file with one private key")
    key = _decrypted(path, label, text.encode(), passphrase)
    if not isinstance(key, Ed25519PrivateKey):
        raise _unusable(path, "a private key of another kind")
    exposed = os.name != "nt" and bool(path.stat().st_mode & 0o077)
    return PrivateKey(key, PublicKey(key.public_key().public_bytes_raw()), exposed)


def _load_cryptography() -> None:
    """Imports cryptography where no signal reaches: one that comes within its compiled part ends in a traceback.

    Raises:
        MissingDependencyError: it is not installed, or cannot be loaded.
    """
    with importing("a signature"):
        uninterrupted(*(partial(import_module, f"cryptography.hazmat.primitives.{name}") for name in _PARTS))


def _decrypted(path: Path, label: str, data: bytes, passphrase: Passphrase) -> Any:
    """The private key of any kind in a part of a file."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key

    load = load_ssh_private_key if label.startswith("OPENSSH") else load_pem_private_key
    problem, encrypted = "is damaged; get it again", False
    try:
        try:
            return load(data, None)
        except TypeError:
            encrypted = True
            problem = "cannot be decrypted with this passphrase; give the key's own"
            if passphrase is None:
                raise SignatureError(f"{path}: the key is encrypted; give its passphrase") from None
            given = passphrase() if callable(passphrase) else passphrase
            return load(data, given.encode() if isinstance(given, str) else given)
    except (TypeError, ValueError):
        raise SignatureError(f"{path}: the key {problem}") from None
    except UnsupportedAlgorithm:
        if encrypted and label.startswith("OPENSSH"):
            require("bcrypt", "an encrypted key of OpenSSH")
        raise _unusable(path, "a private key of an unknown kind") from None


def _public(path: Path, label: str, text: str) -> PublicKey:
    """The public Ed25519 key in a part of a file."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key, load_ssh_public_key

    if label.endswith("PRIVATE KEY"):
        how = "ssh-keygen -y -f FILE" if label.startswith("OPENSSH") else "openssl pkey -in FILE -pubout"
        raise SignatureError(f"{path}: holds a private key; give the public one, which `{how}` prints")
    if label not in ("", "PUBLIC KEY"):
        raise _unusable(path, _what(label, text))
    try:
        if label:
            key = load_pem_public_key(text.encode())
        elif text.startswith(f"{_SSH} "):
            key = load_ssh_public_key(text.encode())
        else:
            raise _unusable(path, _what(label, text))
    except ValueError:
        raise SignatureError(f"{path}: the key is damaged; get it again") from None
    except UnsupportedAlgorithm:
        raise _unusable(path, _what(label, text)) from None
    if not isinstance(key, Ed25519PublicKey):
        raise _unusable(path, "a public key of another kind")
    return PublicKey(key.public_bytes_raw())


def _unusable(path: Path, what: str) -> SignatureError:
    return SignatureError(f"{path}: holds {what}; only Ed25519 keys can be used: {_MAKE}")


def _what(label: str, text: str) -> str:
    """What a part of a file is, for people.  Nothing of a key itself is shown."""
    if label:
        return f"a block of PEM with the label {label!r}"
    kind = re.match(r"(ssh|ecdsa|sk)-[a-z0-9@.-]{1,50}(?= )", text)
    return "no key" if kind is None else f"a key of SSH of the kind {kind[0]}"


def _parts(path: Path) -> list[tuple[str, str]]:
    """(label, text) of each key in a file: a block of PEM with its label, or a line of OpenSSH without one."""
    try:
        data = read_small(path, _MOST_BYTES)
    except OSError as error:
        raise SignatureError(f"{path}: the key cannot be read ({error.strerror}); check the path") from None
    if data is None:
        raise SignatureError(f"{path}: has more than {_MOST_BYTES >> 10} KiB, too many for keys; give a key file")
    try:
        lines = iter([line.strip() for line in data.removeprefix(codecs.BOM_UTF8).decode().splitlines()])
    except UnicodeDecodeError:
        raise SignatureError(f"{path}: is no text, so it holds no key in PEM or of OpenSSH; give a key file") from None
    parts = []
    for line in lines:
        begin = _BEGIN.fullmatch(line)
        if begin is not None:
            body = [line]
            for inner in lines:
                body.append(inner)
                if inner.startswith("-----"):
                    break
            parts.append((begin[1], "\n".join(body) + "\n"))
        elif line and not line.startswith("#"):
            parts.append(("", line))
    if not parts:
        raise SignatureError(f"{path}: holds no key; {_MAKE}")
    return parts
