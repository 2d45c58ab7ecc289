"""`shiradelta sign`."""

from __future__ import annotations

import dataclasses
import sys

import click

from shiradelta.cli import options
from shiradelta.cli.options import command
from shiradelta.cli.output import echo_json, echo_lines, echo_warnings
from shiradelta.errors import SignatureError


@command(
    extra="give the key as --key FILE, and the signature to write as -o FILE",
    examples=["sign style.shd --key private.pem"],
)
@click.argument("delta")
@click.option("--key", required=True, metavar="FILE", help="Private Ed25519 key: PEM, or of OpenSSH.")
@click.option("-o", "--out", metavar="FILE", help="Signature to write.  [default: DELTA.sig]")
@click.option("--base", metavar="MODEL", help="The model that it was made for, where it is read with its base only.")
@click.option("--passphrase-file", metavar="FILE", help="Its first line is the passphrase of an encrypted key.")
@click.option("--force", is_flag=True, help="Replace a signature that is there.")
@options.as_json
def sign(
    delta: str, key: str, out: str | None, base: str | None, passphrase_file: str | None, force: bool, as_json: bool
) -> None:
    """Sign the file DELTA with a private key.

    `shiradelta verify DELTA --key PUBLIC` and `shiradelta apply MODEL DELTA --key PUBLIC` check the signature.

    Make a pair of keys with `openssl genpkey -algorithm ed25519 -out private.pem`, then
    `openssl pkey -in private.pem -pubout -out public.pem`; keys of `ssh-keygen -t ed25519` do as well.
    """
    from shiradelta.folder.sign import sign as run

    def passphrase() -> str | bytes:
        """Is called only if the key is encrypted."""
        if passphrase_file is not None:
            with open(passphrase_file, "rb") as stream:
                return stream.readline(4096).rstrip(b"\r\n")
        if sys.stdin is None or not sys.stdin.isatty():
            raise SignatureError(f"{key}: the key is encrypted; give its passphrase with --passphrase-file")
        answer: str = click.prompt(f"Passphrase of {key}", hide_input=True, err=True)
        return answer

    report = run(delta, key, out, base=base, passphrase=passphrase, force=force)
    echo_warnings(report.warnings)
    if as_json:
        echo_json(dataclasses.asdict(report))
        return
    echo_lines(f"{report.out}: signed by the key {report.key}, digest {report.digest}")
