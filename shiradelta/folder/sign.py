"""`sign`: signs a `.shd` file, with its base where the content digest follows from that."""

from __future__ import annotations

import os
from pathlib import Path

from shiradelta.folder.recode import base_of
from shiradelta.io.context import Base
from shiradelta.io.download import local_model
from shiradelta.io.reader import Delta
from shiradelta.io.recognise import Wanted
from shiradelta.models.checkpoint import open_checkpoint
from shiradelta.signing.keys import Passphrase
from shiradelta.signing.sign import SignReport, sign_read
from shiradelta.util.arguments import ANY, PATH, checked


@checked(delta=PATH, key=PATH, passphrase=ANY)
def sign(
    delta: str | os.PathLike[str],
    key: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    base: str | os.PathLike[str] | None = None,
    passphrase: Passphrase = None,
    force: bool = False,
) -> SignReport:
    """Signs a `.shd` file with a private Ed25519 key.  The signature is a small text file of its own.

    The file is checked as a whole first.  Its content digest and the SHA-256 of its bytes are computed and signed.

    Args:
        delta: the file.
        key: the private key: PEM, or OpenSSH's form.
        out: the signature file; None for the name of `delta` with ".sig" behind it.
        base: the model that the delta was made for; only what is read with its base has to have it.
        passphrase: of an encrypted key, or a function that is called if the key is encrypted.
        force: replace a signature that is there.

    Raises:
        FormatError: the file is damaged, was made for another base, or is read with its base and none is given.
        SignatureError: the key cannot be used.
        SourceError: there is no such model.
        TargetError: the signature cannot be written, or is there already.
        MissingDependencyError: cryptography is not installed.
    """

    def elements(opened: Delta) -> Base:
        assert base is not None
        return base_of(opened, open_checkpoint(Path(local_model(base)), Wanted.BASE, packed=True))

    return sign_read(delta, key, out, None if base is None else elements, passphrase, force)
