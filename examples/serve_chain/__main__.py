"""`python -m examples.serve_chain CHAIN FOLDER --model MODEL --source SHARED --vllm http://127.0.0.1:8000`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import shiradelta as sd
from examples.serve_chain.engines import POLICIES, Engine, FolderOnly, VllmServer
from examples.serve_chain.receiver import Receiver
from examples.serve_chain.server import ChainServer
from shiradelta.chain import Chain

KEY = "SERVE_API_KEY"


def main() -> None:
    """Serves until it is stopped."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip())
    parser.add_argument("chain", help="the chain; with --model it begins where there is none")
    parser.add_argument(
        "folder", type=Path, help="the folder that follows, slime's --update-weight-local-checkpoint-dir"
    )
    parser.add_argument("--model", type=Path, help="the model that slime and vLLM were started with")
    parser.add_argument(
        "--source", type=Path, help="slime's --update-weight-disk-dir; without it the chain is followed"
    )
    parser.add_argument("--vllm", metavar="URL", help="vLLM's server; without it only the folder is kept")
    parser.add_argument("--in-flight", choices=POLICIES, default="finish", help="what becomes of generation in flight")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8100)
    options = parser.parse_args()
    key = os.environ.get(KEY)
    if key is None and options.host not in ("127.0.0.1", "::1", "localhost"):
        parser.error(f"without a key only this machine may ask; set {KEY}, or leave --host out")
    if options.vllm and options.model is None:
        parser.error("--vllm needs --model, the folder that vLLM was started with")
    try:
        chain = Chain.open(options.chain)
    except sd.ChainError as error:
        if error.reason != "no_chain" or options.model is None:
            raise
        chain = Chain.create(options.chain, options.model)
    engine: Engine = VllmServer(options.vllm, options.model.resolve()) if options.vllm else FolderOnly()
    receiver = Receiver(chain, options.folder, engine, options.source, options.in_flight)
    with ChainServer(receiver, (options.host, options.port), key) as server:
        print(f"http://{options.host}:{server.server_port}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
