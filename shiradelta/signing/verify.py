"""`verify_signature`: whether a `.shd` file is signed by a key that is trusted."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from shiradelta.errors import ArgumentError, SignatureError
from shiradelta.format.codecs.base import Bytes
from shiradelta.io.reader import Delta, Source, bytes_of, local_source, parse_delta
from shiradelta.signing.form import SUFFIX, read_signature, signature_file
from shiradelta.signing.keys import Keys, public_keys
from shiradelta.util.arguments import OPEN, checked


@dataclass(frozen=True)
class SignatureReport:
    """Report of a signature that holds.

    Attributes:
        file: the signed file, or "delta" where it has no name.
        signature: the signature file.
        key: the fingerprint of the key that signed.
        digest: the content digest, hexadecimal.
        sha256: the SHA-256 of the whole file, hexadecimal.
    """

    file: str
    signature: str
    key: str
    digest: str
    sha256: str


@checked(delta=OPEN)
def verify_signature(delta: Source, key: Keys, signature: str | os.PathLike[str] | None = None) -> SignatureReport:
    """Checks that a `.shd` file is, byte for byte, what the owner of a key has signed, and that it is whole.

    Of a file that is read with its base only, the sections are compared with their checksums; who has it decodes it.

    Args:
        delta: a path, bytes, or a binary file.
        key: a file of public keys (PEM or OpenSSH's form), or several files; any of the keys is enough.
        signature: the signature file; None for the name of `delta` with ".sig" behind it.

    Raises:
        SignatureError: it is not signed by any of the keys, or a key cannot be used.
        FormatError: it is signed, and damaged all the same.
        ArgumentError: bytes are given without a signature file.
        MissingDependencyError: cryptography is not installed.
    """
    opened, report = open_signed(delta, key, signature)
    with opened:
        opened.verify_without_base()
    return report


def open_signed(
    delta: Source, key: Keys, signature: str | os.PathLike[str] | None = None, *, limit: int | str | None = None
) -> tuple[Delta, SignatureReport]:
    """The open file, and the report of `verify_signature`, whose arguments and errors these are.

    The file is read into memory once, so that what is used later is what was verified.  Its bytes are the signed ones;
    whoever has to know that they are a whole delta calls `Delta.verify`.  `limit` is that of `open_delta`.
    """
    delta = local_with_signature(delta, key)
    return check_signed(bytes_of(delta), delta, key, signature, limit=limit)


def local_with_signature(source: Source, key: Keys | None) -> Source:
    """`local_source` of a path, where a key is given with the signature beside it; bytes and files as they are."""
    if not isinstance(source, str | os.PathLike):
        return source
    return local_source(source, beside=() if key is None else [SUFFIX])


def check_signed(
    data: Bytes,
    delta: Source,
    key: Keys,
    signature: str | os.PathLike[str] | None = None,
    *,
    limit: int | str | None = None,
) -> tuple[Delta, SignatureReport]:
    """`open_signed` of a file whose bytes are in memory, where nobody else can change them."""
    file = os.fspath(delta) if isinstance(delta, str | os.PathLike) else None
    if signature is None:
        if file is None:
            raise ArgumentError("bytes have no signature beside them; `verify_signature` takes its file")
        signature = signature_file(file)
    keys = {one.fingerprint: one for one in public_keys(key)}
    found = read_signature(Path(signature))
    if found.key not in keys:
        raise SignatureError(
            f"{signature}: is by the key {found.key}, which is none of the given ones ({', '.join(keys)}); get a file"
            " that one of them has signed"
        )
    if not keys[found.key].verify(found.value, found.message):
        raise SignatureError(f"{signature}: the key {found.key} has not made this signature; get it again")
    # Nothing of the file is parsed before it is known to be the signed one.
    label = file or "delta"
    if hashlib.sha256(data.data).hexdigest() != found.sha256:
        raise SignatureError(f"{label}: is not the file that {signature} signs; get both again from one place")
    opened = parse_delta(data, file, limit=limit)
    if opened.digest != found.digest:
        raise SignatureError(f"{label}: has another content digest than {signature} signs; get both again")
    return opened, SignatureReport(label, os.fspath(signature), found.key, found.digest, found.sha256)
