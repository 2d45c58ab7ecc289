"""What fitting a LoRA takes of a model in the shape of Llama-2-7B: what is said at the start, time and memory.

`python -m benchmarks.fit_large FOLDER` writes the model there (13 GB, random weights), a LoRA r16 and the delta; texts
are random tokens, so only times and the GPU's peak memory mean something.  `--layers` and `--width` make it smaller.
"""

# mypy: ignore-errors

from __future__ import annotations

import argparse
import random
import time
from functools import partial
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

import shiradelta
from benchmarks.table import print_table
from shiradelta.fit import Fit

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCABULARY, TOKENS, TEXTS, HELD_OUT = 32_000, 128, 400, 32
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make(folder: Path, layers: int, width: int) -> tuple[Path, Path]:
    """Folders of a model and of a LoRA of it."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    sizes = {"hidden_size": width, "intermediate_size": width * 43 // 16, "num_attention_heads": width // 128}
    config = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=layers, **sizes, dtype="bfloat16")
    with torch.device(DEVICE):
        model = LlamaForCausalLM._from_config(config)
    model.save_pretrained(folder / "model")
    words = Tokenizer(models.WordLevel({f"<{n}>": n for n in range(VOCABULARY)}, unk_token="<0>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"<\d+>"), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<0>", pad_token="<1>").save_pretrained(folder / "model")
    lora = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=LINEARS))
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.002)
    lora.save_pretrained(folder / "lora")
    return folder / "model", folder / "lora"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4_096)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--mask", help="as --fit-mask of shiradelta")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--micro", type=int, default=8)
    options = parser.parse_args()
    base, lora = make(options.folder, options.layers, options.width)
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    draw = random.Random(0)
    texts = ["".join(f"<{draw.randrange(2, VOCABULARY)}>" for _ in range(TOKENS)) for _ in range(TEXTS)]
    settings = {"steps": options.steps, "batch": options.batch, "micro": options.micro, "held_out": HELD_OUT}
    fit = Fit(texts, mask=options.mask, log=partial(print, flush=True), **settings)
    start = time.monotonic()
    report = shiradelta.convert(lora, options.folder / "fitted.shd", 0.01, base, fit=fit)
    rows = [
        ["from the LoRA to the file", f"{time.monotonic() - start:.0f} s"],
        ["the fit", f"{report.fit.seconds:.0f} s"],
    ]
    if DEVICE == "cuda":
        rows.append(["peak memory", f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB"])
    print_table(f"{options.steps} steps of {options.batch} texts of {TOKENS} tokens on {DEVICE}", [["", ""], *rows])


if __name__ == "__main__":
    main()
