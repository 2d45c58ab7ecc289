"""A model that hears, small enough for a test, and sounds for it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.io import wavfile
from torch import nn
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

from tests.seq2seq import WORDS, write_tokenizer

RATE = 16000


def extractor() -> WhisperFeatureExtractor:
    """Hears a second: 100 frames, of which the encoder makes 50."""
    return WhisperFeatureExtractor(feature_size=8, chunk_length=1)


def build() -> nn.Module:
    torch.manual_seed(0)
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in _SIZES.items()}
    config = WhisperConfig(
        **sizes,
        vocab_size=64,
        d_model=32,
        num_mel_bins=8,
        max_source_positions=50,
        max_target_positions=32,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        decoder_start_token_id=2,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        init_std=0.1,
    )
    return WhisperForConditionalGeneration(config).eval()


_SIZES = {"layers": 2, "attention_heads": 2, "ffn_dim": 64}


def write_model(folder: Path) -> None:
    build().save_pretrained(folder)
    write_tokenizer("bart", folder)
    extractor().save_pretrained(folder)


def sound(word: int, seconds: float, rate: int = RATE) -> Any:
    """A tone for a word."""
    time = np.arange(int(seconds * rate)) / rate
    return (0.3 * np.sin(2 * np.pi * (200 + 40 * word) * time)).astype(np.float32)


def write_examples(folder: Path, count: int = 60) -> Path:
    """Tones, each with the word that it stands for; the paths start from the file's folder."""
    rng, lines = random.Random(0), []
    (folder / "clips").mkdir(parents=True)
    for number in range(count):
        word = rng.randrange(20)
        samples = sound(word, rng.uniform(0.1, 0.9))
        wavfile.write(folder / "clips" / f"{number}.wav", RATE, (samples * 32767).astype(np.int16))
        lines.append({"audio": f"clips/{number}.wav", "text": f"{WORDS[word]} {WORDS[word]}", "speaker": "none"})
    path = folder / "heard.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_pair(root: Path) -> tuple[Path, Path, Path]:
    """Folders of a base and of a fine-tune that has learnt the tones, and a file of examples."""
    write_model(root / "base")
    path = write_examples(root / "data")
    model: Any = WhisperForConditionalGeneration.from_pretrained(root / "base")
    hear, optimizer = extractor(), torch.optim.Adam(model.parameters(), 3e-3)
    tokenizer = write_tokenizer("bart", root / "tuned")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    heard = [wavfile.read(path.parent / row["audio"])[1] / 32768 for row in rows]
    given = hear(heard, sampling_rate=RATE, return_tensors="pt")["input_features"]
    labels = torch.tensor([tokenizer(row["text"])["input_ids"][1:] for row in rows])  # shifting adds the first
    for _ in range(30):
        optimizer.zero_grad()
        model(input_features=given, labels=labels).loss.backward()
        optimizer.step()
    model.save_pretrained(root / "tuned")
    return root / "base", root / "tuned", path
