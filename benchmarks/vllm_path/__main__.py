"""HotSwap in vLLM against vLLM's own path for sparse weight updates: times, bits, and what failures leave behind.

`python -m benchmarks.vllm_path OUT` makes a Llama with random weights and a delta of 1 % of them, hands both to vLLM on
a CPU in the environment that `make vllm` makes, and writes vllm-path.csv to a folder.  Both paths get the same delta:
ours as a `.shd` file with int8 values, vLLM's as the positions (int32) and the new values (bf16) in memory.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import shiradelta as sd
from benchmarks import vllm_environment
from benchmarks.table import commit, machine, print_table
from shiradelta.errors import ShiraDeltaError

#: What is wrong -> (the kind of damage in `inside`, the tensor that it is made in).
DAMAGES = {
    "unknown name": ("unknown name", "q_proj"),
    "a row too many, of a projection": ("a row too many", "q_proj"),
    "a row too many, of the embedding": ("a row too many", "embed_tokens"),
    "an index beyond the end": ("an index beyond the end", "q_proj"),
    "a NaN": ("a NaN", "q_proj"),
}
Deltas = dict[str, sd.TensorDelta]


def write_base(folder: Path, hidden: int, layers: int, vocabulary: int, seed: int) -> int:
    """A Llama with random bf16 weights; its number of weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": hidden, "intermediate_size": 11 * hidden // 4, "num_hidden_layers": layers}
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 128, "head_dim": 64}
    config = LlamaConfig(**sizes, **heads, vocab_size=vocabulary, max_position_embeddings=256)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    return sum(one.numel() for one in model.parameters())


def deltas_of(base: dict[str, torch.Tensor], seed: int) -> Deltas:
    """Independent positions in all tensors, 1 %, with random values."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, tensor in base.items():
        positions = np.flatnonzero(rng.random(tensor.numel(), dtype=np.float32) < 0.01)
        positions = positions if positions.size else np.zeros(1, np.int64)
        values = 0.01 * rng.standard_normal(positions.size).astype(np.float32)
        bits = tensor.view(torch.int16).reshape(-1).numpy().view(np.uint16)[positions]
        found[name] = sd.TensorDelta(tuple(tensor.shape), positions, values, "bfloat16", base_bits=bits)
    return found


def write_patches(path: Path, deltas: Deltas, tuned: dict[str, torch.Tensor]) -> None:
    """What vLLM's path is given, which are the values that the same delta leads to."""
    stored = {}
    for name, delta in deltas.items():
        positions = torch.from_numpy(delta.positions())
        stored[f"{name}.indices"] = positions.to(torch.int32)
        stored[f"{name}.values"] = tuned[name].reshape(-1)[positions].clone()
    save_file(stored, path)


def damaged(folder: Path, deltas: Deltas, number: int, damage: str, at: str) -> str:
    """The path of a file with the same damage, or why none can be written."""
    one = deltas[at]
    positions, values, bits = one.positions(), one.values(), one.base_bits
    rest = {name: delta for name, delta in deltas.items() if name != at}

    def made(shape: tuple[int, ...] = one.shape, positions: Any = positions, values: Any = values) -> sd.TensorDelta:
        return sd.TensorDelta(shape, positions, values, "bfloat16", base_bits=bits)

    ways: dict[str, Callable[[], Deltas]] = {
        "unknown name": lambda: {f"{at}.else": one},
        "a row too many": lambda: {at: made((one.shape[0] + 1, *one.shape[1:]))},
        "an index beyond the end": lambda: {at: made(positions=np.append(positions[:-1], np.prod(one.shape)))},
        "a NaN": lambda: {at: made(values=np.append(values[:-1], np.float32("nan")))},
    }
    path = folder / f"damaged{number}.shd"
    try:
        sd.save_delta(path, {**rest, **ways[damage]()}, values="int8")
    except ShiraDeltaError as error:
        return f"no such file can be written: {error}"
    return str(path)


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vllm_path", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=8000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vllm", type=Path, default=vllm_environment.INTERPRETER, help="the interpreter that has vLLM")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        weights = write_base(folder / "base", options.hidden, options.layers, options.vocabulary, options.seed)
        base = load_file(folder / "base" / "model.safetensors")
        deltas = deltas_of(base, options.seed)
        sd.save_delta(folder / "a.shd", deltas, values="int8")
        sd.apply(folder / "base", folder / "a.shd", out=folder / "tuned")
        write_patches(folder / "patches.safetensors", deltas, load_file(folder / "tuned" / "model.safetensors"))
        found_in = {part: [name for name in deltas if part in name] for part in ("q_proj", "embed_tokens")}
        places = [(what, damage, found_in[part][len(found_in[part]) // 2]) for what, (damage, part) in DAMAGES.items()]
        wanted = {
            "folder": str(folder),
            "shapes": {name: delta.shape for name, delta in deltas.items()},
            "repeats": options.repeats,
            "damages": places,
            "files": {
                what: damaged(folder, deltas, number, damage, at) for number, (what, damage, at) in enumerate(places)
            },
        }
        found = vllm_environment.run(options.vllm, "benchmarks.vllm_path.inside", wanted, options.threads)
    rows: list[dict[str, object]] = []
    nonzeros = sum(delta.nnz for delta in deltas.values())
    about = {"weights": weights, "nonzeros": nonzeros, "threads": options.threads, "seed": options.seed}
    about |= {"machine": machine(), "date": datetime.now(UTC).date().isoformat(), "commit": commit()}
    seconds = found["seconds"]
    names = {"stock": "vLLM's patches", "from file": "from a file", "switch": "a loaded adapter", "revert": "revert"}
    lines = [["path", "seconds", "vLLM's takes"]]
    for what, name in names.items():
        ratio = seconds["stock"] / seconds[what]
        rows.append({"what": name, "seconds": f"{seconds[what]:.5f}", "ratio": f"{ratio:.2f}"})
        lines.append([name, f"{seconds[what]:.4f}", f"{ratio:.1f} x as long"])
    sizes = f"{weights / 1e6:.0f} M weights, {nonzeros / 1e6:.2f} M nonzeros, {options.threads} threads"
    print_table(f"the same delta in vLLM; {sizes}; seed {options.seed}, {about['date']}, {about['commit']}", lines)
    print(f"\nafter 100 switches all {found['parameters']} parameters are those of the {found['after switches']}")
    rows.append({"what": "100 switches", "ours": found["after switches"]})
    for what, stock, stock_state, ours, state in found["failures"]:
        rows.append({"what": what, "stock": stock, "stock_state": stock_state, "ours": ours, "state": state})
        print(f"\n{what}\n  vLLM: {stock}\n    weights: {stock_state}\n  shiradelta: {ours}\n    weights: {state}")
    options.out.mkdir(parents=True, exist_ok=True)
    columns = ["what", "seconds", "ratio", "stock", "stock_state", "ours", "state", *about]
    with open(options.out / "vllm-path.csv", "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows({**row, **about} for row in rows)


if __name__ == "__main__":
    main()
