"""The closed form on random Llama models: peak memory and time as the model grows, layer by layer and as a whole.

`python -m benchmarks.refit` takes some minutes on two free cores; Linux only (/proc).
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.table import print_table
from shiradelta.util import text

WORDS = [f"w{i}" for i in range(1000)]
LAYERS = (3, 12)

_CHILD = """
import sys, time
import torch
from shiradelta.converters import convert
from shiradelta.fit import Fit
from shiradelta.fit.refit import stream

def status(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

way, texts, *models = sys.argv[1:]
if way == "whole":
    def cannot(*arguments):
        raise stream.CannotStreamError("it is compared")
    stream.stream = cannot
fit = Fit(texts, method="refit", batch=32, tokens=32, held_out=64, device="cpu")
for base, tuned in (models[:2], models[2:]):  # a small one first: what is loaded for any is not counted
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    idle, start = status("VmRSS"), time.perf_counter()
    report = convert(tuned, tuned + ".shd", base=base, fit=fit)
print(time.perf_counter() - start, status("VmHWM") - idle, report.fit.topk, report.fit.fitted)
"""


def write_models(root: Path, layers: int, size: int = 256) -> tuple[Path, Path, int]:
    """(base, fine-tune, bytes of one layer in float32): bf16, embeddings small beside the layers."""
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=size,
        intermediate_size=4 * size,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(root / "base")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(str(root / "base"))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "proj" in name:
                weight += 0.002 * (torch.randn(len(weight), 8) @ torch.randn(8, weight.shape[1])).bfloat16()
    model.save_pretrained(root / "tuned")
    return root / "base", root / "tuned", 4 * sum(p.numel() for p in model.model.layers[0].parameters())


def main() -> None:
    """Prints the table."""
    rows = [["layers", "model, float32", "way", "time", "peak memory", "x one layer", "distance: top-k", "refitted"]]
    rng = random.Random(0)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        root = Path(folder)
        texts = [" ".join(rng.choices(WORDS, k=24)) for _ in range(400)]
        (root / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        small = write_models(root / "small", 2, 64)
        for layers in LAYERS:
            base, tuned, layer = write_models(root / str(layers), layers)
            for way in ("by layer", "whole"):
                arguments = [way, root / "texts.jsonl", *small[:2], base, tuned]
                command = [sys.executable, "-c", _CHILD, *map(str, arguments)]
                # Freed memory goes back at once, so that the peak is of what is in use and not of the heap's holes.
                environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 18)}
                done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
                found = done.stdout.split()
                spent, peak, topk, fitted = map(float, found[-4:])
                size = text.size(layers * layer)
                rows.append([str(layers), size, way, f"{spent:.0f} s", text.size(peak), f"{peak / layer:.1f}"])
                rows[-1] += [f"{topk:.4f}", f"{fitted:.4f}"]
                print(*rows[-1], flush=True)
    print_table("closed-form refit, 1 %, int4, 256 texts of 24 tokens; the interpreter's own memory taken off", rows)


if __name__ == "__main__":
    main()
