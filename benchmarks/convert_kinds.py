"""Converting kinds of adapters on layers of Llama-2-7B's shapes: peak memory and time, beside PEFT's own merge.

python -m benchmarks.convert_kinds [--layers 1 2] [--kinds LORA DORA OFT IA3]

All weights are random.  Memory is what a process takes over an idle one that has imported the same packages.  "own"
memory is that of its own (anonymous) pages, sampled every 5 ms; "peak" also counts mapped pages of the files, which the
system may drop at any time.  PEFT's memory is its own while it merges, beside the model, which it has in memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import models
from benchmarks.convert import LARGEST
from benchmarks.table import print_table
from shiradelta.util import text

TARGETS = [name.rpartition(".")[2] for name in models.LLAMA_7B_LAYER]

_CHILD = """
import sys, threading, time
sys.path.insert(0, ".")
kind, adapter, base, out = sys.argv[1:]
import peft, torch, transformers
from shiradelta.converters import convert

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

if kind == "peft":
    model = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model = peft.PeftModel.from_pretrained(model, adapter)
    work = model.merge_and_unload
else:
    def work():
        convert(adapter, out, base=base)

peak_before, own_before, done = status("VmHWM"), status("RssAnon"), threading.Event()
owns = [own_before]

def sample():
    while not done.wait(0.005):
        owns.append(status("RssAnon"))

thread = threading.Thread(target=sample)
thread.start()
start = time.perf_counter()
work()
spent = time.perf_counter() - start
done.set()
thread.join()
print(spent, max(owns) - own_before, status("VmHWM") - peak_before)
"""


def write_model(folder: Path, layers: int) -> None:
    """A Llama of bf16 weights, with the shapes of Llama-2-7B's layers and a small vocabulary."""
    models.write_base(folder, layers)
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 64}
    about = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": layers, **sizes}
    (folder / "config.json").write_text(json.dumps(about))


def write_adapter(folder: Path, base: Path, kind: str) -> None:
    """An adapter of a kind on all linear layers, with random weights, as PEFT saves it."""
    import peft
    import transformers

    configs: dict[str, Any] = {
        "LORA": lambda: peft.LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS),
        "DORA": lambda: peft.LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, use_dora=True),
        "OFT": lambda: peft.OFTConfig(oft_block_size=32, target_modules=TARGETS),
        "IA3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    }
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    tuned = peft.get_peft_model(model, configs[kind]())
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.01
    tuned.save_pretrained(folder)


def run(kind: str, adapter: Path, base: Path, out: Path) -> tuple[float, int, int]:
    """(seconds, bytes of own memory, bytes of peak memory) of a process of its own."""
    command = [sys.executable, "-W", "ignore", "-c", _CHILD, kind, str(adapter), str(base), str(out)]
    spent, own, peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-3:]
    return float(spent), int(own), int(peak)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--kinds", nargs="+", default=["LORA", "DORA", "OFT", "IA3"])
    arguments = parser.parse_args()
    rows = [
        [
            "kind",
            "layers",
            "PEFT's merge",
            "convert",
            "x merge",
            "own memory",
            "x largest",
            "peak",
            "x largest",
            "PEFT's",
        ]
    ]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for layers in arguments.layers:
            base = root / f"base{layers}"
            write_model(base, layers)
            for kind in arguments.kinds:
                adapter = root / f"{kind}{layers}"
                write_adapter(adapter, base, kind)
                merge, others, _ = run("peft", adapter, base, root / "out.shd")
                spent, own, peak = run("convert", adapter, base, root / "out.shd")
                memory = [text.size(own), f"{own / LARGEST:.2f}", text.size(peak), f"{peak / LARGEST:.2f}"]
                memory.append(f"{others / LARGEST:.2f}")
                rows.append([kind, str(layers), f"{merge:.2f} s", f"{spent:.2f} s", f"{spent / merge:.1f}", *memory])
    print_table(
        f"Adapters on random weights in Llama-2-7B shapes, bf16, 1 %, int4; the largest tensor in float32 is"
        f" {text.size(LARGEST)}; torch with {torch.get_num_threads()} threads",
        rows,
    )


if __name__ == "__main__":
    main()
