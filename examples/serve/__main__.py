"""`python -m examples.serve MODEL name=adapter.shd ...`."""

from __future__ import annotations

import argparse
from pathlib import Path

import uvicorn

import shiradelta as sd
from examples.serve.app import make_app, open_model


def main() -> None:
    """Loads everything, says how long it took, serves."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip())
    parser.add_argument("model", type=Path, help="a folder of transformers")
    parser.add_argument("adapters", nargs="*", metavar="NAME=FILE")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    model, embed = open_model(options.model, options.device)
    swap = sd.HotSwap(model)
    for item in options.adapters:
        name, _, file = item.partition("=")
        report = swap.load(name, file)
        print(f"{name}: {report.nonzeros:,} weights, {report.nbytes:,} bytes")
    uvicorn.run(make_app(swap, embed), port=options.port)


if __name__ == "__main__":
    main()
