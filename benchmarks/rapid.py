"""The tables of "Rapid Switching and Multi-Adapter Fusion via Sparse High Rank Adapters", beside this project's.

`python -m benchmarks.rapid OUT` measures on this machine what arXiv:2407.16712 and its long form, arXiv:2406.13175,
report, and prints the papers' figures beside: a LoRA's fuse against `torch.Tensor.scatter_` and `HotSwap`, by the size
of a weight (their figure 7); load, fuse, unfuse and unload of a model's adapter, and the switch that these make (tables
5 and 6); and what adapters of three tasks lose when they are added up (table 4), by `benchmarks.fusion_quality` with
a small language model, beside that benchmark's rows of an encoder on a GPU.  Papers' times are of another machine:
compare ratios.  A CPU takes some ten minutes; rows are kept in OUT, and those of fused adapters not made again.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import shiradelta as sd
from benchmarks import fusion_quality, switch
from benchmarks.fusion_models import Encoder, Letters
from benchmarks.table import print_table

TABLES = ("sizes", "stages", "fusion")
#: Sides of square weights -> how many of each.
SIDES = {512: 50, 1024: 32, 2048: 8, 4096: 2}
#: How much faster scatter_ was than a LoRA's fuse: the long form's figure, for the larger weights; the short form.
PAPER_SIZES = "13, 13, 13, 16 x; up to 10 x"
#: The LoRA's rank, as the paper's for language models, and the share of a SHiRA adapter.
RANK, SHARE = 32, 0.01
#: Seconds of the stages with SDXL on the paper's desktop CPU.
PAPER_STAGES = {"load": 0.786, "fuse": 3.003, "unfuse": 2.916, "unload": 0.007}
#: Model -> (seconds to switch to a LoRA, to a SHiRA adapter), on the paper's CPU.
PAPER_SWITCHES = {"SDXL": (3.64, 0.77), "LLaMA2-7B": (28.15, 4.93)}
#: Method -> (mean score of adapters alone, of the three added up), BoolQ, PIQA and Arc-e with LLaMA2-7B.
PAPER_FUSION = {
    "LoRA": (78.41, 67.33),
    "SHiRA wm, overlapping": (78.45, 74.02),
    "SHiRA wm, disjoint": (77.54, 73.92),
}
METHODS = ("LoRA", "SHiRA wm, overlapping", "SHiRA wm, disjoint", "SHiRA rand, independent")
ON_A_GPU = switch.RESULTS / "fusion-quality-h100.csv"

#: What times are: of the clock on the wall, or of all the process's threads, which other work does not prolong.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}

Row = dict[str, Any]


def in_turn(work: dict[str, Callable[[], object]], options: argparse.Namespace) -> dict[str, float]:
    """Median seconds of each, one after the other in every round, so that what else runs slows all of them."""
    clock = CLOCKS[options.clock]
    times: dict[str, list[float]] = {name: [] for name in work}
    for number in range(options.repeats + 1):
        for name, one in work.items():
            start = clock()
            one()
            if number:  # the first is to warm up
                times[name].append(clock() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def by_size(side: int, count: int, options: argparse.Namespace) -> dict[str, float]:
    """Seconds a weight: a LoRA's fuse, scatter_ of new values, HotSwap's switch and revert."""
    torch.manual_seed(0)
    weights = nn.ParameterList(torch.randn(side, side) * 0.02 for _ in range(count)).requires_grad_(False)
    factors = [(torch.randn(side, RANK), torch.randn(RANK, side) * 1e-3) for _ in range(count)]
    nnz = int(SHARE * side * side)
    positions = [torch.randperm(side * side)[:nnz].sort().values for _ in range(count)]
    values = [torch.randn(nnz) * 1e-3 for _ in range(count)]
    swap = sd.HotSwap(nn.ParameterList(weight.clone() for weight in weights).requires_grad_(False))
    deltas = {
        name: sd.TensorDelta((side, side), where.numpy(), change.numpy(), "float32")
        for (name, _), where, change in zip(weights.named_parameters(), positions, values, strict=True)
    }
    sd.save_delta(options.out / "sizes.shd", deltas, values="f32")
    swap.load("delta", options.out / "sizes.shd")
    new = [weight.view(-1)[where] + change for weight, where, change in zip(weights, positions, values, strict=True)]

    def fuse() -> None:
        for weight, (b, a) in zip(weights, factors, strict=True):
            weight += b @ a

    def scatter() -> None:
        for weight, where, found in zip(weights, positions, new, strict=True):
            weight.view(-1).scatter_(0, where, found)

    work: dict[str, Callable[[], object]] = {"LoRA fuse": fuse, "scatter_": scatter}
    work |= {"switch": partial(swap.switch, "delta"), "revert": swap.revert}
    return {name: found / count for name, found in in_turn(work, options).items()}


def sizes(options: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    lines = [["weight", "LoRA fuse", "scatter_", "switch", "revert", "fuse / scatter_", "fuse / switch"]]
    for side, count in list(SIDES.items())[: 2 if options.quick else None]:
        found = by_size(side, 2 if options.quick else count, options)
        rows += [{"table": "sizes", "what": name, "x": side, "seconds": value} for name, value in found.items()]
        ratios = (found["LoRA fuse"] / found[name] for name in ("scatter_", "switch"))
        scatter, swapped = (f"{ratio:.1f}" for ratio in ratios)
        lines.append([f"{side} x {side}", *(f"{1000 * v:.3f} ms" for v in found.values()), scatter, swapped])
    print_table(
        f"by size: float32, LoRA rank {RANK}, {SHARE:.0%}; a switch keeps what it overwrites, scatter_ does not\n"
        f"fuse / scatter_ of the paper: {PAPER_SIZES}",
        lines,
    )
    return rows


def stages(options: argparse.Namespace) -> list[Row]:
    """Of the shapes of one layer of Llama-2-7B, bf16."""
    from peft import LoraConfig

    stage, other = (switch.Stage("cpu", 1, options.repeats) for _ in range(2))
    file, lora = options.out / "stages.shd", options.out / "stages-lora"
    file.write_bytes(switch.for_all_layers(switch.one_layer(stage, SHARE, 0), 1))
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=switch.MODULES)
    swap = sd.HotSwap(stage.model)
    with switch.wrapped(other, config, 1) as model:
        model.to(torch.bfloat16)
        model.save_pretrained(lora)
        model.delete_adapter("default")
        ours: dict[str, Callable[[], object]] = {
            "load": partial(swap.load, "x", file),
            "fuse": partial(swap.switch, "x"),
            "unfuse": swap.revert,
            "unload": partial(swap.unload, "x"),
        }
        theirs = {
            "load": partial(model.load_adapter, lora, "x"),
            "fuse": partial(model.merge_adapter, ["x"]),
            "unfuse": model.unmerge_adapter,
            "unload": partial(model.delete_adapter, "x"),
        }
        work = {f"HotSwap {name}": one for name, one in ours.items()} | {f"PEFT {k}": one for k, one in theirs.items()}
        found = in_turn(work, options)
    lines = [["stage", "PEFT LoRA", "HotSwap", "LoRA / HotSwap", "LoRA, paper: SDXL"]]
    for name, paper in PAPER_STAGES.items():
        lora_s, own = found[f"PEFT {name}"], found[f"HotSwap {name}"]
        lines.append([name, f"{lora_s:.3f} s", f"{own:.3f} s", f"{lora_s / own:.1f}", f"{paper} s"])
    print_table(
        "stages: shapes of a layer of Llama-2-7B, bf16; fuse and unfuse are switch and revert in HotSwap", lines
    )
    lines = [["to another adapter", "LoRA", "SHiRA", "LoRA / SHiRA"]]
    whole = [sum(found[f"{who} {name}"] for name in PAPER_STAGES) for who in ("PEFT", "HotSwap")]
    for what, (first, second) in {"this run, all four stages": whole, **PAPER_SWITCHES}.items():
        lines.append(
            [what if what[0] == "t" else f"paper: {what}", f"{first:.2f} s", f"{second:.2f} s", f"{first / second:.1f}"]
        )
    print_table("switching from file to file, on a CPU", lines)
    return [{"table": "stages", "what": name, "x": "", "seconds": value} for name, value in found.items()]


def fusion(options: argparse.Namespace) -> list[Row]:
    """Rows are in OUT/fusion-quality.csv; this prints them beside the paper's and the encoder's."""
    settings = fusion_quality.Settings(options.out, options.steps, 16, options.items, "bytes")
    settings.subject.load()  # which pretrains it once, before there are several processes
    fusion_quality.make(settings, METHODS, options.seeds, options.processes)
    small = fusion_quality.read(options.out / fusion_quality.FILE)
    sources = {"small Llama of bytes": small, "MiniLM, one H100": fusion_quality.read(ON_A_GPU)}
    lines = [["model and tasks", "method", "base", "alone", "added up", "drop", "gain kept", "seeds"]]
    for method, (alone, added) in PAPER_FUSION.items():
        paper = [
            "paper: LLaMA2-7B; BoolQ, PIQA, Arc-e",
            method,
            "-",
            f"{alone:.2f}",
            f"{added:.2f}",
            f"{alone - added:.2f}",
        ]
        lines.append([*paper, "-", "-"])
    for model, rows in sources.items():
        for triple, tasks in fusion_quality.TRIPLES.items():
            for method in METHODS:
                if of := [row for row in rows if (row["method"], row["triple"]) == (method, triple)]:
                    lines.append([f"{model}; {', '.join(tasks)}", method, *fusion_quality.figures(of)])
    print_table(
        f"fusion of three adapters, percent, drop in points; accuracy (paper), {Letters.measure} (bytes),"
        f" {Encoder.measure} (MiniLM)",
        lines,
    )
    return []


def main() -> None:
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rapid", description=about)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", choices=TABLES, default=TABLES)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=150, help="of an adapter's training")
    parser.add_argument("--items", type=int, default=300, help="scored of each task")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu on a machine with other work")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--processes", type=int, default=1, help="that train adapters")
    parser.add_argument("--quick", action="store_true", help="small weights, one repeat, little training")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.quick:
        options.repeats, options.seeds, options.steps, options.items = 1, 1, 4, 20
    rows: list[Row] = []
    for name in options.only:
        rows += {"sizes": sizes, "stages": stages, "fusion": fusion}[name](options)
    if rows:
        with open(options.out / "rapid.csv", "w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
