"""`python -m examples.serve MODEL --adapters FOLDER`."""

from __future__ import annotations

import argparse
import os
from dataclasses import fields
from pathlib import Path

import uvicorn

import shiradelta as sd
from examples.serve.adapters import Adapters
from examples.serve.app import make_app
from examples.serve.limits import Limits
from examples.serve.model import Embedder
from shiradelta.signing.keys import public_keys

KEY = "SERVE_API_KEY"


def main() -> None:
    """Loads everything, says how long it took, serves."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip())
    parser.add_argument("model", type=Path, help="a folder of transformers")
    parser.add_argument("load", nargs="*", metavar="NAME", help="adapters to load at the start")
    parser.add_argument("--adapters", type=Path, metavar="FOLDER", help="NAME.shd in it is the adapter NAME")
    parser.add_argument(
        "--signed-by",
        type=Path,
        action="append",
        metavar="KEY",
        help="load only adapters that are signed by a public key in this file; may be repeated",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    for limit in fields(Limits):
        option = f"--{limit.name.replace('_', '-')}" if limit.name != "adapters" else "--most-adapters"
        parser.add_argument(option, type=type(limit.default), default=limit.default, help="limit; see limits.py")
    options = parser.parse_args()
    values = {limit.name: getattr(options, limit.name) for limit in fields(Limits) if limit.name != "adapters"}
    limits = Limits(adapters=options.most_adapters, **values)
    key = os.environ.get(KEY)
    if key is None and options.host not in ("127.0.0.1", "::1", "localhost"):
        parser.error(f"without an API key only this machine may ask; set {KEY}, or leave --host out")
    if options.signed_by is not None:
        public_keys(options.signed_by)  # a key that cannot be used ends the service now, not its first load
    embedder = Embedder(options.model, options.device, limits)
    swap = sd.HotSwap(embedder.model)
    adapters = Adapters(swap, options.adapters, limits, options.signed_by)
    for name in options.load:
        report = adapters.load(name)
        print(f"{name}: {report.nonzeros:,} weights, {report.nbytes:,} bytes")
    app = make_app(swap, embedder.compute, embedder.tokenize, adapters, limits, key)
    # After SIGTERM no connection is taken, what runs is answered, and then the process ends.
    uvicorn.run(
        app,
        host=options.host,
        port=options.port,
        limit_concurrency=limits.connections,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=int(limits.seconds) + 5,
    )


if __name__ == "__main__":
    main()
