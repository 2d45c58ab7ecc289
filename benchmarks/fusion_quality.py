"""What three adapters lose when they are fused: LoRAs against SHiRA adapters, on tasks of one base.

`python -m benchmarks.fusion_quality OUT` trains an adapter a task (all-MiniLM-L6-v2; benchmarks/fusion_tasks.py),
scores each alone, then three of them added up, and writes fusion-quality.csv and .png to a folder; a GPU takes some
minutes.  What OUT has already is not done again.  Everything goes through `.shd` files (F32 values; a LoRA's holds its
whole product), `fuse` and `HotSwap`.  `--rates` tries learning rates instead, on a part of the data not scored.
"""

from __future__ import annotations

import argparse
import csv
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import shiradelta as sd
from benchmarks.fusion_models import DEVICE, FusionModel, fusion_model
from benchmarks.fusion_tasks import TASKS, Pairs, batches, load
from benchmarks.table import print_table
from shiradelta.combine import interference
from shiradelta.combine.fuse import Source

SPARSITY = 0.01
BATCH, WARMUP = 128, 30
#: Method -> (mask, whether the masks of the three tasks are kept apart).
METHODS: dict[str, tuple[str, bool]] = {
    "LoRA": ("", False),
    "SHiRA wm, overlapping": ("wm", False),
    "SHiRA wm, disjoint": ("wm", True),
    "SHiRA snip, overlapping": ("snip", False),
    "SHiRA snip, disjoint": ("snip", True),
    "SHiRA rand, independent": ("rand", False),
}
#: What is fused: tasks of a kind, as in the paper, and two of them with one that has nothing to do with meaning.
TRIPLES = {"of a kind": ("define", "api", "synonym"), "with sound": ("define", "api", "sound")}
#: Learning rates that were tried, of a LoRA and of sparse values (with snip); the best on define and api.
RATES = {"": (5e-4, 1e-3, 2e-3), "snip": (1e-3, 3e-3, 1e-2)}
#: The drops of the paper's table: BoolQ, PIQA and Arc-e on LLaMA2-7B, points.
PAPER = {"LoRA": "11.08", "SHiRA wm, overlapping": "4.43", "SHiRA wm, disjoint": "3.62"}


#: The table, in the folder that is written.
FILE = "fusion-quality.csv"


class Settings(NamedTuple):
    """Of a run."""

    out: Path
    steps: int
    batch: int
    items: int
    model: str = "encoder"

    @property
    def subject(self) -> FusionModel:
        """The model that is adapted."""
        return fusion_model(self.model, self.out)


