"""The next checkpoint of real training steps: how small, how fast, side by side with other ways to send it.

`python -m benchmarks.lossless` trains all-MiniLM-L6-v2 for some steps of AdamW in float32, stored as bfloat16, at
learning rates of 1e-6 and 1e-5, and stores the last step in every way.  With `--model FOLDER --examples FILE` it trains
a language model on prompts and completions.  All are checked to give it back.  A peer that is not installed is named:
`pip install zipnn fireworks-delta-compression openzl weightscope`.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import zstandard
from safetensors.torch import load_file, save_file

import shiradelta as sd
from benchmarks.table import print_table
from demo.task import embed, load_base
from shiradelta.format import arithmetic
from shiradelta.format.arithmetic import Array
from shiradelta.format.entropy import entropy
from shiradelta.io.context import plain_delta

RATES = (1e-6, 1e-5)
STEPS, BATCH = 12, 32
#: Tensors above this many elements, of which the sections are compared with the entropy.
LARGE = 100_000
State = Mapping[str, torch.Tensor]


class Row(NamedTuple):
    """A way to store a step: bytes, and processor seconds of both directions."""

    name: str
    size: int
    encode: float
    decode: float


def texts() -> list[tuple[str, str]]:
    """Names and docstrings of NumPy, as pairs to pull together."""
    found = []
    for file in sorted(Path(np.__file__).parent.rglob("*.py"))[:150]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and len(about := ast.get_docstring(node) or "") > 80:
                found.append((node.name.replace("_", " "), about[:220]))
    return found


def steps(rate: float) -> Iterator[State]:
    """The model after each step, in bfloat16."""
    torch.manual_seed(0)
    (model, tokenizer), pairs, rng = load_base(), texts(), np.random.default_rng(0)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=rate)
    while True:
        chosen = [pairs[i] for i in rng.choice(len(pairs), BATCH, replace=False)]
        names, about = (embed(model, tokenizer, some) for some in zip(*chosen, strict=True))
        scores = names @ about.T
        loss = torch.nn.functional.cross_entropy(scores * 20, torch.arange(BATCH))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        floats = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
        yield {name: tensor.bfloat16() for name, tensor in floats.items()}


def language_steps(folder: Path, examples: Path, rate: float) -> Iterator[State]:
    """A language model after each step on prompts with their completions, in bfloat16."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with examples.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    optimizer = torch.optim.AdamW(model.float().train().parameters(), lr=rate)
    rng = np.random.default_rng(0)
    while True:
        chosen = [rows[i]["prompt"] + rows[i]["completion"] for i in rng.choice(len(rows), BATCH // 4, replace=False)]
        batch = tokenizer(chosen, return_tensors="pt", padding=True, truncation=True, max_length=96)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        optimizer.zero_grad()
        torch.autograd.backward(model(**batch, labels=labels).loss)
        optimizer.step()
        yield {name: tensor.detach().bfloat16() for name, tensor in model.named_parameters()}


def bits(tensor: torch.Tensor) -> Array:
    """The elements as uint16."""
    return tensor.contiguous().view(-1).view(torch.uint16).numpy()


def floor(base: State, tuned: State, least: int = 0) -> tuple[float, int]:
    """(bits of independent changes: positions and shifts by their entropies, the number of changes), by tensor."""
    total, changed = 0.0, 0
    for name, tensor in base.items():
        old, new = bits(tensor), bits(tuned[name])
        at = np.flatnonzero(old != new)
        if tensor.numel() <= least or not at.size:
            continue
        shifts = arithmetic.shifts_between(old[at], new[at], "bfloat16")
        assert shifts is not None
        _, counts = np.unique(shifts, return_counts=True)
        share = counts / at.size
        total += at.size * (entropy(at.size, old.size) - float(share @ np.log2(share)))
        changed += at.size
    return total, changed


def timed(
    name: str, encode: Callable[[], Any], size: Callable[[Any], int], decode: Callable[[Any], State], tuned: State
) -> Row:
    """Runs a way once in each direction, in processor time, and says where it does not give the step back."""
    start = time.process_time()
    stored = encode()
    middle = time.process_time()
    found = decode(stored)
    end = time.process_time()
    wrong = sum(int((bits(found[key]) != bits(tensor)).sum()) for key, tensor in tuned.items())
    return Row(f"{name} ({wrong} elements differ)" if wrong else name, size(stored), middle - start, end - middle)


def patched(base: State, file: Path) -> State:
    """Copies of the base's weights with a file's delta on them."""
    state = {name: tensor.clone() for name, tensor in base.items()}
    with ExitStack() as stack:
        delta = stack.enter_context(sd.open_delta(file))
        if delta.needs_base:
            delta = stack.enter_context(plain_delta(delta, lambda record: bits(base[record.name])))
        for name, tensor in delta.items():
            tensor.patch(bits(state[name]), "bfloat16")
    return state


def ours(base: State, tuned: State, folder: Path, how: str, **options: Any) -> Row:
    """`convert --lossless`, and the delta on the base's weights in memory."""
    for name, state in ("base", base), ("tuned", tuned):
        (folder / name).mkdir(exist_ok=True)
        save_file(dict(state), folder / name / "model.safetensors", metadata={"format": "pt"})
    path = folder / f"shd{how}.shd"

    def encode() -> Path:
        sd.convert(folder / "tuned", path, base=folder / "base", lossless=True, **options)
        return path

    return timed(f"shd{how}", encode, os.path.getsize, partial(patched, base), tuned)


def of_floats(base: State, tuned: State, folder: Path) -> Row:
    """What `convert --sparsity 1 --values f32 --zstd` stored: float32 differences."""
    path = folder / "f32.shd"

    def encode() -> Path:
        deltas = {}
        for name, tensor in base.items():
            at = np.flatnonzero(bits(tensor) != bits(tuned[name]))
            values = (tuned[name].float() - tensor.float()).view(-1).numpy()[at]
            if at.size:
                deltas[name] = sd.TensorDelta(tuple(tensor.shape), at, values, "bfloat16")
        sd.save_delta(path, deltas, values="f32", zstd=True)
        return path

    return timed("shd of float32, zstd", encode, os.path.getsize, partial(patched, base), tuned)


def of_xor(
    name: str, base: State, tuned: State, encode: Callable[[Array], bytes], decode: Callable[[bytes], Array]
) -> Row:
    """Something that compresses the XOR of both, uint16."""
    sizes = [tensor.numel() for tensor in base.values()]
    old = np.concatenate([bits(tensor) for tensor in base.values()])

    def encode_all() -> bytes:
        return encode(old ^ np.concatenate([bits(tuned[key]) for key in base]))

    def decode_all(stored: bytes) -> State:
        parts = torch.split(torch.from_numpy((decode(stored) ^ old).view(np.int16)), sizes)
        return {key: part.view(torch.bfloat16).view(base[key].shape) for key, part in zip(base, parts, strict=True)}

    return timed(f"{name} of XOR", encode_all, len, decode_all, tuned)


def zstd(mixed: Array) -> bytes:
    """Level 19."""
    return bytes(zstandard.ZstdCompressor(level=19).compress(mixed.tobytes()))


def unzstd(stored: bytes) -> Array:
    """The inverse."""
    return np.frombuffer(zstandard.ZstdDecompressor().decompress(stored), np.uint16)


def zstd_planes(mixed: Array) -> bytes:
    """Level 19 of all low bytes, then all high ones."""
    return zstd(np.ascontiguousarray(mixed.view(np.uint8).reshape(-1, 2).T))


def unzstd_planes(stored: bytes) -> Array:
    """The inverse."""
    planes = unzstd(stored).view(np.uint8).reshape(2, -1)
    return np.ascontiguousarray(planes.T).view(np.uint16).reshape(-1)


def by_zipnn(base: State, tuned: State) -> Row:
    """ZipNN, which has a mode for the difference of two files."""
    zipnn = importlib.import_module("zipnn")
    old, sizes = (b"".join(bits(tensor).tobytes() for tensor in base.values())), [t.numel() for t in base.values()]

    def coder() -> Any:
        return zipnn.ZipNN(input_format="byte", bytearray_dtype="bfloat16", delta_compressed_type="byte")

    def encode() -> bytes:
        new = b"".join(bits(tuned[key]).tobytes() for key in base)
        return bytes(coder().compress(new, delta_second_data=old))

    def decode(stored: bytes) -> State:
        found = np.frombuffer(coder().decompress(stored, delta_second_data=old), np.int16).copy()
        parts = torch.split(torch.from_numpy(found), sizes)
        return {key: part.view(torch.bfloat16).view(base[key].shape) for key, part in zip(base, parts, strict=True)}

    return timed("zipnn, byte delta", encode, len, decode, tuned)


def by_fireworks(base: State, tuned: State, folder: Path, layout: str) -> Row:
    """fireworks-delta-compression."""
    fireworks = importlib.import_module("fireworks_delta_compression")
    path = folder / layout

    def encode() -> Path:
        fireworks.delta_compress_dicts_to_file(
            src=dict(base), dst=dict(tuned), diff_file=str(path), compression_format=layout
        )
        return path

    def decode(stored: Path) -> State:
        found: State = fireworks.delta_decompress_dict_from_file(
            src=dict(base), diff_file=str(stored), compression_format=layout
        )
        return found

    return timed(f"fireworks {layout}", encode, os.path.getsize, decode, tuned)


def by_openzl(base: State, tuned: State) -> Row:
    """OpenZL's codec for numbers that are mostly 0: distances and values, each through its generic graph."""
    openzl = importlib.import_module("openzl.ext")

    def encode(mixed: Array) -> bytes:
        compressor = openzl.Compressor()
        compressor.set_parameter(openzl.CParam.FormatVersion, openzl.MAX_FORMAT_VERSION)
        compressor.set_parameter(openzl.CParam.CompressionLevel, 19)
        node, generic = compressor.get_node("zl.sparse_num_auto"), compressor.get_graph("zl.compress_generic")
        compressor.select_starting_graph(compressor.build_static_graph(node, [generic, generic]))
        context = openzl.CCtx()
        context.ref_compressor(compressor)
        return bytes(context.compress([openzl.Input(openzl.Type.Numeric, mixed)]))

    def decode(stored: bytes) -> Array:
        (found,) = openzl.DCtx().decompress(stored)
        return np.array(found.content.as_nparray()).view(np.uint16).reshape(-1)

    return of_xor("openzl sparse_num", base, tuned, encode, decode)


def by_weightscope(base: State, tuned: State, folder: Path) -> Row:
    """weightscope's patch, from folder to folder; a threshold of 0 keeps every change."""
    export, apply = (importlib.import_module(f"weightscope.{name}") for name in ("export_patch", "apply_patch"))
    path, result = folder / "weightscope.wsp", folder / "weightscope.safetensors"

    def encode() -> Path:
        export.export_patch(str(folder / "base"), str(folder / "tuned"), path, threshold=0.0)
        return path

    def decode(stored: Path) -> State:
        apply.apply_patch(stored, str(folder / "base"), result)
        found: State = load_file(result)
        return found

    return timed("weightscope", encode, os.path.getsize, decode, tuned)


def ways(base: State, tuned: State, folder: Path) -> Iterator[Row | str]:
    """A row for each way, or the name of a peer that is not installed."""
    yield ours(base, tuned, folder, "")
    yield ours(base, tuned, folder, ", zstd", zstd=True)
    yield ours(base, tuned, folder, ", base as context", context="base")
    yield of_floats(base, tuned, folder)
    yield of_xor("zstd-19", base, tuned, zstd, unzstd)
    yield of_xor("zstd-19, byte planes,", base, tuned, zstd_planes, unzstd_planes)
    peers: dict[str, list[Callable[[], Row]]] = {
        "zipnn": [partial(by_zipnn, base, tuned)],
        "fireworks_delta_compression": [
            partial(by_fireworks, base, tuned, folder, layout) for layout in ("arc_v2", "arc_v3")
        ],
        "openzl": [partial(by_openzl, base, tuned)],
        "weightscope": [partial(by_weightscope, base, tuned, folder)],
    }
    for module, each in peers.items():
        try:
            importlib.import_module(module)
        except ImportError as error:
            yield f"{module}: {error}"
        else:
            yield from (way() for way in each)


def compare(base: State, tuned: State, title: str) -> None:
    """Prints the table of one step."""
    least, changed = floor(base, tuned)
    share = changed / sum(tensor.numel() for tensor in base.values())
    rows = [["", "bytes", "bits a change", "x floor", "encode, s", "decode, s"]]

    def add(name: str, size: float, over: float, per: int, *seconds: str) -> None:
        rows.append([name, f"{size:,.0f}", f"{8 * size / per:.2f}", f"{8 * size / over:.3f}", *(seconds or "--")])

    add("floor of independent changes", least / 8, least, changed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for way in ways(base, tuned, folder):
            if isinstance(way, str):
                rows.append([way, *"-----"])
            else:
                add(way.name, way.size, least, changed, f"{way.encode:.2f}", f"{way.decode:.2f}")
        for how in "", ", base as context":
            with sd.open_delta(folder / f"shd{how}.shd") as delta:
                large = [tensor.record for tensor in delta.values() if tensor.numel > LARGE]
                sections = sum(record.index.stored + record.values.stored for record in large)
                add(f"shd{how}: sections of tensors above {LARGE:,}", sections, *floor(base, tuned, LARGE))
    print_table(f"{title}: {share:.2%} of {len(base)} tensors' elements changed; processor time", rows)


def main() -> None:
    """Prints a table for each learning rate."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="steps before the one that is stored")
    parser.add_argument("--model", type=Path, help="folder of a language model, instead of all-MiniLM-L6-v2")
    parser.add_argument("--examples", type=Path, help="its examples: JSON Lines with prompt and completion")
    parser.add_argument("--rate", type=float, nargs="*", default=RATES, help="learning rates")
    options = parser.parse_args()
    for rate in options.rate:
        every = language_steps(options.model, options.examples, rate) if options.model else steps(rate)
        base = [next(every) for _ in range(options.steps)][-1]
        compare(base, next(every), f"AdamW, learning rate {rate:g}, step {options.steps + 1}")


if __name__ == "__main__":
    main()
