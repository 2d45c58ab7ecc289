"""Commands on a model of many small tensors: what a tensor costs, beside reading and writing the same folder.

A mixture of 64 experts in 12 layers has 2,415 tensors and few weights, so nearly all of the time is work per tensor.
Times are CPU times of this process without imports, the least of several runs.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import shiradelta
from benchmarks.table import print_table
from shiradelta import train

EXPERTS, WIDTH, INNER = 64, 16, 32


def model(layers: int, seed: int) -> dict[str, torch.Tensor]:
    """Weights of a small mixture of experts by name, bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (256, WIDTH), "head.weight": (256, WIDTH), "norm": (WIDTH,)}
    for layer in range(layers):
        block = f"layers.{layer}"
        shapes |= {f"{block}.attention.{one}.weight": (WIDTH, WIDTH) for one in "qkvo"}
        shapes |= {f"{block}.norm{one}": (WIDTH,) for one in (1, 2, 3)}
        shapes |= {f"{block}.bias": (EXPERTS,), f"{block}.gate.weight": (EXPERTS, WIDTH)}
        for expert in range(EXPERTS):
            inside = f"{block}.experts.{expert}"
            shapes |= {f"{inside}.{one}.weight": (INNER, WIDTH) for one in ("up", "gate")}
            shapes[f"{inside}.down.weight"] = WIDTH, INNER
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


def tree(weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """A module that has the matrices as weights of linear layers."""
    root = torch.nn.Module()
    for name, tensor in weights.items():
        *path, last, kind = name.split(".") if name.endswith(".weight") else ("", "", "")
        if not last:
            continue
        at = root
        for part in path:
            if part not in at._modules:
                at.add_module(part, torch.nn.Module())
            at = at.get_submodule(part)
        linear = torch.nn.Linear(1, 1, bias=False, device="meta")
        linear.weight = torch.nn.Parameter(tensor.clone())
        at.add_module(last, linear)
        assert kind == "weight"
    return root


def cpu_seconds(work: Callable[[], object], repeats: int, after: Callable[[], object] = lambda: None) -> float:
    """The least CPU time of `work`; `after` runs untimed after each."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
        after()
    return min(times)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        root = Path(folder)
        base, tuned, copy = root / "base", root / "tuned", root / "copy"
        delta, trained = root / "delta.shd", root / "trained.shd"
        weights = model(options.layers, 0)
        change = model(options.layers, 1)
        for path, one in ((base, weights), (tuned, {name: weights[name] + 0.1 * change[name] for name in weights})):
            path.mkdir()
            save_file(one, path / "model.safetensors")
        tuner = train.attach(tree(weights), targets="all-linear")
        with torch.no_grad():
            for parameter in tuner.parameters():
                parameter.fill_(0.1)
        works = {
            "safetensors: read and write": (
                lambda: save_file(load_file(base / "model.safetensors"), root / "again.safetensors"),
                lambda: None,
            ),
            "convert": (lambda: shiradelta.convert(tuned, delta, base=base), lambda: None),
            "apply": (lambda: shiradelta.apply(base, delta), lambda: shiradelta.revert(base)),
            "apply to a copy": (
                lambda: shiradelta.apply(base, delta, out=copy),
                lambda: shutil.rmtree(copy),
            ),
            "train's save": (lambda: tuner.save(trained), lambda: None),
        }
        times = {what: cpu_seconds(work, options.repeats, after) for what, (work, after) in works.items()}
        shiradelta.apply(base, delta)
        times["verify"] = cpu_seconds(lambda: shiradelta.verify(base, delta), options.repeats)
        times["revert"] = cpu_seconds(
            lambda: shiradelta.revert(base), options.repeats, lambda: shiradelta.apply(base, delta)
        )
    rows = [["what", "CPU time", "a tensor", "bar"]]
    rows += [
        [what, f"{spent:.2f} s", f"{1000 * spent / len(weights):.3f} ms", "" if "safetensors" in what else "0.3 ms"]
        for what, spent in times.items()
    ]
    numel = sum(tensor.numel() for tensor in weights.values())
    print_table(f"{len(weights):,} tensors, {numel / 1e6:.1f} M weights", rows)


if __name__ == "__main__":
    main()