def optimise(model: nn.Module, task: str, rate: float, seed: int, settings: Settings) -> None:
    """AdamW, a linear warm-up, a cosine to zero.  No dropout: so short a run learns more without."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    steps = settings.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARMUP) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    stream = batches(load(task, settings.items)[0], settings.batch, seed)
    for _ in range(steps):
        loss = settings.subject.loss(model, next(stream))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()


def train_lora(task: str, rate: float, seed: int, settings: Settings, out: Path) -> None:
    from peft import LoraConfig, get_peft_model

    subject = settings.subject
    config = LoraConfig(r=subject.rank, lora_alpha=2 * subject.rank, target_modules=list(subject.targets))
    model: Any = get_peft_model(subject.load(), config)
    optimise(model, task, rate, seed, settings)
    tensors = {}
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "get_delta_weight"):
            change = module.get_delta_weight("default").detach().float().cpu().numpy()
            tensors[f"{name}.weight"] = sd.TensorDelta(change.shape, None, change, dtype="float32")
    sd.save_delta(out, tensors, values="f32")


def train_shira(
    task: str, rate: float, seed: int, settings: Settings, out: Path, mask: str, avoid: Sequence[Path]
) -> None:
    from shiradelta import train

    subject = settings.subject
    model = subject.load()
    stream = batches(load(task, settings.items)[0], settings.batch, seed + 1000)
    calibration = [next(stream) for _ in range(8)] if mask == "snip" else []
    tuner = train.attach(
        model,
        sparsity=SPARSITY,
        mask=mask,
        targets=subject.targets,
        calibration=calibration,
        loss=subject.loss,
        seed=len(TASKS) * seed + list(TASKS).index(task),
        avoid=avoid,
    )
    optimise(model, task, rate, seed, settings)
    tuner.save(out, values="f32")
    tuner.detach()


def train_one(
    mask: str, task: str, rate: float, seed: int, settings: Settings, out: Path, avoid: Sequence[Path] = ()
) -> Path:
    torch.manual_seed(seed)
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // 8))
    if mask:
        train_shira(task, rate, seed, settings, out, mask, avoid)
    else:
        train_lora(task, rate, seed, settings, out)
    return out


def with_delta(file: Path, pairs: Pairs, settings: Settings) -> float:
    """The score with a delta switched in."""
    model = settings.subject.load()
    swap = sd.HotSwap(model)
    swap.load("delta", file)
    swap.switch("delta")
    return settings.subject.score(model, pairs)


# ------------------------------------------------------------------------------------- what workers do


def try_rate(mask: str, task: str, rate: float, settings: Settings) -> dict[str, Any]:
    """The gain that one learning rate gives, on the part that nothing is reported of."""
    file = train_one(mask, task, rate, 99, settings, settings.out / f"rate-{mask or 'lora'}-{task}-{rate}.shd")
    pairs = load(task, settings.items)[1]
    subject = settings.subject
    gain = with_delta(file, pairs, settings) - subject.score(subject.load(), pairs)
    file.unlink()
    return {"mask": mask, "task": task, "rate": rate, "gain": gain}


def experiment(method: str, seed: int, settings: Settings) -> list[dict[str, Any]]:
    """An adapter a task: alone, three added up, averaged; a row a task of a triple."""
    mask, apart = METHODS[method]
    subject = settings.subject
    # Who chooses first has the better mask: each seed starts with another task.
    order = [list(TASKS)[(seed + turn) % len(TASKS)] for turn in range(len(TASKS))]
    stem = f"{method.replace(' ', '-').replace(',', '')}-{seed}"
    files: dict[str, Path] = {}
    for task in order:
        rate, avoid = subject.sparse_rate if mask else subject.lora_rate, list(files.values()) if apart else ()
        files[task] = train_one(mask, task, rate, seed, settings, settings.out / f"{stem}-{task}.shd", avoid)
    alone = {task: with_delta(file, load(task, settings.items)[2], settings) for task, file in files.items()}
    rows: list[dict[str, Any]] = []
    for triple, tasks in TRIPLES.items():
        parts: dict[Source, float] = {files[task]: 1.0 for task in tasks}
        about = how_they_meet(parts) if not seed else {}  # the same for every seed, within a percent or two
        for task in tasks:
            base = subject.score(subject.load(), load(task, settings.items)[2])
            row: dict[str, Any] = {"method": method, "triple": triple, "seed": seed, "task": task}
            row |= {"base": base, "alone": alone[task], "added": 0.0, "mean": 0.0}
            rows.append(row | {key: about.get(key, "") for key in MEETING})
        for key, how in (("added", "sum"), ("mean", "mean")):
            fused = settings.out / f"{stem}-fused.shd"
            sd.fuse(parts, fused, method=how)
            for row in rows[-len(tasks) :]:
                row[key] = with_delta(fused, load(row["task"], settings.items)[2], settings)
            fused.unlink()
    for file in files.values():
        file.unlink()
    return rows


#: What is known of how adapters meet, mean over their pairs; `norm` is the length of a change.
MEETING = ("shared", "opposed", "cosine", "awom", "awor", "norm")


def how_they_meet(files: dict[Source, float]) -> dict[str, float]:
    found = interference.measure(files)
    totals = [found.total(pair) for pair in found.pairs]
    figures = (
        (max(t.shares), t.opposed_share or 0, t.cosine or 0, t.awom or 0, t.awor or 0, math.sqrt(t.squares[0]))
        for t in totals
    )
    return dict(zip(MEETING, map(statistics.fmean, zip(*figures, strict=True)), strict=True))


# ------------------------------------------------------------------------------------------ the whole


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--items", type=int, default=1000, help="answers to find a query's among")
    parser.add_argument("--processes", type=int, default=8 if DEVICE == "cuda" else 1)
    parser.add_argument("--rates", action="store_true", help="try learning rates instead")
    parser.add_argument("--draw", action="store_true", help="draw and print what OUT has, and train nothing")
    arguments = parser.parse_args()
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    settings = Settings(out, arguments.steps, arguments.batch, arguments.items)
    if arguments.rates:
        tries = [(mask, task, rate) for mask in RATES for task in TASKS for rate in RATES[mask]]
        gather(arguments.processes, out / "fusion-rates.csv", [partial(try_rate, *one, settings) for one in tries])
        return
    if not arguments.draw:
        make(settings, arguments.methods, arguments.seeds, arguments.processes)
    rows = read(out / FILE)
    summarise(rows)
    draw(rows, out / "fusion-quality.png")


def make(settings: Settings, methods: Sequence[str], seeds: int, processes: int) -> None:
    """Trains and scores what the folder does not have yet."""
    path = settings.out / FILE
    done = {(row["method"], int(row["seed"])) for row in read(path)}
    wanted = [(method, seed) for seed, method in product(range(seeds), methods) if (method, seed) not in done]
    gather(processes, path, [partial(experiment, *one, settings) for one in wanted])


def read(path: Path) -> list[dict[str, Any]]:
    """The rows there are; figures as numbers."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as stream:
        rows: list[dict[str, Any]] = list(csv.DictReader(stream))
    for row in rows:
        row.update(
            {key: float(row[key]) for key in ("seed", "base", "alone", "added", "mean", *MEETING) if row.get(key)}
        )
    return rows


