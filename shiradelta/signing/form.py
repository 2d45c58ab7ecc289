"""The form of a signature file (spec/SIGNATURES.md): five lines, of which the last signs the others."""

from __future__ import annotations

import base64
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shiradelta.errors import SignatureError
from shiradelta.util.regular_file import read_small

#: The first line but for the version.  It also keeps a signature from being taken for one of anything else.
START = b"shiradelta signature "
VERSION = b"1"
#: What is added to the name of a file to get that of its signature.
SUFFIX = ".sig"
_FORM = re.compile(
    START + VERSION + b"\n"
    rb"key (SHA256:[A-Za-z0-9+/]{43})\n"
    rb"digest ([0-9a-f]{64})\n"
    rb"sha256 ([0-9a-f]{64})\n"
    rb"signature ([A-Za-z0-9+/]{86}==)\n"
)
#: More than any version needs.
_MOST_BYTES = 4096


@dataclass(frozen=True)
class Signature:
    """What a signature file says.

    Attributes:
        key: the fingerprint of the key that signed.
        digest: the content digest of the delta, hexadecimal.
        sha256: the SHA-256 of the whole file, hexadecimal.
        value: the Ed25519 signature of `message`, 64 bytes.
    """

    key: str
    digest: str
    sha256: str
    value: bytes = b""

    @property
    def message(self) -> bytes:
        """What is signed: the lines before the last."""
        lines = f"key {self.key}\ndigest {self.digest}\nsha256 {self.sha256}\n"
        return START + VERSION + b"\n" + lines.encode()

    def to_bytes(self) -> bytes:
        """The whole file."""
        return self.message + b"signature " + base64.b64encode(self.value) + b"\n"


def signature_file(delta: str | os.PathLike[str]) -> Path:
    """Where the signature of a `.shd` file is, if nothing else is said."""
    return Path(f"{os.fspath(delta)}{SUFFIX}")


def read_signature(path: Path) -> Signature:
    """Reads a signature file.  Nothing is verified.

    Raises:
        SignatureError: it cannot be read, or has not exactly the form.
    """
    try:
        data = read_small(path, _MOST_BYTES)
    except OSError as error:
        message = f"{path}: the signature cannot be read ({error.strerror}); get it from whoever signed the file"
        raise SignatureError(message) from None
    found = None if data is None else _FORM.fullmatch(data)
    if found is not None and data is not None:
        key, digest, sha256, value = (part.decode() for part in found.groups())
        signature = Signature(key, digest, sha256, base64.b64decode(value))
        if signature.to_bytes() == data:  # base64 can write the same bytes in several ways
            return signature
    first = (data or b"").partition(b"\n")[0]
    if re.fullmatch(START + rb"[0-9]{1,9}", first) and first != START + VERSION:
        raise SignatureError(f"{path}: is a signature of version {first[len(START) :].decode()}; upgrade shiradelta")
    raise SignatureError(f"{path}: is no signature of shiradelta, or is damaged; get it again")


def describe_signature(delta: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What the signature file beside a `.shd` file says, without verifying it; None if there is none."""
    path = signature_file(delta)
    if not os.path.lexists(path):
        return None
    try:
        found = read_signature(path)
    except SignatureError as error:
        return {"file": str(path), "key": None, "verified": False, "problem": str(error)}
    return {"file": str(path), "key": found.key, "verified": False, "problem": None}
