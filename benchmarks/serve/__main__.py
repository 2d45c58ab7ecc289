"""Requests for 1, 8 and 64 adapters of one model: fused weights that HotSwap switches, against multi-LoRA.

`python -m benchmarks.serve OUT` writes serve.csv to a folder and prints the table; `--plot` draws it.  Requests come in
windows.  A way that has one adapter active at a time serves each window grouped by adapter, and switches between
groups, whose last batches are not full; multi-LoRA serves them as they come, each batch with several adapters, and
computes every adapter beside the weights.  The more often the adapter changes, the smaller are the groups.

The model is made here, with random weights, unless `--model` names a folder: what is measured is time.
`--engines vLLM` measures the same in vLLM, on a CPU, in the environment that `make vllm` makes; take
`--dtype bfloat16`, because vLLM repacks float32 weights there.  Rows of an engine that is not measured stay as
serve.csv has them.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks.serve import in_vllm, results
from benchmarks.serve.ways import WAYS
from benchmarks.serve.workload import CLOCKS, Load, measure, write_adapters, write_model
from benchmarks.switch import versions, where
from benchmarks.table import commit
from benchmarks.vllm_environment import INTERPRETER


def main() -> None:
    """Measures, prints, writes and draws."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path, help="a folder with safetensors; default: a small one, made here")
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--every", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="requests between changes")
    parser.add_argument("--repeats", type=int, default=3, help="the ways take turns; times are medians")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--engines", nargs="+", choices=list(results.COMPARED), default=["transformers"])
    parser.add_argument("--vllm", type=Path, default=INTERPRETER, help="of the environment that has vLLM")
    parser.add_argument("--plot", type=Path, help="a PNG to draw")
    for field in fields(Load):
        if field.name == "clock":
            parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
        else:
            parser.add_argument(f"--{field.name}", type=int, default=field.default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    load = Load(**{field.name: getattr(options, field.name) for field in fields(Load)})
    about = {
        **asdict(load),
        "model": options.model.name if options.model else "random weights",
        "device": options.device,
        "dtype": options.dtype,
        "threads": options.threads,
        "machine": where(options.device),
        "versions": versions(),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
    }
    path = options.out / "serve.csv"
    kept = [row for row in results.read(path) if results.engine_of(row) not in options.engines]
    rows: list[results.Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = options.model or folder / "model"
        if options.model is None:
            write_model(model, load.seed, options.dtype)
        names = write_adapters(folder, model, max(options.adapters), load.seed)
        for count in options.adapters:
            some, changes = names[:count], options.every if count > 1 else [load.count]
            found: list[results.Row] = []
            if "transformers" in options.engines:
                how = load, options.device, options.dtype
                servers = {way: make(model, folder, some, *how) for way, make in WAYS.items()}
                found += measure(servers, model, some, changes, options.repeats)
                del servers
            if "vLLM" in options.engines:
                arguments = model, folder, some, load, changes, options.repeats, options.dtype, options.threads
                found += in_vllm.measured(options.vllm, *arguments)
            rows += [{"adapters": count, **row, **about} for row in found]
            print(results.table_of(rows, count), flush=True)
    rows = sorted(kept + rows, key=lambda row: int(row["adapters"]))
    options.out.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print("\n".join(results.verdicts(rows)))
    if options.plot is not None:
        results.draw(rows, options.plot)


if __name__ == "__main__":
    main()