def gather(processes: int, path: Path, work: Sequence[Callable[[], Any]]) -> None:
    """Runs all, and keeps what there is after each: a run that is cut off has not been for nothing."""
    start, rows = time.perf_counter(), read(path)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for number, future in enumerate(as_completed([pool.submit(one) for one in work]), 1):
            found = future.result()
            rows += found if isinstance(found, list) else [found]
            with path.open("w", newline="", encoding="utf-8") as stream:
                writer = csv.DictWriter(stream, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
            print(f"{time.perf_counter() - start:5.0f} s  {number} of {len(work)}: {found}", flush=True)


def drops(rows: Sequence[dict[str, Any]], key: str = "added") -> list[float]:
    """Per seed, the mean over the tasks of what is lost against each alone, in points."""
    seeds = sorted({row["seed"] for row in rows})
    return [statistics.fmean(row["alone"] - row[key] for row in rows if row["seed"] == seed) for seed in seeds]


def spread(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def figures(rows: Sequence[dict[str, Any]]) -> tuple[str, str, str, str, str, str]:
    """Of one method and triple: base, alone, added, drop, share of the gain that is kept, seeds."""
    base, alone, added = (statistics.fmean(row[key] for row in rows) for key in ("base", "alone", "added"))
    lost, kept = drops(rows), f"{(added - base) / ((alone - base) or math.nan):.0%}"
    return f"{base:.2f}", f"{alone:.2f}", f"{added:.2f}", spread(lost), kept, str(len(lost))


def summarise(rows: Sequence[dict[str, Any]], measure: str = "top-1") -> None:
    for triple, tasks in TRIPLES.items():
        lines = [["method", "base", "alone", "added", "drop", "drop, paper", "gain kept", "drop of the mean", "seeds"]]
        more = [["method", *MEETING]]
        each = [["method, task", "base", "alone", "added", "mean"]]
        for method in METHODS:
            found = [row for row in rows if (row["method"], row["triple"]) == (method, triple)]
            if not found:
                continue
            base, *scores, kept, seeds = figures(found)
            lines.append([method, base, *scores, PAPER.get(method, "-"), kept, spread(drops(found, "mean")), seeds])
            more += [[method, *(f"{row[key]:.3g}" for key in MEETING)] for row in found if row["norm"] != ""][:1]
            for task in tasks:
                mine = [row for row in found if row["task"] == task]
                values = (spread([row[key] for row in mine]) for key in ("base", "alone", "added", "mean"))
                each.append([f"{method}, {task}", *values])
        if len(lines) == 1:
            continue
        print_table(f"{triple} ({', '.join(tasks)}): {measure}, mean over the tasks; alone, then three in one", lines)
        print_table("how the adapters meet, mean over pairs, first seed", more)
        print_table("each task", each)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    triples = {triple: tasks for triple, tasks in TRIPLES.items() if any(row["triple"] == triple for row in rows)}
    figure = Figure(figsize=(13, 4.2 * len(triples)), layout="constrained")
    panels = figure.subplots(len(triples), 2, width_ratios=(2, 1), squeeze=False)
    for (left, right), (triple, tasks) in zip(panels, triples.items(), strict=True):
        of_triple = [row for row in rows if row["triple"] == triple]
        methods = [method for method in METHODS if any(row["method"] == method for row in of_triple)]
        bars = [(method, task) for method in methods for task in tasks]
        for number, key in enumerate(("base", "alone", "added", "mean")):
            heights = [
                statistics.fmean(row[key] for row in of_triple if (row["method"], row["task"]) == bar) for bar in bars
            ]
            left.bar([place + 0.2 * number for place in range(len(bars))], heights, 0.2, label=key)
        left.set_xticks([place + 0.3 for place in range(len(bars))], [task for _, task in bars], fontsize=8)
        for number, method in enumerate(methods):  # once below its tasks, instead of below each
            middle = number * len(tasks) + (len(tasks) - 1) / 2 + 0.3
            below = {"xycoords": ("data", "axes fraction"), "xytext": (0, -20), "textcoords": "offset points"}
            left.annotate(method, (middle, 0), ha="center", va="top", fontsize=8, fontweight="bold", **below)
        left.set(ylabel="top-1, %")
        left.set_title(f"{', '.join(tasks)}: each adapter alone, and the three fused", pad=24)
        left.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, fontsize=8, frameon=False)
        for place, method in enumerate(methods):
            lost = drops([row for row in of_triple if row["method"] == method])
            right.bar(place, statistics.fmean(lost), 0.6, color="tab:gray" if method == "LoRA" else "tab:blue")
            right.plot([place] * len(lost), lost, "k.", markersize=4)
            if method in PAPER:
                right.plot(place, float(PAPER[method]), "r_", markersize=18)
        right.set_xticks(range(len(methods)), [method.replace(" ", "\n") for method in methods], fontsize=7)
        right.set(ylabel="points of top-1")
        right.set_title("lost by adding the three (dots: seeds; red: paper)", fontsize=9)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
