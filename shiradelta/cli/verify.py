"""`shiradelta verify`."""

from __future__ import annotations

import dataclasses
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from shiradelta.cli import options
from shiradelta.cli.options import command
from shiradelta.cli.output import delta_from, echo_json, echo_lines
from shiradelta.errors import SignatureError


@command(
    extra="give one delta at a time",
    examples=["verify model/", "verify model/ style.shd", "verify style.shd --key public.pem"],
)
@click.argument("model")
@click.argument("delta", required=False)
@click.option("--full", is_flag=True, help="Compare all weights with the digests of the base's files.")
@options.trusted
@options.max_memory
@options.as_json
def verify(
    model: str,
    delta: str | None,
    full: bool,
    keys: tuple[str, ...],
    signature: str | None,
    limit: str | None,
    as_json: bool,
) -> None:
    """Check whether the folder MODEL is exactly its base, exactly patched, or neither (exit code 1).

    Only weights listed in the applied deltas are checked, with DELTA (- for stdin) against its own fingerprints and
    values, too.

    If nothing is applied, the folder is compared with the fingerprints in DELTA, or with the digests that the last
    revert has left.  Without either its state is unknown (exit code 1).

    With --key the signature of DELTA is checked first (exit code 1 if it does not hold).  MODEL may be left out then:
    `shiradelta verify DELTA --key public.pem` checks nothing else.

    Nothing is written: an interrupted action is rolled back by `shiradelta revert`.
    """
    from shiradelta.folder.verification import verify as run

    if not keys:
        if signature is not None:
            raise click.UsageError("--signature proves nothing without a key; add --key FILE.")
        with nullcontext() if delta is None else delta_from(delta, limit) as taken:
            report = run(model, taken, full=full, limit=limit)
        _show(model, dataclasses.asdict(report), as_json)
        return
    from shiradelta.signing.keys import public_keys
    from shiradelta.signing.verify import open_signed

    if delta is None and (full or Path(model).is_dir()):
        raise click.UsageError("Missing argument 'DELTA': --key is about its signature.")
    public_keys(keys)  # one that cannot be used is an error, and says nothing of the signature
    try:
        opened, signed = open_signed(model if delta is None else delta, keys, signature, limit=limit)
    except SignatureError as error:
        if as_json:
            echo_json({"signature": {"holds": False, "detail": str(error)}})
            sys.exit(1)
        raise
    about: dict[str, Any] = {"holds": True, **dataclasses.asdict(signed)}
    with opened:
        opened.verify_without_base()
        found = {} if delta is None else dataclasses.asdict(run(model, opened, full=full))
    if not as_json:
        echo_lines(f"{signed.file}: signed by the key {signed.key}, digest {signed.digest}")
    _show(model, {**found, "signature": about}, as_json)


def _show(model: str, found: dict[str, Any], as_json: bool) -> None:
    """Prints what was found; exits with 1 if it is a folder that is neither base nor patched."""
    if as_json:
        echo_json(found)
    elif "state" in found:
        echo_lines(f"{model}: {found['state']}: {found['detail']}")
    if found.get("state") in ("neither", "unknown"):
        sys.exit(1)
