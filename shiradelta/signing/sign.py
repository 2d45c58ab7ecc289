"""`sign`: writes the signature of a `.shd` file."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

from shiradelta.errors import TargetError
from shiradelta.io.reader import bytes_of, parse_delta
from shiradelta.signing.form import START, Signature, signature_file
from shiradelta.signing.keys import Passphrase, private_key
from shiradelta.util.arguments import ANY, PATH, checked
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


@checked(delta=PATH, key=PATH, passphrase=ANY)
def sign(
    delta: str | os.PathLike[str],
    key: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    passphrase: Passphrase = None,
    force: bool = False,
) -> SignReport:
    """Signs a `.shd` file with a private Ed25519 key.  The signature is a small text file of its own.

    The file is checked as a whole first.  Its content digest and the SHA-256 of its bytes are computed and signed.

    Args:
        delta: the file.
        key: the private key: PEM, or OpenSSH's form.
        out: the signature file; None for the name of `delta` with ".sig" behind it.
        passphrase: of an encrypted key, or a function that is called if the key is encrypted.
        force: replace a signature that is there.

    Raises:
        FormatError: the file is damaged.
        SignatureError: the key cannot be used.
        TargetError: the signature cannot be written, or is there already.
        MissingDependencyError: cryptography is not installed.
    """
    path = signature_file(delta) if out is None else Path(out)
    if os.path.lexists(path) and not force:
        raise TargetError(f"{path}: is there already; add --force to replace it")
    check_target(path, START, "a signature")
    private = private_key(key, passphrase)
    data = bytes_of(delta)
    with parse_delta(data, os.fspath(delta)) as opened:
        opened.verify()
        digest = opened.digest
    signature = Signature(private.public.fingerprint, digest, hashlib.sha256(data.data).hexdigest())
    signature = replace(signature, value=private.sign(signature.message))
    with replacing(path) as stream:
        stream.write(signature.to_bytes())
    exposed = f"{os.fspath(key)}: other users can read this private key; `chmod 600` keeps it to yourself"
    warnings = (exposed,) if private.exposed else ()
    return SignReport(os.fspath(path), signature.key, digest, signature.sha256, warnings)
