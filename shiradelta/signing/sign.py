"""`sign`: writes the signature of a `.shd` file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from shiradelta.errors import TargetError
from shiradelta.io.context import Base, plain_delta
from shiradelta.io.reader import Delta, bytes_of, parse_delta
from shiradelta.signing.form import START, Signature, signature_file
from shiradelta.signing.keys import Passphrase, private_key
from shiradelta.util.files import check_target, replacing


@dataclass(frozen=True)
class SignReport:
    """Report of `sign`.

    Attributes:
        out: the signature file.
        key: the fingerprint of the key.
        digest: the content digest that is signed, hexadecimal.
        sha256: the SHA-256 of the file that is signed, hexadecimal.
        warnings: warnings for the user.
    """

    out: str
    key: str
    digest: str
    sha256: str
    warnings: tuple[str, ...] = ()


def sign_read(
    delta: str | os.PathLike[str],
    key: str | os.PathLike[str],
    out: str | os.PathLike[str] | None,
    base: Callable[[Delta], Base] | None,
    passphrase: Passphrase,
    force: bool,
) -> SignReport:
    """`shiradelta.sign`, given what makes a file's base's elements of it; None where there is no base."""
    path = signature_file(delta) if out is None else Path(out)
    if os.path.lexists(path) and not force:
        raise TargetError(f"{path}: is there already; add --force to replace it")
    check_target(path, START, "a signature")
    private = private_key(key, passphrase)
    data = bytes_of(delta)
    with parse_delta(data, os.fspath(delta)) as opened:
        digest = opened.digest
        if base is not None and opened.needs_base:
            plain_delta(opened, base(opened)).close()  # computes the digest, and compares it
        else:
            opened.verify()
    signature = Signature(private.public.fingerprint, digest, hashlib.sha256(data.data).hexdigest())
    signature = replace(signature, value=private.sign(signature.message))
    with replacing(path) as stream:
        stream.write(signature.to_bytes())
    exposed = f"{os.fspath(key)}: other users can read this private key; `chmod 600` keeps it to yourself"
    warnings = (exposed,) if private.exposed else ()
    return SignReport(os.fspath(path), signature.key, digest, signature.sha256, warnings)
